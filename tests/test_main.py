"""`python -m empf`: which file a command runs, and one sentence where there is none."""

from pathlib import Path

import pytest

from empf import __main__ as commands

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "command, file, flags",
    [
        (["train", "--epochs", "1"], "train.py", ["--epochs", "1"]),
        (["eval", "run", "--json", "-"], "eval.py", ["run", "--json", "-"]),
        (["bench", "deploy"], "bench/deploy.py", ["--json", "deploy.json"]),
        (["bench", "train", "--json=a.json", "--threads", "1"], "bench/train.py", ["--json=a.json", "--threads", "1"]),
    ],
)
def test_a_command_is_a_script_with_its_flags(command, file, flags):
    found, *rest = commands.script(command)
    assert Path(found).samefile(ROOT / file) and rest == flags


@pytest.mark.parametrize("name", commands.BENCHES)
def test_a_benchmark_is_there_and_writes_where_it_is_told(name):
    assert '"--json"' in Path(commands.script(["bench", name])[0]).read_text()


@pytest.mark.parametrize("command", [[], ["trian"], ["bench"], ["bench", "ablation"]])
def test_what_is_no_command_is_one_sentence(command):
    with pytest.raises(SystemExit, match="^error: give a command: .* train, eval, or bench with one of data, deploy,"):
        commands.script(command)


@pytest.mark.parametrize("command", [["--help"], ["bench", "-h"]])
def test_help_lists_the_commands(command, capsys):
    with pytest.raises(SystemExit) as end:
        commands.script(command)
    said = capsys.readouterr().out
    assert end.value.code is None and said.count("python -m empf") == 3 and ", ".join(commands.BENCHES) in said


def test_threads_are_told_not_to_spin_before_torch_loads():
    """`python -m empf train` imports the package, and so torch, before train.py could say it."""
    text = (ROOT / "empf" / "__init__.py").read_text()
    assert 0 < text.index('os.environ.setdefault("GOMP_SPINCOUNT"') < text.index("\nfrom empf")
