"""The Hugging Face Hub: save_pretrained, push_to_hub and from_pretrained, of networks and of packed networks.

    model folder    config.json, model.safetensors, metrics.jsonl (empty where no run is known), README.md
    packed folder   packed.safetensors, config.json (to be read by people), README.md

A model folder can be evaluated and packed like a run folder. The model card says what the run itself recorded and
nothing else, and no accuracy once the weights are no longer those of the run. The networks know nothing of the Hub:
this module lends them its functions as methods.
"""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import huggingface_hub as hf  # its parts are imported when they are named
import safetensors.torch
import torch

from empf.accounting import account
from empf.data.rows import one_line
from empf.data.sets import DATASETS
from empf.deploy.origin import Origin, measurement
from empf.deploy.pack import PackedModel, load_packed
from empf.files import write_atomic
from empf.models import SpikingNetwork, build
from empf.runs import FORMAT, folder_of, load

PAPER = "https://arxiv.org/abs/2410.07547"
PACKED_FILE = "packed.safetensors"
NETWORKS = Path(__file__).parents[1] / "networks"  # a packed folder each, with its model card


def save_pretrained(net: SpikingNetwork | PackedModel, folder: str | Path) -> None:
    """Write the folder of a network, with its model card; an own README.md that is there stays.

    A network that was changed since its run is saved without metrics. Raises ValueError for the run folder itself,
    whose config.json would be lost, OSError where the disk refuses.
    """
    folder = Path(folder)
    for name, content in (packed_folder if isinstance(net, PackedModel) else model_folder)(net, folder).items():
        write_atomic(folder / name, content)
    if not (folder / "README.md").exists():
        write_atomic(folder / "README.md", str(model_card(net)).encode())


def model_folder(model: SpikingNetwork, folder: Path) -> dict[str, bytes]:
    run = getattr(model, "run", None)
    config = {"format": FORMAT, "model": model.config.to_dict(), "train": {}}
    files = {"config.json": as_json(config), "metrics.jsonl": b""}
    if run is not None:
        if folder.resolve() == Path(run).resolve():
            raise ValueError(f"{folder} is the run that the model was read from: choose another folder")
        files["config.json"] = (Path(run) / "config.json").read_bytes()
        if measurement(model) is not None:
            with suppress(FileNotFoundError):
                files["metrics.jsonl"] = (Path(run) / "metrics.jsonl").read_bytes()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    return files | {"model.safetensors": safetensors.torch.save(tensors, metadata={"format": "pt"})}


def packed_folder(packed: PackedModel, folder: Path) -> dict[str, bytes]:
    about = {"packed": packed.config.to_dict(), "origin": asdict(packed.stated_origin())}
    return {PACKED_FILE: packed.to_bytes(), "config.json": as_json(about)}


def as_json(value: dict) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def push_to_hub(
    net: SpikingNetwork | PackedModel,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    branch: str | None = None,
    message: str = "Add a network of empf",
) -> str:
    """Upload what `save_pretrained` writes to a repository of the Hub, which is made if need be; returns the commit."""
    api = hf.HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save_pretrained(net, folder)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, revision=branch))


def from_pretrained(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    force_download: bool = False,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> SpikingNetwork | PackedModel:
    """The network of a folder that `save_pretrained` or training wrote, of a file of weights in it, of a packed file,
    of one of the networks that come with the library, or of a repository on the Hub (there as huggingface_hub).

    Raises FileNotFoundError or ValueError with one sentence where the folder holds none, or a damaged one.

    >>> empf.resnet18(in_channels=1, image_size=8, width=0.125).save_pretrained("folder")
    >>> net = empf.from_pretrained("folder")
    >>> net = empf.from_pretrained("digits-resnet18")
    """
    folder = shipped(name)
    if folder.is_file():
        return load_packed(folder, device) if folder_of(folder) is None else load(folder, device)
    if not folder.is_dir():
        options = dict(
            revision=revision, cache_dir=cache_dir, force_download=force_download, token=token,
            local_files_only=local_files_only,
        )  # fmt: skip
        folder = download(str(name), options)
    packed = folder / PACKED_FILE
    return load_packed(packed, device) if packed.is_file() else load(folder, device)


def shipped(name: str | Path) -> Path:
    """The packed file of the network of that name which comes with the library; any other path as it is.

    What lies there under the same name goes first.
    """
    file = NETWORKS / Path(name).name / PACKED_FILE
    return file if str(name) == Path(name).name and not Path(name).exists() and file.is_file() else Path(name)


def download(repo_id: str, options: dict) -> Path:
    """The folder with the files of a repository: those of a packed network, where it has them."""
    from huggingface_hub.errors import EntryNotFoundError  # only a part that was imported before can be named

    try:
        with suppress(EntryNotFoundError):
            return Path(hf.hf_hub_download(repo_id, PACKED_FILE, **options)).parent
        for name in ("config.json", "model.safetensors"):
            folder = Path(hf.hf_hub_download(repo_id, name, **options)).parent
        with suppress(EntryNotFoundError):
            hf.hf_hub_download(repo_id, "metrics.jsonl", **options)
    except (OSError, ValueError, EntryNotFoundError) as error:
        known = ", ".join(sorted(folder.name for folder in NETWORKS.iterdir()))
        raise FileNotFoundError(
            f"there is no folder or file {repo_id}, and the Hub gives no such network ({one_line(error)}): check the "
            f"name; {known} come with the library"
        ) from error
    return folder


def model_card(net: SpikingNetwork | PackedModel) -> "hf.ModelCard":
    """README.md of a network: what it is, what its run measured, how to load it."""
    origin = net.stated_origin() if isinstance(net, PackedModel) else Origin.of(net)
    c = net.config
    size = account(build(c))
    spikes = "floating-point spikes" if c.spike_bits is None else f"{c.spike_bits}-bit spikes"
    spikes = "binary spikes" if c.neuron == "lif" else spikes
    tested = "held-out" if origin.tested_on else "test"
    title = f"{c.arch}" + (f" on {origin.dataset}" if origin.dataset else "")
    rows = [
        ("network", f"{c.arch}, width x {c.width:g}, {c.in_channels}x{'x'.join(map(str, c.size))} input"),
        ("synapses", c.weights),
        ("neurons", f"{c.neuron}, {c.parallel:.0%} parallel, {spikes}, T = {c.T}"),
        ("channel attention", "none" if c.seca == 0 else f"SECA-{'I' * c.seca}"),
        ("parameters", f"{size['params_mb']:.2f} MB ({size['params_full_mb']:.2f} MB in full precision)"),
        ("parameters as the authors count", f"{size['params_authors_mb']:.2f} MB (2 bits if binary, 3 if ternary)"),
        ("neuron operations per image", f"{size['nops'] / 1e6:.2f} M"),
        *((f"{tested} accuracy after step {t}", f"{a:.2f} %") for t, a in enumerate(origin.accuracy, 1)),
        *([("held-out images", origin.tested_on)] if origin.tested_on else []),
        *([("split of the recordings", origin.split)] if origin.split else []),
    ]
    data = hf.ModelCardData(
        library_name="empf", pipeline_tag="image-classification",
        tags=["spiking-neural-network", "online-learning", "quantized"],
    )  # fmt: skip
    spec = DATASETS.get(origin.dataset)
    if spec is not None and spec.hub_id is not None:
        data.datasets = [spec.hub_id]
    if origin.accuracy:
        data.model_name = title
        data.eval_results = [
            hf.EvalResult(
                "image-classification", origin.dataset, origin.dataset, "accuracy", round(origin.accuracy[-1], 4),
                dataset_split=origin.tested_on or "test",
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
        "```python\nimport empf\n\nmodel = empf.from_pretrained(NAME)\n"
        f"logits = model({x})  # {shape} -> [T,N,classes]\n```",
    ]
    if events:
        lines.append("A frame holds the mean counts of darker and brighter events per pixel, float32, not normalised.")
    elif origin.mean:
        lines.append(
            f"Pixels are scaled to 0..1, then normalised with mean {list(origin.mean)}, std {list(origin.std)}."
        )
    return hf.ModelCard("\n\n".join(lines) + "\n")


def _from_pretrained(cls, name: str | Path, **options) -> SpikingNetwork | PackedModel:
    net = from_pretrained(name, **options)
    if not isinstance(net, cls):
        kind = "packed" if isinstance(net, PackedModel) else "not packed"
        raise ValueError(f"{name} holds a {type(net).__name__}, which is {kind}: call empf.from_pretrained")
    return net


_from_pretrained.__doc__ = from_pretrained.__doc__
for _network in (SpikingNetwork, PackedModel):
    _network.save_pretrained, _network.push_to_hub = save_pretrained, push_to_hub
    _network.from_pretrained = classmethod(_from_pretrained)
