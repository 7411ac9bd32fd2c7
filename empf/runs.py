"""The run folder: what a training run leaves on disk, written so that a crash at any moment loses nothing.

    config.json         everything needed to rebuild the model: settings, class names, normalisation, commit, versions
    model.safetensors   the weights to evaluate (their moving average where --ema is on)
    metrics.jsonl       one line per epoch
    curves.png          loss and accuracy
    state/state.pt      everything needed to continue: weights, optimizer, position, random state, history

Each file is written beside its place, flushed to the disk and renamed, so it is whole or the old one. `state.pt` alone
decides where a resumed run continues; the other files follow from it.
"""

import json
import pickle
import platform
from contextlib import suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from zipfile import BadZipFile, ZipFile

import safetensors.torch
import torch
from safetensors import SafetensorError

from empf.files import write_atomic
from empf.machine import VERSION, git_commit, installed
from empf.models import ModelConfig, SpikingNetwork, build

if TYPE_CHECKING:
    from empf.training.config import TrainConfig

FORMAT = 1
Settings = TypeVar("Settings")  # ModelConfig or TrainConfig


def remove_leftovers(run: Path) -> None:
    """Delete the half-written files of a process that was killed while it saved."""
    for folder in (run, run / "state"):
        for temporary in folder.glob(".*.tmp"):
            temporary.unlink(missing_ok=True)


def save_config(run: Path, model: ModelConfig, train: dict, classes: list[str], mean: tuple, std: tuple) -> None:
    """Write config.json."""
    config = {
        "format": FORMAT,
        "model": model.to_dict(),
        "train": train,
        "seed": train["seed"],
        "classes": classes,
        "normalisation": {"mean": list(mean), "std": list(std)},
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "empf": VERSION}
        | {name: installed(name) for name in ("torch", "triton", "accelerate", "datasets", "numpy")},
    }
    write_atomic(run / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def read_config(run: str | Path) -> dict:
    """config.json of a run folder. Raises FileNotFoundError or ValueError with one sentence."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is not a run folder, it has no config.json: give the folder that train.py wrote"
        )
    try:
        config = json.loads(path.read_text())
        found, parts = config["format"], (config["model"], config["train"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): restore it from a copy of the run") from error
    if found != FORMAT:
        raise ValueError(
            f"{path} has format {found}, this version reads format {FORMAT}: use the version that wrote it"
        )
    if not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is damaged (model and train must be objects): restore it from a copy of the run")
    return config


def settings_of(kind: type[Settings], values: dict, run: str | Path) -> Settings:
    """`kind.from_dict(values)`, values being a part of config.json; what does not fit is one sentence."""
    try:
        return kind.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{Path(run) / 'config.json'}: {error}; use the version that wrote it") from error


def training_of(config: dict, run: str | Path) -> "TrainConfig":
    """The settings of the training that the config.json of a run folder names.

    Raises ValueError with one sentence for a setting that is not known, and where there are none: in a model's folder
    of the Hub, if no run was known.
    """
    from empf.training.config import TrainConfig  # it imports the data sets, which are cached by means of this module

    if not {"dataset", "seed"} <= config["train"].keys():
        raise ValueError(f"{run} does not say on which data it was trained: give a run folder that train.py wrote")
    return settings_of(TrainConfig, config["train"], run)


def save_state(run: Path, state: dict) -> None:
    """Write state/state.pt, the one file from which a run continues."""
    buffer = BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    write_atomic(run / "state" / "state.pt", buffer.getvalue())


def load_state(run: Path) -> dict:
    """Read state/state.pt; only tensors and plain values are unpickled. Raises with one sentence."""
    path = Path(run) / "state" / "state.pt"
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint in {run}, {path} is missing: start the run anew")
    try:
        with ZipFile(path) as archive:
            broken = archive.testzip()  # torch.load does not look at the checksums
        if broken is not None:
            raise BadZipFile(broken)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}): restore it from a copy or start anew") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version (format {FORMAT}): use the version that wrote it")
    return state


def save_results(run: Path, model: SpikingNetwork, history: list[dict], title: str, draw: bool = True) -> None:
    """Write model.safetensors, metrics.jsonl and, to `draw` and where matplotlib is installed, curves.png."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(run / "model.safetensors", safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomic(run / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history).encode())
    if draw and has_matplotlib():
        from empf.training.curves import plot_curves  # it needs this module

        plot_curves(run, history, title)


def load(run: str | Path, device: str | torch.device = "cpu") -> SpikingNetwork:
    """Rebuild the trained model of a run folder, in eval mode.

    Raises FileNotFoundError or ValueError with one sentence if the folder is incomplete, damaged or belongs to another
    architecture than its config.json says.
    """
    path = Path(run) / "model.safetensors"
    model = build(settings_of(ModelConfig, read_config(run)["model"], run))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train for at least one epoch, or give another run folder")
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it from a copy of the run") from error
    check_fits(model, tensors, path)
    model.load_state_dict(tensors)
    model.run = Path(run)
    return model.eval().to(device)


def check_fits(model: SpikingNetwork, tensors: dict, source: Path) -> None:
    """Raise a ValueError that names the first difference unless the state dict fits the model exactly."""
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        here, there = (tuple(d[name].shape) if name in d else None for d in (wanted, tensors))
        if here != there:
            what = "is missing in it" if there is None else "is not part of the model" if here is None else "differs"
            shapes = f" (model {here}, file {there})" if here and there else ""
            raise ValueError(
                f"{source} belongs to another architecture than the configured {model.config.arch}: {name} {what}"
                f"{shapes}; give the run folder it was written to"
            )


def new_folder(base: Path) -> Path:
    """Make the first of base, base-2, base-3, ... that does not exist; runs that start together get different ones."""
    for n in count(1):
        folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def has_matplotlib() -> bool:
    return installed("matplotlib") is not None
