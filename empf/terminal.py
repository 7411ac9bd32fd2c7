"""What people read: sentences that any terminal can show, and output that cannot stop the work."""

import os
import sys
from contextlib import suppress


def shown(text: object, most: int = 300) -> str:
    """A text that may come from anywhere, on one line, what a terminal would obey as `?`, and cut to `most`."""
    line = "".join(c if c.isprintable() else "?" for c in str(text)[: most + 1])
    return line if len(line) <= most else f"{line[: most - 3]}..."


class Steady:
    """A stream of text that never fails: what its encoding lacks is escaped, and once it is closed or full, silence."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.attempt("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, method: str, *arguments) -> None:
        try:
            getattr(self.stream, method)(*arguments)
        except (OSError, ValueError, AttributeError):  # full, a pipe that nobody reads, closed, or None
            silence = open(os.devnull, "w")  # noqa: SIM115
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(silence.fileno(), self.stream.fileno())  # what its buffer still holds goes there at the end
            self.stream = silence

    def isatty(self) -> bool:
        return False if self.stream is None else self.stream.isatty()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


class steady_output:
    """Context in which standard output and error are `Steady`."""

    def __enter__(self) -> None:
        self.before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)

    def __exit__(self, *error) -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = self.before
