"""What is around the loop of train.py: the run folder, the position, what is counted and said, when it stops."""

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from empf import runs
from empf.data.batches import ImageBatches
from empf.data.sets import ImageSet, is_held_out
from empf.figures import has_matplotlib
from empf.kernels import backend
from empf.machine import check_memory
from empf.models import ModelConfig, SpikingNetwork, build
from empf.terminal import shown
from empf.training.config import (
    TrainConfig,
    batch_per_process,
    for_resume,
    from_flags,
    of_launcher,
    parser,
    training_of,
    with_file,
)
from empf.training.curves import plot_curves
from empf.training.messages import epoch_line, few_updates, headline, warning_lines, without_effect
from empf.training.optimizers import learning_rate
from empf.training.processes import total

DRAW_SECONDS = 10  # curves.png is drawn at most so often, and at the end
READ_EVERY = 20  # updates between two looks at the loss where a look waits for the device or for other processes
START = {"epoch": 0, "batch": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0}


def of_call(argv: list[str] | None) -> tuple[TrainConfig, Path | None]:
    """The configuration that the command line of train.py asks for, and the run that it continues, if any.

    Raises ValueError or OSError with one sentence.
    """
    given = with_file(vars(parser().parse_args(argv)))
    given |= of_launcher(given)
    if (resumed := given.pop("resume", None)) is not None:
        return for_resume(training_of(runs.read_config(resumed), resumed).to_dict(), given), Path(resumed)
    config = from_flags(given)
    if config.output_dir is not None and runs.begun(Path(config.output_dir)):
        raise ValueError(
            f"{config.output_dir} already holds a run: continue it with --resume {config.output_dir} or choose "
            "another --output-dir"
        )
    return config, None


class Batch(NamedTuple):
    """A batch that was trained on: the loss, logits (N, classes), target, time steps, and was it followed by an update.

    With gradient accumulation several batches share an update.
    """

    loss: Tensor
    logits: Tensor
    target: Tensor
    steps: Sequence[int]
    update: bool


class Session:
    """One call of train.py.

        with Session(accelerator, config, run) as session:      run: a folder to continue, or None
            session.begin(train_set, test_set, held, evaluated, model=..., optimizer=..., average=..., health=...)
            for epoch in session.epochs(batches):
                for batch in ...:                               those from number `session.at["batch"]` on
                    if session.count(batch):                    saved in the middle of the epoch, to stop
                        break
                else:
                    session.record(*scores)

    Every process has one, the first of them writes and speaks. `at` is the position that is saved with the parts: the
    epoch and the batches done in it, with their sums and seconds. Raises ValueError or OSError with one sentence.
    """

    def __init__(self, accelerator: Accelerator, config: TrainConfig, run: Path | None):
        self.accelerator, self.config, self.run = accelerator, config, run
        self.processes, self.first = accelerator.num_processes, accelerator.is_main_process
        self.closing = ExitStack()
        if run is not None:
            self.hold()
        self.state = None if run is None else runs.load_state(run)
        self.started_with = self.processes if self.state is None else self.state["processes"]
        self.batch_size = batch_per_process(config.batch_size * self.started_with, self.processes)
        self.at: dict[str, Any] = START if self.state is None else self.state["at"]
        self.history: list[dict] = [] if self.state is None else self.state["history"]
        self.updates, self.drawn, self.stopping = 0, -math.inf, False
        self.notes: list[str] = []  # said when the training begins

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error) -> None:
        self.closing.close()

    def hold(self) -> None:
        if self.first:
            self.closing.enter_context(runs.held(self.run))

    # ---- the run folder

    def begin(
        self, train_set: ImageSet, test_set: ImageSet, held: ImageSet | None, evaluated: SpikingNetwork, **parts: Any
    ) -> None:
        """Make the run folder, or put the parts (things with a state dict, or None) where the last call stopped.

        `held`: chooses the best epoch; without it the test set, where that was held out of the training set. Raises
        ValueError for --patience if there is neither.
        """
        sets = [data for data in (test_set, held) if data is not None]
        self.sizes, self.chooses = [len(data) for data in sets], held is not None or is_held_out(test_set)
        if self.config.patience is not None and not self.chooses:
            raise ValueError("--patience needs images that are held out of the training set: add --hold-out 0.1")
        self.tested_on = {"tested_on": test_set.split} if is_held_out(test_set) else {}
        self.evaluated, self.parts = evaluated, parts
        model = parts["model"]
        classes, images = train_set.class_names, len(train_set) + sum(self.sizes)
        self.write_config = partial(
            runs.save_config, model=model.config, train=self.config.to_dict(), classes=classes,
            mean=train_set.spec.mean, std=train_set.spec.std, resized=train_set.spec.resized, images=images,
            **self.tested_on,
        )  # fmt: skip
        if self.state is None:
            folder = self.config.output_dir
            if folder is None and self.first:
                name = Path(self.config.dataset).resolve().name  # of "." too
                folder = str(runs.new_folder(Path("runs") / f"{name}-{self.config.arch}"))
            self.run = Path(broadcast_object_list([folder])[0])
            self.hold()
            if self.first:
                with suppress(NotADirectoryError):  # it is said when the first file is written
                    (self.run / "config.json").unlink(missing_ok=True)  # of a run without an update, see train.py
            self.save()
        else:
            check_data(self.run, classes, images)
            runs.check_fits(model.config, {n: tuple(t.shape) for n, t in self.state["model"].items()}, self.run)
            restore(parts, self.state, self.run)
            torch.set_rng_state(self.state["rng"])
            self.state = None  # its memory
            if self.first:
                runs.remove_leftovers(self.run)
                stored = runs.read_config(self.run)
                if stored["train"].get("epochs") != self.config.epochs:  # it goes on
                    stored["train"]["epochs"] = self.config.epochs
                    runs.write_config(self.run, stored)
            if self.history and self.at["batch"] == 0:  # the last call may have died between the two
                self.save_results(draw=True)
        if self.config.tracker:
            self.accelerator.project_configuration.logging_dir = str(self.run)
            settings = {name: value for name, value in self.config.to_dict().items() if value is not None}
            self.accelerator.init_trackers("empf", config=settings)
        device = self.accelerator.device
        threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
        self.say(headline(model, train_set, test_set, held))
        self.say(f"{self.processes} x {device.type}{threads}, kernels: {backend(device)}, run: {self.run}")
        frozen = [not parameter.requires_grad for parameter in model.parameters()]
        if any(frozen):
            self.notes.append(f"{sum(frozen)} of {len(frozen)} parameter tensors are frozen")
        in_vain = without_effect(self.config, self.processes, train_set, model)
        for line in [*self.notes, *in_vain]:
            self.say(line)

    def save(self) -> None:
        """Write the checkpoint, and config.json where it is missing: a folder that has one can be resumed."""
        state = {name: None if part is None else part.state_dict() for name, part in self.parts.items()}
        if not all(tensor.isfinite().all() for tensor in state["model"].values()):
            raise ValueError(
                f"training diverged, a weight is not finite: lower --lr; the last good checkpoint is in {self.run}"
            )
        rest = {"rng": torch.get_rng_state(), "at": self.at, "history": self.history, "processes": self.started_with}
        if self.first:
            runs.save_state(self.run, state | rest)
            if not (self.run / "config.json").exists():
                self.write_config(self.run)
        self.last_save = time.monotonic()

    def save_results(self, draw: bool) -> None:
        if self.first:
            runs.save_results(self.run, self.evaluated, self.history)
            if draw and has_matplotlib():
                c, tested = self.config, [record["accuracy"][-1] for record in self.history if "accuracy" in record]
                title = f"{c.dataset}: {c.arch} x{c.width:g}, {c.weights} weights, T = {c.T}"
                title += f": {tested[-1]:.2f} %" if tested else ""
                plot_curves(self.run, self.history, title)

    # ---- the loop

    def epochs(self, batches: ImageBatches) -> Iterator[int]:
        """The epochs that are left, until one is stopped. From here on signals are asked, not obeyed."""
        self.batches, self.stop, self.last_save = batches, Stop(), time.monotonic()
        if line := few_updates(self.config, len(batches)):
            self.say(line)
        device = self.accelerator.device
        self.read_every = 1 if self.processes == 1 and device.type == "cpu" else READ_EVERY
        while not self.finished() and not self.stopping:
            epoch, self.number = self.at["epoch"], self.at["batch"]
            if self.number >= len(batches):
                raise runs.damaged(self.run, f"batch {self.number} of {len(batches)}")
            self.began = time.monotonic() - self.at["seconds"]
            self.begun_by = self.at.get("begun_by", self.started_with) if self.number else self.processes
            self.meter = Meter(device, self.at["sums"] if self.first else START["sums"])  # so that they count once
            batches.set_epoch(epoch)
            with tqdm(
                total=len(batches), initial=self.number, desc=f"epoch {epoch + 1}/{self.config.epochs}", leave=False,
                disable=not self.first, dynamic_ncols=True,
            ) as self.bar:  # fmt: skip
                yield epoch
        best, run = runs.best_epoch(self.history), quote(str(self.run))
        if not self.finished():
            self.say(f"stopped and saved; continue with: python -m empf train --resume {run}")
        else:
            early = f" after {self.config.patience} epochs without a better held-out accuracy"
            early = early if self.at["epoch"] < self.config.epochs else ""
            self.say(f"finished{early}; evaluate it with: python -m empf eval {run}")
            if best is not None:
                held = self.history[best - 1]["held_out"][-1]
                weights = quote(str(self.run / "best.safetensors"))
                said = f"{held:.2f} % in epoch {best}{', optimistic, for it chose the epoch' if self.tested_on else ''}"
                self.say(f"best held-out accuracy: {said}: python -m empf eval {weights}")
            if not has_matplotlib():
                self.say("no curves.png without matplotlib: pip install 'empf[plot]'")

    def finished(self) -> bool:
        """Are all epochs done, or as many as the patience allows without a better one?"""
        done, best, patience = self.at["epoch"], runs.best_epoch(self.history), self.config.patience
        return done >= self.config.epochs or None not in (best, patience) and done - best >= patience

    def count(self, batch: Batch) -> bool:
        """Count a batch; now and then look at the sums, show them, save. Returns whether to stop within this epoch."""
        self.number += 1
        self.meter.add(batch.loss, batch.logits, batch.target)
        self.bar.update()
        if not batch.update:
            return False
        self.updates += 1
        last, every = self.updates == self.config.max_steps, self.read_every * self.config.accumulate
        self.stop.asked |= last
        within = self.number < len(self.batches)
        if within and not last and self.number % every:
            return False
        self.sums, self.stopping = self.meter.read(self.stop.asked)
        loss_sum, correct, images = self.sums
        if not math.isfinite(loss_sum):
            raise divergence(self.batches, self.number, self.meter.losses, self.run)
        self.seconds = time.monotonic() - self.began
        drawn = ",".join(map(str, batch.steps)) if self.config.learning == "random" else self.config.learning
        shown = {"loss": f"{loss_sum / images:.3f}", "accuracy": f"{100 * correct / images:.1f}%"}
        self.bar.set_postfix({**shown, "images/s": f"{images / self.seconds:.0f}", "t": drawn}, refresh=False)
        due = time.monotonic() - self.last_save >= 60 * self.config.save_minutes
        if within and (self.stopping or due):
            self.at = {
                "epoch": self.at["epoch"], "batch": self.number, "sums": self.sums, "seconds": self.seconds,
                "begun_by": self.begun_by,
            }  # fmt: skip
            self.save()
        return within and self.stopping

    def test_is_due(self) -> bool:
        """Is this epoch, which has been trained, one to be tested?"""
        epoch = self.at["epoch"] + 1
        return epoch % self.config.test_every == 0 or epoch == self.config.epochs

    def record(self, *sums: list[float]) -> None:
        """End an epoch with the `scores` of the test set and, where it is another, of what is held out.

        They are recorded, saved and said; of an epoch that is not tested there are none.
        """
        results = [
            ([100 * c / images for c in correct], loss / images)
            for (*correct, loss), images in zip(sums, self.sizes[: len(sums)], strict=True)
        ]
        epoch, (loss_sum, correct, images) = self.at["epoch"] + 1, self.sums
        rates = [learning_rate(self.config, epoch), learning_rate(self.config, epoch - 1)]
        record = {
            "epoch": epoch, "loss": loss_sum / images, "train_accuracy": 100 * correct / images,
            "lr": rates[0], "images_per_s": images / self.seconds, "seconds": self.seconds,
        }  # fmt: skip
        if results:
            record |= {"accuracy": results[0][0], "test_loss": results[0][1]}
        if results and self.chooses:
            record |= {"held_out": results[-1][0], "held_out_loss": results[-1][1], **self.tested_on}
        if self.parts["health"] is not None:
            record["health"] = self.parts["health"].report(min(rates) / self.config.lr)
        self.history.append(record)
        self.at = {**START, "epoch": epoch}
        if runs.best_epoch(self.history) == epoch:
            record["weights"] = runs.identity(self.evaluated)
        self.save()
        draw = self.stopping or self.finished() or time.monotonic() - self.drawn > DRAW_SECONDS
        self.save_results(draw)
        self.last_save = time.monotonic()
        self.drawn = self.last_save if draw else self.drawn
        if self.config.tracker:
            self.accelerator.log(scalars(record), step=epoch)
        for line in [epoch_line(record), *warning_lines(record)]:
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line, and keep it in log.txt."""
        if self.first:
            print(line, flush=True)
            with suppress(OSError), open(self.run / "log.txt", "a", encoding="utf-8", errors="replace") as log:
                log.write(f"{line}\n")


class Stop:
    """Asked for by Ctrl-C, SIGTERM, SIGHUP or --max-steps: finish the update, save, leave. A second Ctrl-C: end.

    The system ends it then: a process that waits for another one would not come to a handler of Python. Not so with
    SIGTERM, which a launcher passes on to processes that a scheduler has sent it to already. A signal that is ignored,
    as nohup does it, stays so; and a thread that is not the first gets none.
    """

    def __init__(self):
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)  # Windows has no SIGHUP
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


class Meter:
    """[loss, correct predictions, images] of an epoch, summed on the device until they are read.

    `sums`: what a resumed epoch starts with, for one of the processes.
    """

    def __init__(self, device: torch.device, sums: list[float]):
        self.device = device
        self.sums = torch.tensor(sums, dtype=torch.float64)
        self.unread: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        hard = target if target.dim() == 1 else target.argmax(1)
        correct = (logits.argmax(1) == hard).sum()
        self.unread.append(torch.stack([loss * len(hard), correct, torch.full_like(loss, len(hard))]))

    def read(self, stop: bool) -> tuple[list[float], bool]:
        """The sums so far and whether to stop, of all processes; each has to call it at the same batch.

        `.losses` are those of the batches since the last call, of this process.
        """
        seen = torch.stack(self.unread).cpu().double()
        self.unread.clear()
        self.losses = (seen[:, 0] / seen[:, 2]).tolist()
        self.sums += seen.sum(0)
        *sums, stops = total(torch.tensor([*self.sums, stop], dtype=torch.float64, device=self.device)).tolist()
        return sums, stops > 0


def check_size(config: ModelConfig, train: TrainConfig, device: torch.device) -> None:
    """Raise ValueError before anything is built where weights, gradients, momentum and average do not fit in memory."""
    with torch.device("meta"):  # shapes without memory
        weights = sum(4 * p.numel() for p in build(config).parameters())
    copies = 2 if train.optimizer == "flip" else 3 + (train.ema > 0)  # those that flip are dense when they are built
    check_memory(copies * weights, device, "use a smaller --width, or fewer classes or steps")


def check_data(run: Path, classes: list[str], images: int) -> None:
    """Raise ValueError where a run would continue on other data than it began with, as far as config.json says."""
    stored = runs.read_config(run)
    before = stored.get("classes") or classes, stored.get("data", {}).get("images") or images
    if before != (classes, images):
        what = [f"{count} images of {len(names)} classes" for names, count in (before, (classes, images))]
        other = [f", such as {name!r}" for name in classes if name not in before[0]] or [""]
        raise ValueError(
            f"{run} began with {what[0]}, and there are {what[1]} now{shown(other[0], 100)}: give it the data that it "
            f"began with by --data, or start a new run with --init-from {run}"
        )


def divergence(batches: ImageBatches, number: int, losses: list[float], run: Path) -> ValueError:
    """What to say when a loss is not finite: `losses` are those of the batches up to `number`."""
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses) - 1)
    number += bad + 1 - len(losses)
    images, target = next(batches.iterate(start=number - 1))
    where = f"epoch {batches.epoch + 1}, batch {number}"
    good = f"the last good checkpoint is in {run}"
    if not (images.isfinite().all() and target.isfinite().all()):
        return ValueError(f"the data of {where} hold numbers that are not finite: repair them; {good}")
    return ValueError(f"training diverged, the loss is not finite in {where}: lower --lr; {good}")


def restore(parts: dict[str, Any], state: dict, run: Path) -> None:
    """Give the parts their states of a checkpoint. Raises ValueError where they are not those of such parts."""
    for name, part in parts.items():
        found = state.get(name)
        if part is None:
            continue
        try:
            if name != "health":  # it looks for itself, and the run so far may have gone without
                wanted = part.state_dict()
                if name == "optimizer":  # a new one has no momenta: tensors like the parameters
                    like = dict(enumerate(p for group in part.param_groups for p in group["params"]))
                    wanted["state"] = {i: dict.fromkeys(momenta, like[i]) for i, momenta in found["state"].items()}
                if (place := runs.unlike(found, wanted, name)) is not None:
                    raise ValueError(place)
                if name == "optimizer":
                    found = found | {"param_groups": wanted["param_groups"]}  # as the run was configured
            part.load_state_dict(found)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise runs.damaged(run, str(error)) from error


def scalars(record: dict) -> dict[str, float]:
    """One line of metrics.jsonl for a tracker."""
    single = {name: value for name, value in record.items() if isinstance(value, float)}
    single |= {"held_out": record["held_out"][-1]} if "held_out" in record else {}
    return single | {f"accuracy_t{t}": accuracy for t, accuracy in enumerate(record.get("accuracy", []), 1)}
