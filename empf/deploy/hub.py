"""The Hugging Face Hub: `from_pretrained`, `save_pretrained` and `push_to_hub` of models and packed models.

    model folder    config.json, model.safetensors, metrics.jsonl (empty where no run is known), README.md
    packed folder   packed.safetensors, config.json (to be read by people), README.md

A model folder can be evaluated and packed like a run folder. The model card says what the run itself recorded and
nothing else, and no accuracy once the weights are no longer those of the run.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import Tensor

PAPER = "https://arxiv.org/abs/2410.07547"
PACKED_FILE = "packed.safetensors"


@dataclass(frozen=True)
class Origin:
    """Where the weights of a network come from; empty where it is not known.

    `dataset`: its name; `classes`: class names by label; `mean`, `std`: normalisation per channel of pixels in 0..1;
    `accuracy`: % of the test set after each time step, last epoch; `epochs`: how many were trained; `split`: which
    recordings of an event set were for testing; `frames_by`, `orientation`, `resize`: how they became frames.
    """

    dataset: str | None = None
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    accuracy: tuple[float, ...] = ()
    epochs: int | None = None
    split: str | None = None
    frames_by: str | None = None
    orientation: str | None = None
    resize: str | None = None

    @classmethod
    def from_dict(cls, values: dict) -> "Origin":
        """Build from JSON. Raises TypeError or ValueError where a field is unknown or not of its kind."""
        lists = {"classes": str, "mean": float, "std": float, "accuracy": float}
        made = {k: tuple(kind(v) for v in values[k]) for k, kind in lists.items() if k in values}
        for name, value in values.items():
            kind = int if name == "epochs" else str
            if name not in lists and not isinstance(value, kind | None):
                raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
        return cls(**{**values, **made})

    def frames(self) -> dict[str, str]:
        """How recordings became frames, where it is known; keywords of `empf.events.event_frames_of_file`."""
        known = dict(by=self.frames_by, orientation=self.orientation, resize=self.resize)
        return {name: value for name, value in known.items() if value is not None}

    def without_results(self) -> "Origin":
        """For weights that are not those that the run measured."""
        return replace(self, accuracy=(), epochs=None)

    @classmethod
    def of(cls, model) -> "Origin":
        """Of a model that `empf.load` read from a run folder, which it names as `model.run`.

        A model that was changed since has no results. Raises ValueError with one sentence if the folder is damaged.
        """
        from empf.runs import read_config  # it imports the networks, which are built on this module

        run = getattr(model, "run", None)
        if run is None:
            return cls()
        config, metrics = read_config(run), Path(run) / "metrics.jsonl"
        norm = config.get("normalisation", {})
        try:
            lines = metrics.read_text().splitlines() if metrics.is_file() else []
            last = json.loads(lines[-1]) if lines else {}
            train = config["train"]
            recordings = ("split", "frames_by", "orientation", "resize")
            events = {name: train.get(name) for name in recordings if train.get("dataset") == "dvs-cifar10"}
            origin = cls.from_dict(
                {
                    **events,
                    "dataset": train.get("dataset"),
                    "classes": config.get("classes", []),
                    "mean": norm.get("mean", []),
                    "std": norm.get("std", []),
                    "accuracy": last.get("accuracy", []),
                    "epochs": last.get("epoch"),
                }
            )
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{run} is damaged ({error}): restore it from a copy of the run") from error
        return origin if unchanged(model) else origin.without_results()


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """A checksum of names, types and numbers."""
    total = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def unchanged(model) -> bool:
    """Whether the weights of a model are still those of its run folder."""
    weights = Path(model.run) / "model.safetensors"
    return weights.is_file() and fingerprint(safetensors.torch.load_file(weights)) == fingerprint(model.state_dict())


class HubModel(
    ModelHubMixin,
    library_name="empf",
    pipeline_tag="image-classification",
    paper_url=PAPER,
    tags=["spiking-neural-network", "online-learning", "quantized"],
):
    """Hub methods of a network; `run` is the folder it was read from, with its configuration and metrics.

    A model that was changed since is saved with an empty metrics.jsonl.
    """

    run: Path | None = None

    def save_pretrained(self, save_directory: str | Path, **options) -> str | None:
        """As in huggingface_hub. Raises ValueError for the run folder itself, whose config.json would be lost."""
        if self.run is not None and Path(save_directory).resolve() == Path(self.run).resolve():
            raise ValueError(f"{save_directory} is the run that the model was read from: choose another folder")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        from empf.files import write_atomic
        from empf.runs import FORMAT

        config = {"format": FORMAT, "model": self.config.to_dict(), "train": {}}
        files = {"config.json": (json.dumps(config, indent=1) + "\n").encode(), "metrics.jsonl": b""}
        if self.run is not None:
            files["config.json"] = (Path(self.run) / "config.json").read_bytes()
            if unchanged(self):
                with suppress(FileNotFoundError):
                    files["metrics.jsonl"] = (Path(self.run) / "metrics.jsonl").read_bytes()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        files["model.safetensors"] = safetensors.torch.save(tensors, metadata={"format": "pt"})
        for name, content in files.items():
            write_atomic(save_directory / name, content)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str = "cpu", **options) -> "HubModel":
        from empf.runs import load

        folder = download(model_id, ["config.json", "model.safetensors"], ["metrics.jsonl"], options)
        return load(folder, device)

    def generate_model_card(self) -> ModelCard:
        return model_card(self, Origin.of(self), "model = empf.SpikingNetwork.from_pretrained(NAME)")


class HubPacked(HubModel):
    """Hub methods of a packed network: the one file."""

    def _save_pretrained(self, save_directory: Path) -> None:
        from empf.files import write_atomic

        self.save(save_directory / PACKED_FILE)
        about = {"packed": self.config.to_dict(), "origin": asdict(self.stated_origin())}
        write_atomic(save_directory / "config.json", (json.dumps(about, indent=1) + "\n").encode())

    @classmethod
    def _from_pretrained(cls, *, model_id: str, device: str = "cpu", **options) -> "HubPacked":
        from empf.deploy.pack import load_packed

        return load_packed(download(model_id, [PACKED_FILE], [], options) / PACKED_FILE, device)

    def generate_model_card(self) -> ModelCard:
        return model_card(self, self.stated_origin(), "model = empf.PackedModel.from_pretrained(NAME)")


def download(model_id: str, needed: list[str], optional: list[str], options: dict) -> Path:
    """The folder with these files: `model_id` itself if it is one, else the copy of the Hub's repository."""
    if Path(model_id).is_dir():
        return Path(model_id)
    known = ("revision", "cache_dir", "force_download", "token", "local_files_only")
    options = {name: options[name] for name in known if name in options}
    folder = [Path(hf_hub_download(model_id, name, **options)).parent for name in needed][0]
    for name in optional:
        with suppress(EntryNotFoundError):
            hf_hub_download(model_id, name, **options)
    return folder


def model_card(model, origin: Origin, load: str) -> ModelCard:
    """README.md of a network: what it is, what its run measured, how to load it."""
    from empf.accounting import account
    from empf.data.sets import DATASETS
    from empf.models import build

    c = model.config
    size = account(build(c))
    spikes = "floating-point spikes" if c.spike_bits is None else f"{c.spike_bits}-bit spikes"
    spikes = "binary spikes" if c.neuron == "lif" else spikes
    title = f"{c.arch}" + (f" on {origin.dataset}" if origin.dataset else "")
    rows = [
        ("network", f"{c.arch}, width x {c.width:g}, {c.in_channels}x{c.image_size}x{c.image_size} input"),
        ("synapses", c.weights),
        ("neurons", f"{c.neuron}, {c.parallel:.0%} parallel, {spikes}, T = {c.T}"),
        ("channel attention", "none" if c.seca == 0 else f"SECA-{'I' * c.seca}"),
        ("parameters", f"{size['params_mb']:.2f} MB ({size['params_full_mb']:.2f} MB in full precision)"),
        ("neuron operations per image", f"{size['nops'] / 1e6:.2f} M"),
        *((f"test accuracy after step {t}", f"{a:.2f} %") for t, a in enumerate(origin.accuracy, 1)),
        *([("split of the recordings", origin.split)] if origin.split else []),
    ]
    data = ModelCardData(**model._hub_mixin_info.model_card_data.to_dict())
    spec = DATASETS.get(origin.dataset)
    if spec is not None and spec.hub_id is not None:
        data.datasets = [spec.hub_id]
    if origin.accuracy:
        data.model_name = title
        data.eval_results = [
            EvalResult(
                "image-classification", origin.dataset, origin.dataset, "accuracy", round(origin.accuracy[-1], 4),
                dataset_split="test",
            )
        ]  # fmt: skip
    events = c.in_channels == 2
    x, shape = ("events", "[T,N,2,H,W]") if events else ("images", f"[N,{c.in_channels},H,W]")
    trained = f" Trained for {origin.epochs} epochs on {origin.dataset}." if origin.epochs else ""
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"A spiking neural network with low-bit synapses ([arXiv 2410.07547]({PAPER})).{trained}",
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in rows),
        f"```python\nimport empf\n\n{load}\nlogits = model({x})  # {shape} -> [T,N,classes]\n```",
    ]
    if events:
        lines.append("A frame holds the mean counts of darker and brighter events per pixel, float32, not normalised.")
    elif origin.mean:
        lines.append(
            f"Pixels are scaled to 0..1, then normalised with mean {list(origin.mean)}, std {list(origin.std)}."
        )
    return ModelCard("\n\n".join(lines) + "\n")
