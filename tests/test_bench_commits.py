"""bench/commits.py: two commits answer in turns, and leave nothing behind."""

import json
import subprocess

import pytest

from bench import commits

pytestmark = pytest.mark.skipif(not (commits.ROOT / ".git").exists(), reason="needs the history of the repository")


def worktrees() -> str:
    listed = ["git", "-C", str(commits.ROOT), "worktree", "list"]
    return subprocess.run(listed, check=True, capture_output=True, text=True).stdout


def test_a_commit_takes_as_long_as_itself(tmp_path):
    before, path = worktrees(), tmp_path / "result.json"
    commits.main(
        ["HEAD", "HEAD", "--bits", "4", "--widths", "0.125", "--threads", "1", "--batches", "1", "2"]
        + ["--rounds", "3", "--json", str(path)]
    )
    result = json.loads(path.read_text())
    assert result["commits"] == [commits.git("rev-parse", "HEAD")] * 2 and worktrees() == before
    assert [(row["bits"], row["batch"], row["turns"]) for row in result["rows"]] == [(4, 1, 3), (4, 2, 3)]
    for row in result["rows"]:
        old, new = (ms["median"] for ms in row["ms"])
        assert old > 0 and 0.1 < new / old < 10 and 0.1 < row["second_over_first"]["median"] < 10


@pytest.mark.parametrize("wrong", ["no-such-commit", "HEAD:README.md"])
def test_a_commit_that_is_not_there(wrong, tmp_path):
    before = worktrees()
    with pytest.raises(SystemExit, match=f"error: .*{wrong}"):
        commits.main(["HEAD", wrong, "--json", str(tmp_path / "result.json")])
    assert worktrees() == before and not (tmp_path / "result.json").exists()
