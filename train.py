"""Train a spiking neural network online, one random time step per batch.

    accelerate launch train.py                                    digits, needs no network
    accelerate launch train.py --dataset cifar100                 the authors' recipe: ResNet-18, 300 epochs
    accelerate launch train.py --resume runs/cifar100-resnet18    continue where the run stopped

Every field of `empf.config.TrainConfig` is a flag. The run folder is described in `empf/runs.py`.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import empf
from empf import config as settings
from empf import runs
from empf.config import TrainConfig
from empf.data import Augment, Batches, ImageSet, load
from empf.evaluate import correct_per_step
from empf.kernels import backend

READ_EVERY = 20  # batches between two looks at the loss: each makes the host wait for the device


class Stop:
    """Asked for by Ctrl-C, SIGTERM or --max-steps: finish the batch, save, leave."""

    reason: str | None = None

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        self.reason = signal.Signals(number).name


class Meter:
    """Loss, correct predictions and images of an epoch on this process, summed on the device until they are read."""

    def __init__(self, sums: list[float]):
        self.sums = torch.tensor(sums, dtype=torch.float64)
        self.unread: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> None:
        hard = target if target.dim() == 1 else target.argmax(1)
        count = loss.new_tensor(float(len(hard)))
        self.unread.append(torch.stack([loss * count, (logits.argmax(1) == hard).sum(), count]))

    def read(self) -> tuple[float, float]:
        """(mean loss, accuracy in %) so far; waits for the device."""
        if self.unread:
            self.sums += torch.stack(self.unread).cpu().double().sum(0)
            self.unread.clear()
        return (self.sums[0] / self.sums[2]).item(), (100 * self.sums[1] / self.sums[2]).item()


def model_config(config: TrainConfig, data: ImageSet) -> empf.ModelConfig:
    names = ("arch", "T", "weights", "neuron", "parallel", "seca", "spike_bits", "activation", "width")
    spec = data.spec
    shape = dict(num_classes=spec.num_classes, in_channels=spec.channels, image_size=spec.image_size)
    return empf.ModelConfig(**shape, **{name: getattr(config, name) for name in names})


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov momentum; weight decay on convolutions and linear layers only."""
    decayed = {m.weight for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    groups = [
        {"params": [p for p in model.parameters() if p in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Linear warm-up from 0.01 lr, then cosine to 0; progress in epochs."""
    if progress < config.warmup_epochs:
        return config.lr * (0.01 + 0.99 * progress / config.warmup_epochs)
    rest = (progress - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(rest, 1.0)))


def average_norms(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the mean of the running statistics, so that all evaluate one and the same network."""
    for buffer in model.buffers():
        if accelerator.num_processes > 1 and buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, "mean"))


def train(config: TrainConfig, run: Path | None) -> None:
    """Train a new network, or continue the run in the folder `run`."""
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker,
        project_dir=str(run or "."),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.device.type == "cpu":
        torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // accelerator.num_processes))

    # data, resident on the device
    train_set, test_set = load(config.dataset, config.data, limit=config.limit, device=accelerator.device)
    augment = Augment(
        config.crop, config.flip, config.cutout, config.mixup, config.cutmix, config.label_smoothing
    )  # fmt: skip
    share = dict(rank=accelerator.process_index, world=accelerator.num_processes)
    batches = Batches(train_set, config.batch_size, train=True, seed=config.seed, augment=augment, **share)
    test_batches = Batches(test_set, max(config.batch_size, 256), train=False, **share)

    # model and optimizer
    torch.manual_seed(config.seed)
    raw = empf.build(model_config(config, train_set)).to(accelerator.device)
    if accelerator.device.type == "cuda":
        raw = raw.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(raw, config)
    average = (
        AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    )

    # where a resumed run continues
    at = {"epoch": 0, "batch": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0}
    history: list[dict] = []
    if run is not None:
        state = runs.load_state(run)
        runs.load_weights(raw, state["model"], run)
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        at, history = state["at"], state["history"]
    model = accelerator.prepare(raw)
    evaluated = raw if average is None else average.module

    def save() -> None:
        if accelerator.is_main_process:
            runs.save_state(run, {
                "model": raw.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                "average": None if average is None else average.state_dict(), "at": at, "history": history,
            })  # fmt: skip

    if run is None:
        default = runs.free_folder(Path("runs") / f"{config.dataset}-{config.arch}")
        run = Path(broadcast_object_list([config.output_dir or str(default)])[0])
        save()
        if accelerator.is_main_process:  # the configuration comes last: a folder that has one can be resumed
            spec = train_set.spec
            runs.save_config(run, raw.config, config.to_dict(), train_set.class_names, spec.mean, spec.std)
    if config.tracker:
        accelerator.init_trackers("empf", config={k: v for k, v in config.to_dict().items() if v is not None})
    account = empf.account(raw)
    accelerator.print(
        f"{config.arch}, {config.weights} weights, T = {config.T}: {account['params_mb']:.2f} MB "
        f"({account['params_full_mb']:.2f} MB full); {len(train_set)} training, {len(test_set)} test images\n"
        f"{accelerator.num_processes} x {accelerator.device}, kernels: {backend(accelerator.device)}, run: {run}"
    )

    # train
    stop, steps_done, last_save = Stop(), 0, time.monotonic()
    always_read = accelerator.num_processes == 1 and accelerator.device.type == "cpu"  # waits for nothing
    while at["epoch"] < config.epochs:
        epoch, epoch_start = at["epoch"], time.monotonic() - at["seconds"]
        meter = Meter(at["sums"])
        model.train()
        batches.set_epoch(epoch)
        bar = tqdm(
            total=len(batches), initial=at["batch"], desc=f"epoch {epoch + 1}/{config.epochs}", leave=False,
            disable=not accelerator.is_main_process, dynamic_ncols=True,
        )  # fmt: skip
        for number, (images, target) in enumerate(batches.iterate(start=at["batch"]), at["batch"] + 1):
            iteration = epoch * len(batches) + number - 1
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, iteration / len(batches))
            steps = empf.draw_steps(config.T, config.steps_per_batch, config.seed, iteration)
            loss, logits = empf.online_backward(
                model, images, target, F.cross_entropy, learning=config.learning, steps=steps,
                backward=accelerator.backward, no_sync=lambda: accelerator.no_sync(model),
            )  # fmt: skip
            optimizer.step()
            optimizer.zero_grad()
            if average is not None:
                average.update_parameters(raw)
            meter.add(loss, logits, target)
            bar.update()

            steps_done += 1
            if steps_done == config.max_steps:
                stop.reason = "--max-steps"
            if not (always_read or number % READ_EVERY == 0 or number == len(batches)):
                continue
            mean_loss, accuracy = meter.read()
            if not math.isfinite(mean_loss):
                raise ValueError(
                    f"the loss is {mean_loss} in epoch {epoch + 1}, batch {number}: lower --lr or train without "
                    f"--mixed-precision; the last good checkpoint is kept in {run}"
                )
            seconds = time.monotonic() - epoch_start
            rate = f"{number * config.batch_size * accelerator.num_processes / seconds:.0f}"
            drawn = ",".join(map(str, steps)) if config.learning == "random" else config.learning
            shown = {"loss": f"{mean_loss:.3f}", "accuracy": f"{accuracy:.1f}%", "images/s": rate, "t": drawn}
            bar.set_postfix(shown, refresh=False)
            due = time.monotonic() - last_save > 60 * config.save_minutes
            stopping = number < len(batches) and agreed(accelerator, stop.reason)
            if stopping or (due and number < len(batches)):
                at |= {"batch": number, "sums": meter.sums.tolist(), "seconds": seconds}
                save()
                last_save = time.monotonic()
            if stopping:
                bar.close()
                accelerator.print(f"stopped by {stop.reason}, saved; continue with: train.py --resume {run}")
                return
        bar.close()

        # test, record, save
        average_norms(accelerator, evaluated)
        seconds = time.monotonic() - epoch_start
        loss_sum, correct, count = accelerator.reduce(meter.sums.to(accelerator.device), "sum").tolist()
        with accelerator.autocast():
            right = correct_per_step(evaluated, test_batches)
        right = accelerator.reduce(right.to(accelerator.device), "sum").tolist()
        history.append({
            "epoch": epoch + 1, "loss": loss_sum / count, "train_accuracy": 100 * correct / count,
            "accuracy": [100 * r / len(test_set) for r in right],
            "lr": learning_rate(config, epoch + 1), "images_per_s": count / seconds, "seconds": seconds,
        })  # fmt: skip
        at = {"epoch": epoch + 1, "batch": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0}
        save()
        last_save = time.monotonic()
        record = history[-1]
        if accelerator.is_main_process:
            title = f"{config.dataset}: {config.arch} x{config.width:g}, {config.weights} weights, T = {config.T}"
            runs.save_results(run, evaluated, history, f"{title}: {record['accuracy'][-1]:.2f} %")
        if config.tracker:
            scalars = {k: v for k, v in record.items() if isinstance(v, float)}
            accelerator.log(
                scalars | {f"accuracy_t{t}": a for t, a in enumerate(record["accuracy"], 1)}, step=epoch + 1
            )
        per_step = " ".join(f"{a:.2f}" for a in record["accuracy"])
        accelerator.print(
            f"epoch {epoch + 1:3d}  loss {record['loss']:.4f}  train {record['train_accuracy']:.2f} %  "
            f"test after each step {per_step} %  {record['images_per_s']:.0f} images/s  {seconds:.1f} s"
        )
        if agreed(accelerator, stop.reason) and at["epoch"] < config.epochs:
            accelerator.print(f"stopped by {stop.reason}, saved; continue with: train.py --resume {run}")
            return
    accelerator.end_training()
    if not runs.has_matplotlib():
        accelerator.print("no curves.png without matplotlib: pip install 'empf[plot]'")


def agreed(accelerator: Accelerator, reason: str | None) -> bool:
    """True if any process was asked to stop; all must call it at the same batch."""
    if accelerator.num_processes == 1:
        return reason is not None
    asked = torch.tensor(float(reason is not None), device=accelerator.device)
    return accelerator.reduce(asked, "sum").item() > 0


def main() -> None:
    given = vars(settings.parser().parse_args())
    resumed = given.pop("resume", None)
    try:
        if resumed is not None:
            train(settings.for_resume(runs.read_config(resumed)["train"], given), Path(resumed))
        else:
            config = settings.from_flags(given)
            if config.output_dir is not None and (Path(config.output_dir) / "config.json").exists():
                raise ValueError(
                    f"{config.output_dir} already holds a run: continue it with --resume {config.output_dir} or choose "
                    "another --output-dir"
                )
            train(config, None)
    except (ValueError, OSError) as error:  # bad flags, data, checkpoints, a full disk: one sentence
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
