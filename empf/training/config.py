"""One frozen dataclass is the configuration of a training run, its command line and its metadata in the checkpoint."""

import argparse
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NoReturn

import yaml  # comes with accelerate

from empf.data.aedat import ORIENTATIONS
from empf.data.auto_augment import POLICIES
from empf.data.batches import Augment
from empf.data.event_frames import BINS, RESIZES, SPLITS, EventSettings
from empf.data.recordings import has_recordings
from empf.data.sets import DATASETS, DataSpec, ImageSettings, parsed
from empf.files import read_json
from empf.kernels.neuron import ACTIVATIONS, SPIKE_GRADIENTS
from empf.model_config import (
    ARCHS,
    GRANULARITIES,
    NEURONS,
    SHORTCUTS,
    WEIGHTS,
    ModelConfig,
    check_types,
    field_types,
    settings_of,
)
from empf.online import LEARNING
from empf.terminal import shown
from empf.training.growth import stages
from empf.training.recipes import NAMED, begun_with, in_recipes

OPTIMIZERS = ("sgd", "muon", "flip")
SCHEDULES = ("cosine", "constant")
LATENT, STEM = ("kaiming", "positive"), ("uniform", "normal")
COMPRESSIONS = ("none", "bf16", "powersgd")

# The groups of --help, by their first field.
GROUPS = {
    "dataset": "data", "arch": "network", "learning": "online learning", "epochs": "optimisation",
    "crop": "augmentation", "seed": "run",
}  # fmt: skip
LAUNCHED_WITH = {  # settings that accelerate launch passes on: its flag, and the value that says nothing
    "mixed_precision": ("mixed_precision", "no"),
    "accumulate": ("gradient_accumulation_steps", "1"),
}
SETTINGS = (".yaml", ".yml", ".json")  # ends of the names of files of settings


def setting(default, help: str, choices: tuple | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Every field is a flag of train.py, with dashes: `label_smoothing` is `--label-smoothing`."""

    dataset: str = setting("digits", f"{', '.join(DATASETS)}, a FOLDER of your own, or OWNER/NAME of the Hub")
    data: str | None = setting(None, "local folder of the data set instead of the Hugging Face Hub")
    image_size: str | None = setting(None, "side, or HEIGHTxWIDTH; images of other sizes are cropped and resized to it")
    image_column: str | None = setting(None, "of a table, where it has another name than img or image")
    label_column: str | None = setting(None, "of a table, where it has another name than label, fine_label, ...")
    train_split: str | None = setting(None, "name of the split to train on, where it is not train")
    test_split: str | None = setting(None, "name of the split to test on; default: test, validation, valid or val")
    config: str | None = setting(
        None, "which of several configurations of a data set; what ends in .yaml, .yml or .json is a file of settings"
    )
    recipe: str = setting(
        "default", "what flags change: settings that suit the data set; authors: theirs for CIFAR, as far as known",
        ("default", *NAMED),
    )  # fmt: skip
    hold_out: float | None = setting(
        None, "share of the training images kept apart to choose the best epoch; without a test split 0.1, tested on"
    )
    streaming: bool = setting(False, "read images while training; from the Hub: without a download before")
    workers: int = setting(0, "processes that read and decode what does not fit in memory; 0: training itself does")
    split: str = setting("first900", "which recordings of dvs-cifar10 are for testing", tuple(SPLITS))
    frames_by: str = setting("count", "what the T frames of a recording share equally: its events or its time", BINS)
    orientation: str = setting("transposed", "how x and y of AEDAT 2.0 recordings are read", tuple(ORIENTATIONS))
    resize: str = setting("area", "of event frames; 8bit: with the flaws of the literature, to compare", RESIZES)
    limit: int | None = setting(None, "use only the first so many training and test images")
    arch: str = setting("resnet18", "network", ARCHS)
    width: float = setting(1.0, "multiplier of all channel counts")
    T: int = setting(4, "time steps")
    weights: str = setting("binary", "synapses", WEIGHTS)
    neuron: str = setting("empf", "neuron: vanilla EM-PF, with Mem-BN, or the LIF baseline", NEURONS)
    parallel: float = setting(0.0, "share of parallel neurons, 0..1")
    seca: int = setting(0, "channel attention", (0, 1, 2))
    spike_bits: int | None = setting(None, "n-bit spikes, 1..8; without it spikes are floating point")
    spike_gradient: str = setting(
        "identity", "of n-bit spikes above the largest code: passed on (identity: the paper) or 0 (clipped: better)",
        SPIKE_GRADIENTS,
    )  # fmt: skip
    activation: str = setting("relu", "what makes a spike of mh - threshold", tuple(ACTIVATIONS))
    threshold: float = setting(0.5, "firing threshold of every neuron before training, within (0, 1)")
    per_channel: bool = setting(False, "leak, threshold, alpha and beta for each channel, not for each layer")
    shortcut: str = setting(
        "spikes", "what the 1x1 convolution of a shortcut reads: spikes, or the input current of its block", SHORTCUTS
    )
    granularity: str = setting(
        "channel", "scale and threshold of ternary synapses: one for each output channel, or layer", GRANULARITIES
    )
    seca_bias: bool = setting(False, "the convolution of the channel attention has a bias")
    latent_init: str = setting(
        "kaiming", "latent weights before training: Kaiming uniform; positive: uniform in 0..0.001", LATENT
    )
    stem_init: str = setting(
        "uniform",
        "weights of the stem before training: Kaiming uniform; normal: Kaiming normal, over the fan-out",
        STEM,
    )
    init_from: str | None = setting(None, "run folder, weights or packed file, or OWNER/NAME of the Hub to start from")
    freeze: str | None = setting(None, "parameters that stay as they are: patterns of names, e.g. 'stem*,blocks.0.*'")
    learning: str = setting("random", "which steps are back-propagated", LEARNING)
    steps_per_batch: int = setting(1, "time steps drawn per batch with --learning random")
    grow: str | None = setting(
        None, "begin with small images and few time steps: side:T:share of the epochs, such as 16:1:0.5,24:2:0.3"
    )
    epochs: int = setting(300, "passes over the training set")
    test_every: int = setting(1, "epochs from one test to the next; the last one is always tested")
    patience: int | None = setting(None, "stop after so many epochs without a better held-out accuracy")
    batch_size: int = setting(64, "images per batch and process")
    optimizer: str = setting(
        "sgd", "SGD with Nesterov momentum 0.9; muon: hidden synapses orthogonal; flip: they are bits alone", OPTIMIZERS
    )
    lr: float = setting(0.01, "peak learning rate")
    weight_decay: float = setting(5e-4, "on the weights of convolutions and linear layers")
    decay_all: bool = setting(False, "weight decay on all parameters, also of norms, neurons and channel attention")
    warmup_epochs: float = setting(5.0, "epochs of linear warm-up from 0.01 lr, at most a tenth of all")
    schedule: str = setting("cosine", "of the learning rate after warm-up: to 0 in all epochs, or constant", SCHEDULES)
    flip_rate: float = setting(
        0.03, "with --optimizer flip: share of a gradient in the momentum, 0..1 (for thousands of updates 0.005)"
    )
    flip_threshold: float = setting(
        0.05, "the same: momentum that flips a weight, in root mean squares of the gradient (with 0.005: 0.03)"
    )
    flip_adaptive: bool = setting(True, "the same: this mean is a running one, not that of the first update")
    flip_bits: int = setting(8, "the same: bits of the momentum of a weight", (8, 16))
    accumulate: int = setting(1, "batches per update of the weights")
    ema: float = setting(0.0, "decay of the moving average of the weights that is evaluated and saved; 0 is off")
    crop: bool = setting(True, "random crop after zero padding")
    flip: bool = setting(True, "random horizontal flip")
    roll: int = setting(0, "events only: pixels of a random shift, what leaves on one side comes back; 0 is off")
    rotate: float = setting(0.0, "events only: degrees of a random turn; 0 is off")
    shear: float = setting(0.0, "events only: share of the side of a random slant; 0 is off")
    drop: float = setting(0.0, "events only: probability with which a frame is emptied; 0 is off")
    auto_augment: str = setting("none", "policy of colours and shapes, e.g. TrivialAugment", POLICIES)
    erasing: float = setting(0.0, "share of the images of which a random rectangle is erased; 0 is off")
    cutout: int = setting(0, "side of the square cut out, in pixels; 0 is off")
    mixup: float = setting(0.8, "alpha of mixup; 0 is off")
    cutmix: float = setting(1.0, "alpha of cutmix; 0 is off; with mixup, one of the two per batch")
    label_smoothing: float = setting(0.1, "share of the label spread over all classes")
    seed: int = setting(0, "of the initial weights, the data order, the augmentation and the drawn steps")
    sync_bn: bool = setting(False, "batch norms share their statistics between processes")
    grad_compression: str = setting(
        "none", "of the gradients that processes exchange; powersgd is not exact after --resume", COMPRESSIONS
    )
    health: bool = setting(True, "look at a few batches per epoch and warn of layers that cannot learn")
    mixed_precision: str = setting("no", "arithmetic of the activations", ("no", "bf16"))
    cuda_graphs: bool = setting(False, "record the kernels of an update once and replay them; one GPU, less Python")
    threads: int = setting(0, "CPU threads per process; 0: the cores divided by the processes")
    output_dir: str | None = setting(None, "run folder; default: the first free runs/DATASET-ARCH[-N]")
    save_minutes: float = setting(10.0, "also save within an epoch after so many minutes")
    max_steps: int | None = setting(None, "save and stop after so many updates of this call; --resume continues")
    tracker: str | None = setting(None, "also log to trackers of Accelerate, e.g. tensorboard or tensorboard,wandb")

    def __post_init__(self):
        check_types(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata["choices"] and value not in f.metadata["choices"]:
                raise ValueError(f"{f.name} must be one of {', '.join(map(str, f.metadata['choices']))}, got {value!r}")
        at_least = dict(
            T=1, steps_per_batch=1, epochs=1, test_every=1, batch_size=1, accumulate=1, limit=1, max_steps=1, patience=1
        )
        at_least |= dict.fromkeys(
            (
                "seed", "threads", "workers", "weight_decay", "warmup_epochs", "roll", "cutout", "mixup", "cutmix",
                "save_minutes",
            ),
            0,
        )  # fmt: skip
        at_most = dict(epochs=10**6, batch_size=10**6, lr=1e30, weight_decay=1e30, roll=4096, cutout=4096)
        at_most |= dict(mixup=1e3, cutmix=1e3, warmup_epochs=10**6)
        for word, bounds in (("least", at_least), ("most", at_most)):
            for name, bound in bounds.items():
                value = getattr(self, name)
                if value is not None and (value < bound if word == "least" else value > bound):
                    raise ValueError(f"{name} must be at {word} {bound}, got {value}")
        for name, value in asdict(self).items():
            if value == "":
                raise ValueError(f"{name} must not be empty: leave --{name.replace('_', '-')} out")
            if type(value) is int and value >= 2**63:
                raise ValueError(f"{name} must be below 2^63, got {shown(value, 40)}")
        if not (self.lr > 0 and 0 <= self.label_smoothing < 1 and 0 <= self.ema < 1):
            raise ValueError(
                "lr must be positive, label_smoothing and ema in [0, 1), "
                f"got {self.lr}, {self.label_smoothing} and {self.ema}"
            )
        if self.steps_per_batch > self.T:
            raise ValueError(f"steps_per_batch = {self.steps_per_batch} is more than T = {self.T} time steps")
        if self.steps_per_batch > 1 and self.learning != "random":
            raise ValueError(f"steps_per_batch is for the learning mode random, not for {self.learning}: leave it out")
        if self.patience is not None and self.test_every > 1:
            raise ValueError("patience counts epochs that are tested: leave --test-every or --patience out")
        if any(stage.T < self.T for stage in stages(self.grow, self.T)) and self.learning != "random":
            raise ValueError(f"grow with fewer time steps is for --learning random, not for {self.learning}")
        if self.grow and self.arch == "vgg_snn":
            raise ValueError("grow needs a network that pools before its head: choose a ResNet, not --arch vgg_snn")
        if self.grow and self.cuda_graphs:
            raise ValueError("grow changes the shape of batches, which cuda_graphs record: leave one of the two out")
        self.check_flips()
        self.images(), self.model()  # checks these flags before the data are read

    def check_flips(self) -> None:
        """Raise ValueError where synapses cannot flip."""
        if not (0 < self.flip_rate <= 1 and self.flip_threshold >= 0):
            raise ValueError(
                "flip_rate must lie in (0, 1] and flip_threshold be at least 0, got "
                f"{self.flip_rate} and {self.flip_threshold}"
            )
        against = {
            f"weights {self.weights}: only binary ones flip": self.weights != "binary",
            f"ema {self.ema}: the average of bits is not a network of bits": self.ema > 0,
            "cuda_graphs: they flip in hooks, which a graph does not record": self.cuda_graphs,
            f"grad_compression {self.grad_compression}: they exchange whole gradients": self.grad_compression != "none",
        }
        for why, holds in against.items():
            if holds and self.optimizer == "flip":
                raise ValueError(f"--optimizer flip does not go with {why}; change one of the two")

    def augment(self) -> Augment:
        """What is done to the training images."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(Augment)}
        return Augment(**{name: getattr(self, name) for name in shared})

    def reading(self) -> dict:
        """What `load_data` is told of a data set besides its name and its place."""
        return dict(streaming=self.streaming, images=self.images(), events=self.events())

    def images(self) -> ImageSettings:
        """How images of one's own are found and what they become."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(ImageSettings)}
        size = None if self.image_size is None else parsed(self.image_size)
        given = {name: value for name in shared if (value := getattr(self, name)) is not None}
        return ImageSettings(size, **given)

    def events(self) -> EventSettings:
        """How recordings of events become frames, and which are for testing."""
        frames = dict(by=self.frames_by, orientation=self.orientation, resize=self.resize, split=self.split)
        size = DATASETS["dvs-cifar10"].image_size if self.image_size is None else parsed(self.image_size)
        return EventSettings(self.T, size, **frames)

    def model(self, spec: DataSpec | None = None) -> ModelConfig:
        """The configuration of the network that fits the data set; `spec`: as it was found, if not as it is known."""
        spec = spec or DATASETS.get(self.dataset, DATASETS["cifar10"])  # of one's own it is not known beforehand
        shape = dict(num_classes=spec.num_classes, in_channels=spec.channels, image_size=spec.image_size)
        shared = {f.name for f in fields(self)} & {f.name for f in fields(ModelConfig)}
        return ModelConfig(**{**{name: getattr(self, name) for name in shared}, **shape})

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "TrainConfig":
        """Build from a dict; an unknown key is a ValueError that names it."""
        if unknown := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"unknown setting {', '.join(unknown)}")
        return cls(**values)


def batch_per_process(joined: int, processes: int) -> int:
    """The share of each process in the joined batch, which a run keeps; ValueError if it cannot be shared."""
    if joined % processes:
        fitting = [str(n) for n in range(1, joined + 1) if joined % n == 0]
        raise ValueError(
            f"the run has {joined} images in the batch of all processes, which {processes} processes cannot share: "
            f"continue it with --num_processes {', '.join(fitting[:-1])} or {fitting[-1]}"
        )
    return joined // processes


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong flag with one sentence instead of the usage of all flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def parser() -> argparse.ArgumentParser:
    """The flags of train.py. Flags that are not given are absent from the namespace."""
    p = Parser(
        usage="%(prog)s [--flag value ...]", description="Train a spiking network online.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    for f in fields(TrainConfig):
        if f.name in GROUPS:
            group = p.add_argument_group(GROUPS[f.name])
        kind = next(t for t in field_types(TrainConfig, f.name) if t is not type(None))
        flag = "--" + f.name.replace("_", "-")
        text = f.metadata["help"] + f" (default: {f.default}{in_recipes(f.name, f.default)})"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(flag, type=kind, choices=f.metadata["choices"], help=text)
    group.add_argument("--resume", metavar="RUN", help="continue the run in this folder with its own settings")
    return p


def with_file(given: dict) -> dict:
    """The given flags, and what the file of settings says besides, if --config names one.

    Its keys are the names of flags, its values are read as those of flags are; config.json of a run is such a file, and
    repeats it in another folder. Raises ValueError or FileNotFoundError with one sentence.
    """
    file = Path(given.get("config") or "")
    if file.suffix.lower() not in SETTINGS:
        return given
    if not file.is_file():
        raise FileNotFoundError(f"no file of settings {file}: check the path given with --config")
    try:
        json_file = file.suffix.lower() == ".json"
        values = read_json(file) if json_file else yaml.load(file.read_bytes(), yaml.BaseLoader)  # all of it is text
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read {file} ({' '.join(str(error).split())}): write `name: value` lines") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold names and values of flags, such as epochs: 30")
    if isinstance(values.get("train"), dict):  # of a run
        train = as_meant(values["train"])
        values = {name: value for name, value in train.items() if name not in ("output_dir", "max_steps")}
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(values.keys() - {f.name for f in fields(TrainConfig)}):
        raise ValueError(f"{file}: unknown setting {', '.join(unknown)}; train.py --help lists them")
    flags = []
    for name, value in values.items():
        flag, text = name.replace("_", "-"), value if isinstance(value, str) else json.dumps(value)
        switch = bool in field_types(TrainConfig, name)
        if isinstance(value, dict | list) or switch and text not in ("true", "false"):
            raise ValueError(f"{file}: {name} must be {'true or false' if switch else 'one value'}, got {text}")
        if switch:
            flags.append(f"--{flag}" if text == "true" else f"--no-{flag}")
        elif text not in ("null", "~", ""):
            flags.append(f"--{flag}={text}")
    reader = parser()
    reader.exit_on_error = False
    try:
        read = vars(reader.parse_args(flags))
    except argparse.ArgumentError as error:
        raise ValueError(f"{file}: {error}") from error
    return read | {name: value for name, value in given.items() if name != "config"}


def of_launcher(given: dict) -> dict:
    """Settings that `accelerate launch` was told; ValueError where the given flags say otherwise, or it cannot be."""
    found = {}
    for name, (flag, default) in LAUNCHED_WITH.items():
        told = os.environ.get(f"ACCELERATE_{flag.upper()}", default)
        if told == default:
            continue
        try:
            found[name] = type(getattr(TrainConfig, name))(told)
            TrainConfig(**{name: found[name]})
        except ValueError as error:
            raise ValueError(f"accelerate launch was given --{flag} {told}, which cannot be: {error}") from error
        if given.get(name, found[name]) != found[name]:
            raise ValueError(
                f"accelerate launch was given --{flag} {told}, train.py --{name.replace('_', '-')} {given[name]}: give "
                "it once"
            )
    return found


def from_flags(given: dict) -> TrainConfig:
    """The configuration of a new run: defaults, then the recipe, then the given flags.

    Warm-up takes a tenth of the epochs at most, unless it is given. ValueError where it would never end.
    """
    dataset = given.get("dataset", TrainConfig.dataset)
    kind = "dvs-cifar10" if Path(dataset).is_dir() and has_recordings(Path(dataset)) else dataset
    recipe, epochs = (given.get(name, getattr(TrainConfig, name)) for name in ("recipe", "epochs"))
    values = begun_with(recipe, kind, kind != dataset, epochs) | given
    if values.get("neuron") == "lif" and "threshold" not in given:
        values.pop("threshold", None)  # of the recipe; LIF has its own
    epochs, warm_up = (values.get(name, getattr(TrainConfig, name)) for name in ("epochs", "warmup_epochs"))
    if "warmup_epochs" not in given:
        values["warmup_epochs"] = min(warm_up, max(epochs, 0) / 10)
    elif 0 < epochs <= warm_up:
        raise ValueError(f"warmup_epochs = {warm_up} leaves nothing of {epochs} epochs: give fewer --warmup-epochs")
    return TrainConfig.from_dict(values)


# These leave the numbers alone.
RESUME_MAY_CHANGE = (
    "data", "streaming", "workers", "cuda_graphs", "threads", "save_minutes", "max_steps", "tracker", "health",
    "patience",
)  # fmt: skip


def for_resume(stored: dict, given: dict) -> TrainConfig:
    """The configuration of a resumed run; a given flag may not contradict what the run was started with."""
    if (more := given.get("epochs", 0)) > stored["epochs"]:
        if stored["schedule"] != "constant":
            raise ValueError(
                f"the run was started with epochs = {stored['epochs']}, not {more}: its learning rate falls to 0 in "
                "them; start a new run with --init-from, or next time with --schedule constant, which can go on"
            )
        if stored.get("grow"):
            raise ValueError(
                f"the run was started with epochs = {stored['epochs']}, not {more}: its images and steps grow in "
                "shares of them; start a new run with --init-from, or next time without --grow"
            )
        stored = {**stored, "epochs": more}
    for name, value in given.items():
        if name not in RESUME_MAY_CHANGE and value != stored.get(name):
            raise ValueError(
                f"the run was started with {name} = {stored.get(name)}, not {value}: leave --{name.replace('_', '-')} "
                "out to continue it, or start a new run without --resume"
            )
    return TrainConfig.from_dict({**stored, **{"max_steps": None}, **given})


def as_meant(train: dict) -> dict:
    """Stored settings; those of a version that always stored hold_out, and used it only where there was no test split,
    as of today."""
    old = "patience" not in train and train.get("hold_out") == 0.1
    return train | {"hold_out": None} if old else train


def training_of(config: dict, run: str | Path) -> TrainConfig:
    """The settings of the training that the config.json of a run folder names.

    Raises ValueError with one sentence for a setting that is not known, and where there are none: in a model's folder
    of the Hub, if no run was known.
    """
    train = as_meant(config["train"])
    if not {"dataset", "seed"} <= train.keys():
        raise ValueError(f"{run} does not say on which data it was trained: give a run folder that train.py wrote")
    return settings_of(TrainConfig, train, run)
