"""The run folder: what a training run leaves on disk, written so that a crash at any moment loses nothing.

    config.json         everything needed to rebuild the model: settings, class names, normalisation, commit, versions
    model.safetensors   the weights to evaluate (their moving average where --ema is on)
    best.safetensors    those of the epoch with the best held-out accuracy, where a part is held out
    metrics.jsonl       one line per epoch; the last and the best one have the fingerprint of the weights they measured
    curves.png          loss and accuracy
    log.txt             what was said
    state/state.pt      everything needed to continue: weights, optimizer, position, random state, history
    state/lock, owner   who trains it now

Each file is written beside its place, flushed to the disk and renamed, so it is whole or the old one. `state.pt` alone
decides where a resumed run continues; the other files follow from it.
"""

import json
import math
import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from empf.checks import check_device
from empf.files import fingerprint, fits, parse_json, read_json, write_atomic
from empf.machine import VERSION, git_commit, installed
from empf.model_config import ModelConfig, settings_of
from empf.models import SpikingNetwork, build
from empf.terminal import shown

FORMAT = 1
MEASURED = {"loss", "train_accuracy"}  # what an epoch has at least
MOST_PROCESSES = 10**6
WEIGHTS = ("model.safetensors", "best.safetensors")


def remove_leftovers(run: Path) -> None:
    """Delete the half-written files of a process that was killed while it saved."""
    for folder in (run, run / "state"):
        for temporary in folder.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Context in which no other process trains into this folder. Raises ValueError that says who does.

    The system frees the lock of a process that has died.
    """
    owner = run / "state" / "owner"
    lock = FileLock(run / "state" / "lock", timeout=0)
    try:
        owner.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        who = shown(owner.read_text(), 100) if owner.is_file() else "another process"
        raise ValueError(
            f"{run} is being trained by {who}: wait for its end, stop it, or choose another folder"
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks, or a full one
        pass
    try:
        with suppress(OSError):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def save_config(
    run: Path,
    model: ModelConfig,
    train: dict,
    classes: list[str],
    mean: tuple,
    std: tuple,
    **data: bool | int | str | None,
) -> None:
    """Write config.json. `data`: were images `resized` to the centre, how many `images` were there, and what was
    `tested_on`, where that was held out of the training set."""
    config = {
        "format": FORMAT,
        "model": model.to_dict(),
        "train": train,
        "seed": train["seed"],
        "classes": classes,
        "normalisation": {"mean": list(mean), "std": list(std)},
        "data": data,
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "empf": VERSION}
        | {name: installed(name) for name in ("triton", "accelerate", "datasets", "numpy")},
    }
    write_config(run, config)


def write_config(run: Path, config: dict) -> None:
    write_atomic(run / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def read_config(run: str | Path) -> dict:
    """config.json of a run folder. Raises FileNotFoundError or ValueError with one sentence."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is not a run folder, it has no config.json: give the folder that train.py wrote"
        )
    config = read_json(path)
    if not isinstance(config, dict) or "format" not in config:
        raise ValueError(f"{path} is damaged (it names no format): restore it from a copy of the run")
    if config["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {shown(config['format'], 20)}, this version reads format {FORMAT}: "
            "use the version that wrote it"
        )
    if not all(isinstance(config.get(part), dict) for part in ("model", "train")):
        raise ValueError(f"{path} is damaged (model and train must be objects): restore it from a copy of the run")
    norm = config.get("normalisation", {})
    numbers = [norm.get(name, []) for name in ("mean", "std")] if isinstance(norm, dict) else [None]
    sound = is_list(config.get("classes", []), str) and all(map(is_numbers, numbers))
    if not (sound and isinstance(config.get("data", {}), dict)):
        raise ValueError(f"{path} is damaged (classes or normalisation or data): restore it from a copy of the run")
    return config


def is_list(value: object, kind) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) for v in value)


def is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(fits(v) and math.isfinite(v) for v in value)


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of metrics.jsonl, one for each epoch; [] without a file. ValueError for a damaged one."""
    path, records = Path(run) / "metrics.jsonl", []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], 1):
        try:
            record = parse_json(line)
        except ValueError:
            record = None
        if not is_record(record):
            raise ValueError(f"{path}, line {number} is damaged: restore it from a copy of the run")
        records.append(record)
    return records


def is_record(record: object) -> bool:
    """Is it a line of metrics.jsonl?"""
    if not isinstance(record, dict) or not is_count(record.get("epoch"), 1):
        return False
    health, numbers = record.get("health", {}), [record.get("accuracy", [0.0]), record.get("held_out", [0.0])]
    return (
        all(is_numbers(values) and values for values in numbers)
        and all(fits(record.get(name, 0.0)) for name in ("loss", "train_accuracy", "test_loss"))
        and isinstance(record.get("weights", ""), str)
        and isinstance(health, dict) and is_list(health.get("warnings", []), str)
    )  # fmt: skip


def is_history(history: object) -> bool:
    """Are these the epochs of one training, which can be drawn?"""
    if not isinstance(history, list) or not all(is_record(r) and r.keys() >= MEASURED for r in history):
        return False
    watched = [record["health"] for record in history if "health" in record]
    layers = [health.get(name) for health in watched for name in ("density", "flips")]
    return (
        len({len(record["accuracy"]) for record in history if "accuracy" in record}) <= 1
        and all(isinstance(values, dict) and is_numbers([*values.values()]) for values in layers)
        and all("warnings" in health for health in watched)
    )


def save_state(run: Path, state: dict) -> None:
    """Write state/state.pt, the one file from which a run continues."""
    buffer = BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomic(run / "state" / "state.pt", buffer.getvalue())


def load_state(run: Path) -> dict:
    """Read state/state.pt; only tensors and plain values are unpickled. Raises with one sentence.

    Its parts are of their kinds: `at`, `history`, `processes`, `rng`, and dicts or None of `model` and all others.
    """
    path = Path(run) / "state" / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint in {run}, {path} is missing: start the run anew")
    try:
        with ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the checksums
        if broken is not None:
            raise BadZipFile(broken)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile meet damage in many ways
        raise damaged(run, type(error).__name__) from error
    if not isinstance(state, dict) or not is_count(state.get("format"), FORMAT, FORMAT):
        raise ValueError(f"{path} is not a checkpoint of this version (format {FORMAT}): use the version that wrote it")
    at, history = state.get("at"), state.get("history")
    fits = {
        "at": is_position(at),
        "history": is_history(history),
        "processes": is_count(state.get("processes"), 1, MOST_PROCESSES),
        "rng": unlike(state.get("rng"), torch.get_rng_state()) is None,
        "model": isinstance(model := state.get("model"), dict) and all(isinstance(t, Tensor) for t in model.values()),
        "optimizer": isinstance(state.get("optimizer"), dict),
        **{name: isinstance(state.get(name), dict | None) for name in ("average", "health", "flips")},
    }
    if wrong := [name for name, fit in fits.items() if not fit]:
        raise damaged(run, wrong[0])
    if len(history) != at["epoch"] or any(record["epoch"] != n for n, record in enumerate(history, 1)):
        raise damaged(run, "history")
    return state


def damaged(run: Path, what: str) -> ValueError:
    path = Path(run) / "state" / "state.pt"
    return ValueError(f"{path} is damaged ({shown(what, 100)}): restore it from a copy or start anew")


def is_count(value: object, least: int = 0, most: int = 2**63 - 1) -> bool:
    return type(value) is int and least <= value <= most


def is_position(at: object) -> bool:
    """Where a training stopped: batches and seconds of the epoch, its sums, the processes that began it."""
    return (
        isinstance(at, dict)
        and is_count(at.get("epoch"))
        and is_count(at.get("batch"))
        and is_count(at.get("begun_by", 1), 1, MOST_PROCESSES)
        and is_list(at.get("sums"), float) and len(at["sums"]) == 3 and all(map(math.isfinite, at["sums"]))
        and isinstance(at.get("seconds"), float) and 0 <= at["seconds"] < math.inf
    )  # fmt: skip


def unlike(found: object, wanted: object, where: str = "") -> str | None:
    """The first place at which two nested values differ in kind, keys, length, or the shape and type of a tensor.

    Or where a tensor of the first holds a number that is not finite.
    """
    kinds = [
        next((k for k in (bool, Tensor, dict, list, int | float) if isinstance(value, k)), type(value))
        for value in (found, wanted)
    ]
    if kinds[0] != kinds[1]:
        return where or "kind"
    if isinstance(wanted, Tensor):
        plain = found.layout == torch.strided and not found.is_meta
        same = plain and (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        return None if same and found.isfinite().all() else where or "shape"
    if isinstance(wanted, list):
        found, wanted = (dict(enumerate(value)) for value in (found, wanted))
    if not isinstance(wanted, dict):
        return None
    if found.keys() != wanted.keys():
        return f"{where} {min(map(str, found.keys() ^ wanted.keys()))}"
    places = (unlike(found[name], wanted[name], f"{where} {name}") for name in wanted)
    return next(filter(None, places), None)


def begun(run: Path) -> bool:
    """Whether a folder holds a run that has made an update, or that cannot be read."""
    if not (run / "config.json").exists():
        return False
    try:
        at = load_state(run)["at"]
    except (ValueError, OSError):
        return True
    return (at["epoch"], at["batch"]) != (0, 0)


def best_epoch(history: list[dict]) -> int | None:
    """The epoch with the highest held-out accuracy, the first of several; None where nothing was held out."""
    held = [record for record in history if "held_out" in record]
    return max(held, key=lambda record: record["held_out"][-1])["epoch"] if held else None


def identity(model: SpikingNetwork) -> str:
    """The fingerprint of a network's weights and settings: those that an accuracy was measured with."""
    return fingerprint(model.state_dict(), json.dumps(model.config.for_checksum(), sort_keys=True))


def save_results(run: Path, model: SpikingNetwork, history: list[dict]) -> None:
    """Write model.safetensors, best.safetensors after the best epoch, and metrics.jsonl, whose last line names the
    weights by their fingerprint."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    records = [*history[:-1], *(record | {"weights": identity(model)} for record in history[-1:])]
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    write_atomic(run / "model.safetensors", data)
    if best_epoch(history) == len(history):
        write_atomic(run / "best.safetensors", data)
    write_atomic(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())


def folder_of(path: str | Path) -> Path | None:
    """The run folder that a path names: itself, or that of its model.safetensors or best.safetensors; else None."""
    path = Path(path)
    if path.is_file() and path.name in WEIGHTS and (path.parent / "config.json").is_file():
        return path.parent
    return None if path.is_file() else path


def load(run: str | Path, device: str | torch.device = "cpu") -> SpikingNetwork:
    """Rebuild the trained model of a run folder, or of its best.safetensors, in eval mode.

    Raises FileNotFoundError or ValueError with one sentence if the folder is incomplete, damaged or belongs to another
    architecture than its config.json says; nothing is built before that is known.

    >>> empf.resnet18(in_channels=1, image_size=8, width=0.125).save_pretrained("folder")
    >>> net = empf.load("folder")
    """
    check_device(device)
    path = Path(run) if Path(run).is_file() else Path(run) / "model.safetensors"
    config = settings_of(ModelConfig, read_config(path.parent)["model"], path.parent)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train for at least one epoch, or give another run folder")
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        check_fits(config, shapes, path)
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({shown(error, 100)}): restore it from a copy of the run") from error
    model = build(config)
    if (place := unlike(tensors, model.state_dict())) is not None:
        raise ValueError(
            f"{path} is damaged ({place.strip()} holds numbers of another type, or not finite): restore it from a copy "
            "of the run"
        )
    model.load_state_dict(tensors)
    model.run = path.parent
    return model.eval().to(device)


def check_fits(config: ModelConfig, found: dict[str, tuple[int, ...]], source: Path) -> None:
    """Raise a ValueError that names the first difference unless tensors of these shapes are those of the network."""
    with torch.device("meta"):  # shapes without memory
        wanted = {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()}
    for name in sorted(wanted.keys() | found.keys()):
        here, there = wanted.get(name), found.get(name)
        if here != there:
            what = "is missing in it" if there is None else "is not part of the model" if here is None else "differs"
            shapes = "" if here is None or there is None else f" (model {here}, file {there})"
            raise ValueError(
                f"{source} belongs to another architecture than the configured {config.arch}: {shown(name, 100)} {what}"
                f"{shown(shapes, 200)}; give the run folder it was written to"
            )


def new_folder(base: Path) -> Path:
    """Make the first of base, base-2, base-3, ... that does not exist; runs that start together get different ones."""
    for n in count(1):
        folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
