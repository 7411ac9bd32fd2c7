"""Writing a file so that a crash at any moment leaves the old one or the new one, never half of it."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file by `data`, or leave it as it was. Raises OSError with one sentence where the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the rename itself
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(
            f"could not write {path} ({error.strerror}): make room or choose another folder; what was saved before is "
            "intact"
        ) from error
