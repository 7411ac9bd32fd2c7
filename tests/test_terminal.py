"""What people read: sentences of any text, and output that cannot stop the work."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from empf.terminal import Steady, shown, steady_output


def test_a_hostile_text_is_one_printable_line():
    assert shown("a\x1b]0;title\x07b\nc") == "a?]0;title?b?c"
    assert len(shown("x" * 10_000)) == 300 and shown("x" * 10_000).endswith("...")
    assert shown(ValueError("é 猫"), 3) == "é 猫"


def test_what_an_encoding_lacks_is_escaped():
    buffer = io.BytesIO()
    stream = Steady(io.TextIOWrapper(buffer, encoding="ascii"))
    print("Bäume \udcff", file=stream, flush=True)
    assert buffer.getvalue() == b"B\\xe4ume \\udcff\n"


@pytest.mark.parametrize("stream", [None, open(os.devnull), "closed"], ids=str)  # noqa: SIM115
def test_a_stream_that_takes_nothing_is_silent(stream):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    steady = Steady(stream)
    for _ in range(2):
        print("text", file=steady, flush=True)
    assert steady.isatty() in (True, False)


SCRIPT = """
import sys
from empf.terminal import steady_output
with steady_output():
    for i in range(3):
        print("x" * 100_000, flush=True)
        print("y", file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


@pytest.mark.parametrize("how", ["| head -c 1", ">&- 2>&-", "> /dev/full 2> /dev/full"])
def test_work_goes_on_when_nobody_reads(tmp_path, how):
    """A pipe that is closed, streams that are closed, a device that is full."""
    command = f'set -o pipefail; "{sys.executable}" -c "$0" "$1" {how}'
    done = tmp_path / "done"
    root = Path(__file__).parents[1]
    result = subprocess.run(["bash", "-c", command, SCRIPT, str(done)], capture_output=True, cwd=root, timeout=120)
    assert result.returncode == 0 and done.read_text() == "done"
    assert b"Traceback" not in result.stderr and b"ignored" not in result.stderr


def test_the_streams_come_back():
    before = sys.stdout, sys.stderr
    with pytest.raises(ValueError), steady_output():
        raise ValueError
    assert (sys.stdout, sys.stderr) == before
