"""Where the weights of a network come from: what its run recorded, and whether they are still those of the run."""

import math
from dataclasses import dataclass, field, fields, replace

from torch import nn

from empf.data.sets import DATASETS, DataSpec, ImageSettings
from empf.model_config import ModelConfig, check_types
from empf.runs import identity, read_config, read_metrics
from empf.terminal import shown

KINDS = {"epochs": int, "images": int, "limit": int, "resized": bool, "reading": dict}  # of fields that are no text
READING = tuple(f.name for f in fields(ImageSettings) if f.name != "size")


@dataclass(frozen=True)
class Origin:
    """Where the weights of a network come from; empty where it is not known.

    `dataset`: its name; `classes`: class names by label; `mean`, `std`: normalisation per channel of pixels in 0..1;
    `accuracy`: % of the test set after each time step, with these weights; `epochs`: how many were trained;
    `split`: which recordings of an event set were for testing; `frames_by`, `orientation`, `resize`: how they became
    frames; `resized`: were images cut to their centre and resized for testing; `reading`: how images of one's own were
    found, see `ImageSettings`; `images`: how many there were for training and testing, with the `limit`;
    `tested_on`: of what the `accuracy` is, where there was no test set.
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
    resized: bool | None = None
    limit: int | None = None
    images: int | None = None
    tested_on: str | None = None
    reading: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict) -> "Origin":
        """Build from JSON. Raises TypeError or ValueError where a field is unknown or not of its kind."""
        lists = {"classes": str, "mean": float, "std": float, "accuracy": float}
        made = {k: tuple(kind(v) for v in values[k]) for k, kind in lists.items() if k in values}
        for name, value in values.items():
            kind = KINDS.get(name, str)
            if name not in lists and not isinstance(value, kind | None):
                raise ValueError(f"{name} must be {kind.__name__}, got {value!r}")
            if lists.get(name) is float and not all(math.isfinite(number) for number in made[name]):
                raise ValueError(f"{name} must be finite numbers, got {value!r}")
        if not all(deviation > 0 for deviation in made.get("std", ())):
            raise ValueError(f"std must be positive, got {values['std']!r}")
        check_types(ImageSettings(1, **values.get("reading", {})))
        return cls(**{**values, **made})

    def frames(self) -> dict[str, str]:
        """How recordings became frames, where it is known; keywords of `event_frames_of_file`."""
        known = dict(by=self.frames_by, orientation=self.orientation, resize=self.resize)
        return {name: value for name, value in known.items() if value is not None}

    def spec(self, config: ModelConfig) -> DataSpec:
        """How images were prepared for a network of this configuration."""
        known = DATASETS.get(self.dataset) or DataSpec(self.dataset, None, 0, 0, 0, (), (), flip=False, crop_padding=0)
        resized = known.resized if self.resized is None else self.resized
        return replace(
            known, channels=config.in_channels, image_size=config.image_size, num_classes=config.num_classes,
            mean=self.mean or known.mean, std=self.std or known.std, resized=resized,
        )  # fmt: skip

    def without_results(self) -> "Origin":
        """For weights that are not those that the run measured."""
        return replace(self, accuracy=(), epochs=None)

    @classmethod
    def of(cls, model: nn.Module) -> "Origin":
        """Of a model that `empf.load` read from a run folder, which it names as `model.run`.

        A model that was changed since has no results. Raises ValueError with one sentence if the folder is damaged.
        """
        run = getattr(model, "run", None)
        if run is None:
            return cls()
        config, measured = read_config(run), measurement(model) or {}
        norm = config.get("normalisation", {})
        try:
            train = config["train"]
            recordings = ("split", "frames_by", "orientation", "resize")
            events = {name: train.get(name) for name in recordings if config["model"].get("in_channels") == 2}
            return cls.from_dict(
                {
                    **events,
                    **config.get("data", {}),
                    "limit": train.get("limit"),
                    "reading": {name: train[name] for name in READING if train.get(name) is not None},
                    "dataset": train.get("dataset"),
                    "classes": config.get("classes", []),
                    "mean": norm.get("mean", []),
                    "std": norm.get("std", []),
                    "accuracy": measured.get("accuracy", []),
                    "epochs": measured.get("epoch"),
                }
            )
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{run} is damaged ({shown(error, 100)}): restore it from a copy of the run") from error


def measurement(model: nn.Module) -> dict | None:
    """The line of its run's metrics.jsonl that has measured the weights that a model has now."""
    found = {record["weights"]: record for record in read_metrics(model.run) if "weights" in record}
    return found.get(identity(model)) if found else None
