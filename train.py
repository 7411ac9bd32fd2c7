"""Train a spiking neural network online, one random time step per batch.

    accelerate launch train.py                                    digits, needs no network
    accelerate launch train.py --dataset cifar100                 the authors' recipe: ResNet-18, 300 epochs
    accelerate launch train.py --resume runs/cifar100-resnet18    continue where the run stopped

Every field of `empf.config.TrainConfig` is a flag. The run folder is described in `empf/runs.py`.
"""

import math
import signal
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import empf
from empf import config as settings
from empf import runs
from empf.config import TrainConfig
from empf.data import Augment, Batches, load
from empf.evaluate import correct_per_step
from empf.kernels import backend
from empf.launch import start_processes

READ_EVERY = 20  # batches between two looks at the loss where a look waits for the device or for other processes


class Stop:
    """Asked for by Ctrl-C, SIGTERM or --max-steps: finish the batch, save, leave."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame) -> None:
        self.asked = True


class Meter:
    """[loss, correct predictions, images] of an epoch, summed on the device until they are read."""

    def __init__(self, accelerator: Accelerator, sums: list[float]):
        self.accelerator = accelerator
        self.sums = torch.tensor(sums, dtype=torch.float64)
        if not accelerator.is_main_process:
            self.sums.zero_()  # the sums of all processes, which a resumed epoch starts with, count once
        self.unread: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, logits: torch.Tensor, target: torch.Tensor) -> None:
        hard = target if target.dim() == 1 else target.argmax(1)
        count = loss.new_tensor(float(len(hard)))
        self.unread.append(torch.stack([loss * count, (logits.argmax(1) == hard).sum(), count]))

    def read(self, stop: bool) -> tuple[list[float], bool]:
        """The sums so far and whether to stop, of all processes; each has to call it at the same batch."""
        self.sums += torch.stack(self.unread).cpu().double().sum(0)
        self.unread.clear()
        *sums, stops = over_processes(self.accelerator, torch.tensor([*self.sums, stop], dtype=torch.float64)).tolist()
        return sums, stops > 0


def over_processes(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of the values of all processes."""
    return values if accelerator.num_processes == 1 else accelerator.reduce(values.to(accelerator.device), "sum")


def average_norms(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the mean of the running statistics, so that all evaluate one and the same network."""
    for buffer in model.buffers():
        if accelerator.num_processes > 1 and buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer, "mean"))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, processes and tracker; raises ValueError where the tracker is unknown or not installed."""
    installed = [tracker.value for tracker in get_available_trackers()]
    if config.tracker not in (None, *installed):
        raise ValueError(
            f"tracker {config.tracker!r} is unknown to Accelerate or not installed: install it or leave --tracker out; "
            f"installed: {', '.join(installed) or 'none'}"
        )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker,
        project_dir=".",  # the run folder takes its place once it is known
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if accelerator.device.type == "cpu":  # accelerate launch sets OMP_NUM_THREADS=1
        torch.set_num_threads(settings.cpu_threads(config.threads, accelerator.num_processes))
    return accelerator


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


def train(accelerator: Accelerator, config: TrainConfig, run: Path | None) -> None:
    """Train a new network, or continue the run in the folder `run`."""
    # data, resident on the device
    device, processes = accelerator.device, accelerator.num_processes
    train_set, test_set = load(config.dataset, config.data, limit=config.limit, device=device)
    augment = Augment(
        config.crop, config.flip, config.cutout, config.mixup, config.cutmix, config.label_smoothing
    )  # fmt: skip
    share = dict(rank=accelerator.process_index, world=processes)
    batches = Batches(train_set, config.batch_size, train=True, seed=config.seed, augment=augment, **share)
    test_batches = Batches(test_set, max(config.batch_size, 256), train=False, **share)

    # model and optimizer
    torch.manual_seed(config.seed)
    raw = empf.build(config.model()).to(device)
    if device.type == "cuda":
        raw = raw.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(raw, config)
    average = (
        AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    )
    evaluated = raw if average is None else average.module

    # the run folder: a new one, or where the last call stopped
    at = {"epoch": 0, "batch": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0}
    history: list[dict] = []

    def save() -> None:
        if not all(p.isfinite().all() for p in raw.parameters()):
            raise ValueError(
                f"training diverged, a weight is not finite: lower --lr; the last good checkpoint is in {run}"
            )
        if accelerator.is_main_process:
            runs.save_state(run, {
                "model": raw.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(),
                "average": None if average is None else average.state_dict(),
                "at": at, "history": history, "processes": processes,
            })  # fmt: skip

    def save_results() -> None:
        if accelerator.is_main_process:
            title = f"{config.dataset}: {config.arch} x{config.width:g}, {config.weights} weights, T = {config.T}"
            runs.save_results(run, evaluated, history, f"{title}: {history[-1]['accuracy'][-1]:.2f} %")

    if run is None:
        folder = config.output_dir
        if folder is None and accelerator.is_main_process:
            folder = str(runs.new_folder(Path("runs") / f"{config.dataset}-{config.arch}"))
        run = Path(broadcast_object_list([folder])[0])
        save()
        if accelerator.is_main_process:  # the configuration comes last: a folder that has one can be resumed
            spec = train_set.spec
            runs.save_config(run, raw.config, config.to_dict(), train_set.class_names, spec.mean, spec.std)
    else:
        state = runs.load_state(run)
        if state["processes"] != processes:
            raise ValueError(
                f"{run} was trained by {state['processes']} processes, not {processes}: continue it with "
                f"accelerate launch --num_processes {state['processes']}"
            )
        runs.load_weights(raw, state["model"], run)
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.load_state_dict(state["average"])
        torch.set_rng_state(state["rng"])
        at, history = state["at"], state["history"]
        if accelerator.is_main_process:
            runs.remove_leftovers(run)
        if history and at["batch"] == 0:  # the last call may have died between the checkpoint and the results
            save_results()
    model = accelerator.prepare(raw)
    if config.tracker:
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.init_trackers("empf", config={k: v for k, v in config.to_dict().items() if v is not None})
    account = empf.account(raw)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    accelerator.print(
        f"{config.arch}, {config.weights} weights, T = {config.T}: {account['params_mb']:.2f} MB "
        f"({account['params_full_mb']:.2f} MB full); {len(train_set)} training, {len(test_set)} test images\n"
        f"{processes} x {device.type}{threads}, kernels: {backend(device)}, run: {run}"
    )

    # train
    stop, steps_done, last_save = Stop(), 0, time.monotonic()
    read_every = 1 if processes == 1 and device.type == "cpu" else READ_EVERY
    while at["epoch"] < config.epochs:
        epoch, epoch_start = at["epoch"], time.monotonic() - at["seconds"]
        meter = Meter(accelerator, at["sums"])
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

            steps_done += 1
            stop.asked |= steps_done == config.max_steps
            if number % read_every == 0 or number == len(batches) or steps_done == config.max_steps:
                sums, stopping = meter.read(stop.asked)
                loss_sum, correct, count = sums
                seconds = time.monotonic() - epoch_start
                if not math.isfinite(loss_sum):
                    raise ValueError(
                        f"training diverged, the loss is {loss_sum / count} in epoch {epoch + 1}, batch {number}: "
                        f"lower --lr; the last good checkpoint is in {run}"
                    )
                drawn = ",".join(map(str, steps)) if config.learning == "random" else config.learning
                shown = {"loss": f"{loss_sum / count:.3f}", "accuracy": f"{100 * correct / count:.1f}%"}
                bar.set_postfix({**shown, "images/s": f"{count / seconds:.0f}", "t": drawn}, refresh=False)
                due = time.monotonic() - last_save >= 60 * config.save_minutes
                if (stopping or due) and number < len(batches):
                    at = {"epoch": epoch, "batch": number, "sums": sums, "seconds": seconds}
                    save()
                    last_save = time.monotonic()
                    if stopping:
                        break
            bar.update()
        bar.close()
        if number < len(batches):
            break  # stopped within the epoch

        # test, record, save
        average_norms(accelerator, raw)
        if average is not None:
            average_norms(accelerator, evaluated)
        with accelerator.autocast():
            right = over_processes(accelerator, correct_per_step(evaluated, test_batches)).tolist()
        history.append({
            "epoch": epoch + 1, "loss": loss_sum / count, "train_accuracy": 100 * correct / count,
            "accuracy": [100 * r / len(test_set) for r in right],
            "lr": learning_rate(config, epoch + 1), "images_per_s": count / seconds, "seconds": seconds,
        })  # fmt: skip
        at = {"epoch": epoch + 1, "batch": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0}
        save()
        last_save = time.monotonic()
        save_results()
        record = history[-1]
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
        if stopping:
            break
    if at["epoch"] < config.epochs:
        accelerator.print(f"stopped and saved; continue with: train.py --resume {run}")
    else:
        accelerator.print(f"finished; evaluate it with: eval.py {run}")
        if not runs.has_matplotlib():
            accelerator.print("no curves.png without matplotlib: pip install 'empf[plot]'")


def main(argv: list[str] | None = None) -> None:
    given = vars(settings.parser().parse_args(argv))
    resumed = given.pop("resume", None)
    try:
        start_processes(sys.argv)
        if resumed is not None:
            config, run = settings.for_resume(runs.read_config(resumed)["train"], given), Path(resumed)
        else:
            config, run = settings.from_flags(given), None
            if config.output_dir is not None and (Path(config.output_dir) / "config.json").exists():
                raise ValueError(
                    f"{config.output_dir} already holds a run: continue it with --resume {config.output_dir} or choose "
                    "another --output-dir"
                )
        accelerator = make_accelerator(config)
        train(accelerator, config, run)
        accelerator.end_training()
    except (ValueError, OSError) as error:  # bad flags, data, checkpoints, a full disk: one sentence
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # from the first batch on, Ctrl-C is for Stop
        sys.exit("stopped before the first batch")


if __name__ == "__main__":
    main()
