"""Files that are written whole or not at all, JSON that is read or refused, and the fingerprint of weights."""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from empf.terminal import shown

RUN_FILES = {
    "config.json",
    "model.safetensors",
    "best.safetensors",
    "metrics.jsonl",
    "curves.png",
    "log.txt",
    "state.pt",
    "lock",
    "owner",
}


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


def check_result(path: Path | None) -> None:
    """Raise ValueError for a file of a run, or one that holds something else than JSON: no result may replace it."""
    if path is None:
        return
    folder = path.resolve().parent
    if path.resolve().name in RUN_FILES and any((run / "config.json").exists() for run in (folder, folder.parent)):
        raise ValueError(f"{path} is a file of a run: choose another name for the result")
    try:
        parse_json(path.is_file() and path.read_bytes() or b"0")
    except ValueError as error:
        raise ValueError(f"{path} exists and is no result, it would be lost: choose another name") from error


def write_result(path: Path, text: str) -> None:
    """Write where a user asked for it: `-` is standard output, a link is followed, a device or a pipe is written to.

    Raises ValueError for a file of a run, and OSError with one sentence where writing fails.
    """
    if str(path) == "-":
        print(text, end="")
        return
    check_result(path)
    path = path.resolve()
    if not path.exists() or path.is_file():
        write_atomic(path, text.encode())
        return
    try:
        with open(path, "w", encoding="utf-8") as f:
            f.write(text)
    except OSError as error:
        raise OSError(f"could not write {path} ({error.strerror}): choose another place") from error


def read_json(path: Path) -> object:
    """What a JSON file holds. Raises ValueError with one sentence if it is damaged."""
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy") from error


def parse_json(data: bytes | str) -> object:
    """`json.loads`, with a ValueError of one short line for everything that it can meet, and where a number is no
    double's."""
    try:
        return json.loads(data, parse_int=whole)
    except (ValueError, RecursionError) as error:
        raise ValueError(shown(error, 100)) from error


def whole(digits: str) -> int:
    if fits(number := int(digits)):
        return number
    raise ValueError(f"a whole number of {len(digits)} digits")


def fits(value: object) -> bool:
    """Is it a number that a double can be? A whole number of Python has any length."""
    return isinstance(value, float) or isinstance(value, int) and abs(value) <= sys.float_info.max


def fingerprint(state: Mapping[str, Tensor], text: str = "") -> str:
    """A checksum of names, types and numbers, and of a text."""
    total = hashlib.sha256(text.encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()
