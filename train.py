"""Train a spiking neural network online, one random time step per batch.

    accelerate launch train.py                                    digits, needs no network
    accelerate launch train.py --dataset cifar100                 the authors' recipe: ResNet-18, 300 epochs
    accelerate launch train.py --resume runs/cifar100-resnet18    continue where the run stopped

Every field of `empf.training.config.TrainConfig` is a flag. The run folder is described in `empf/runs.py`.
"""

import math
import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch loads: on a busy machine, long spinning crawls

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, broadcast_object_list
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import empf
from empf import runs
from empf.data.load import load_data, make_batches
from empf.evaluate import correct_per_step
from empf.kernels import backend
from empf.machine import use_cpu
from empf.training import config as settings
from empf.training import session as loop
from empf.training.capture import CapturedBackward, check_capture
from empf.training.config import TrainConfig
from empf.training.health import Health
from empf.training.processes import process_died, start_processes
from empf.training.session import learning_rate, make_optimizer
from empf.training.sync_norm import sync_norms

CALIBRATION = 20  # batches of training images as they are, from which Mem-BN takes its statistics before a test
DRAW_SECONDS = 10  # curves.png is drawn at most so often, and at the end
READ_EVERY = 20  # updates between two looks at the loss where a look waits for the device or for other processes
COMPRESSION = {  # of the gradients: name and options in Accelerate; PowerSGD leaves its first updates as they are
    "none": (DDPCommunicationHookType.NO, {}),
    "bf16": (DDPCommunicationHookType.BF16, {}),
    "powersgd": (DDPCommunicationHookType.POWER_SGD, {"matrix_approximation_rank": 4, "start_powerSGD_iter": 1000}),
}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, processes and tracker; raises ValueError where what is asked for is not installed or not possible."""
    installed = [tracker.value for tracker in get_available_trackers()]
    if config.tracker not in (None, *installed):
        raise ValueError(
            f"tracker {config.tracker!r} is unknown to Accelerate or not installed: install it or leave --tracker out; "
            f"installed: {', '.join(installed) or 'none'}"
        )
    hook, options = COMPRESSION[config.grad_compression]
    parallel = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook, comm_state_option=options
    )
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=config.tracker,
        project_dir=".",  # the run folder takes its place once it is known
        kwargs_handlers=[parallel],
    )
    if accelerator.device.type == "cpu":  # accelerate launch sets OMP_NUM_THREADS=1
        use_cpu(config.threads, accelerator.num_processes)
        if config.grad_compression == "bf16" and accelerator.num_processes > 1:
            raise ValueError("processes on CPUs cannot exchange gradients in bf16: use --grad-compression powersgd")
    if config.cuda_graphs:
        drawn = config.steps_per_batch if config.learning == "random" else config.T
        check_capture(accelerator.device, accelerator.num_processes, config.T, drawn)
    return accelerator


def train(accelerator: Accelerator, config: TrainConfig, run: Path | None) -> None:
    """Train a new network, or continue the run in the folder `run`."""
    device, processes, first = accelerator.device, accelerator.num_processes, accelerator.is_main_process

    def over_processes(values: torch.Tensor, how: str = "sum") -> torch.Tensor:
        return values if processes == 1 else accelerator.reduce(values.to(device), how)

    # data, resident on the device; a run continues with the same joined batch, whatever the number of processes
    state = None if run is None else runs.load_state(run)
    started_with = processes if state is None else state["processes"]
    batch_size = settings.batch_per_process(config.batch_size * started_with, processes)
    train_set, test_set = load_data(
        config.dataset,
        config.data,
        limit=config.limit,
        device=device,
        streaming=config.streaming,
        events=config.events(),
    )
    spec, share = train_set.spec, dict(rank=accelerator.process_index, world=processes, workers=config.workers)
    batches = make_batches(train_set, batch_size, train=True, seed=config.seed, augment=config.augment(), **share)
    plain_batches = make_batches(train_set, batch_size, train=True, seed=config.seed, **share)  # not augmented
    test_batches = make_batches(test_set, max(batch_size, 256), train=False, **share)

    # model and optimizer
    torch.manual_seed(config.seed)
    raw = empf.build(config.model(spec)).to(device, memory_format=torch.channels_last)
    if config.sync_bn and processes > 1:
        sync_norms(raw)
    optimizer = make_optimizer(raw, config)
    average = (
        AveragedModel(raw, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    )
    evaluated = raw if average is None else average.module
    health = Health(raw, len(batches)) if config.health and first else None
    parts = {"model": raw, "optimizer": optimizer, "average": average, "health": health}

    # the run folder: a new one, or where the last call stopped
    at = {"epoch": 0, "batch": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0}
    history: list[dict] = []

    def save() -> None:
        rest = {"rng": torch.get_rng_state(), "at": at, "history": history, "processes": started_with}
        state = loop.snapshot(parts, run) | rest
        if first:
            runs.save_state(run, state)

    def save_results(draw: bool) -> None:
        if first:
            title = f"{config.dataset}: {config.arch} x{config.width:g}, {config.weights} weights, T = {config.T}"
            runs.save_results(run, evaluated, history, f"{title}: {history[-1]['accuracy'][-1]:.2f} %", draw)

    if state is None:
        folder = config.output_dir
        if folder is None and first:
            folder = str(runs.new_folder(Path("runs") / f"{config.dataset}-{config.arch}"))
        run = Path(broadcast_object_list([folder])[0])
        save()
        if first:  # the configuration comes last: a folder that has one can be resumed
            runs.save_config(run, raw.config, config.to_dict(), train_set.class_names, spec.mean, spec.std)
    else:
        runs.check_fits(raw, state["model"], run)
        loop.restore(parts, state)
        torch.set_rng_state(state["rng"])
        at, history = state["at"], state["history"]
        if first:
            runs.remove_leftovers(run)
        if history and at["batch"] == 0:  # the last call may have died between the checkpoint and the results
            save_results(draw=True)
    model = accelerator.prepare(raw)
    captured = CapturedBackward(model, F.cross_entropy, learning=config.learning) if config.cuda_graphs else None
    if config.tracker:
        accelerator.project_configuration.logging_dir = str(run)
        accelerator.init_trackers("empf", config={k: v for k, v in config.to_dict().items() if v is not None})
    accelerator.print(f"{loop.headline(raw)}; {len(train_set)} training, {len(test_set)} test images")
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    accelerator.print(f"{processes} x {device.type}{threads}, kernels: {backend(device)}, run: {run}")
    for line in loop.without_effect(config, processes, in_memory=not spec.streamed):
        accelerator.print(line)

    def backward(loss: torch.Tensor, size: int) -> None:
        accelerator.backward(loss / size)

    # train
    stop, updates, last_save, last_drawn = loop.Stop(), 0, time.monotonic(), -math.inf
    read_every = 1 if processes == 1 and device.type == "cpu" else READ_EVERY
    while at["epoch"] < config.epochs:
        epoch, epoch_start = at["epoch"], time.monotonic() - at["seconds"]
        begun_by = at.get("begun_by", started_with) if at["batch"] else processes
        meter = loop.Meter(over_processes, at["sums"] if first else [0.0, 0.0, 0.0])  # so that they count once
        model.train()
        batches.set_epoch(epoch)
        bar = tqdm(
            total=len(batches), initial=at["batch"], desc=f"epoch {epoch + 1}/{config.epochs}", leave=False,
            disable=not first, dynamic_ncols=True,
        )  # fmt: skip
        for number, (images, target) in enumerate(batches.iterate(at["batch"], begun_by), at["batch"] + 1):
            done = epoch * len(batches) + number
            steps = empf.draw_steps(config.T, config.steps_per_batch, config.seed, done - 1)
            size, update = loop.group(number, config.accumulate, len(batches))
            with (
                health.watch(number) if health else nullcontext(),
                nullcontext() if update else accelerator.no_sync(model),
            ):
                if captured is not None and not (health and number in health.looked_at):
                    loss, logits = captured(images, target, steps=steps, divisor=size)
                else:
                    loss, logits = empf.online_backward(
                        model, images, target, F.cross_entropy, learning=config.learning, steps=steps,
                        backward=partial(backward, size=size), no_sync=lambda: accelerator.no_sync(model),
                    )  # fmt: skip
            meter.add(loss, logits, target)
            bar.update()
            if not update:
                continue
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(config, (done - size) / len(batches))
            optimizer.step()
            optimizer.zero_grad(set_to_none=device.type == "cpu")  # see make_optimizer
            if average is not None:
                average.update_parameters(raw)

            updates += 1
            stop.asked |= updates == config.max_steps
            if number % (read_every * config.accumulate) == 0 or number == len(batches) or updates == config.max_steps:
                (loss_sum, correct, count), stopping = meter.read(stop.asked)
                seconds = time.monotonic() - epoch_start
                if not math.isfinite(loss_sum):
                    raise loop.divergence(batches, number, meter.losses, run)
                drawn = ",".join(map(str, steps)) if config.learning == "random" else config.learning
                shown = {"loss": f"{loss_sum / count:.3f}", "accuracy": f"{100 * correct / count:.1f}%"}
                bar.set_postfix({**shown, "images/s": f"{count / seconds:.0f}", "t": drawn}, refresh=False)
                due = time.monotonic() - last_save >= 60 * config.save_minutes
                if (stopping or due) and number < len(batches):
                    at = {"epoch": epoch, "batch": number, "sums": [loss_sum, correct, count], "seconds": seconds}
                    at["begun_by"] = begun_by
                    save()
                    last_save = time.monotonic()
                    if stopping:
                        break
        bar.close()
        if number < len(batches):
            break  # stopped within the epoch

        # test, record, save
        share_norms = partial(loop.average_norms, mean=partial(over_processes, how="mean"))
        for network in [raw] if average is None else [raw, evaluated]:  # in the same order everywhere
            share_norms(network)
        with accelerator.autocast():
            empf.calibrate(evaluated, (images for images, _ in islice(plain_batches, CALIBRATION)))
            share_norms(evaluated)
            right = over_processes(correct_per_step(evaluated, test_batches)).tolist()
        rate = learning_rate(config, epoch + 1)
        record = {
            "epoch": epoch + 1, "loss": loss_sum / count, "train_accuracy": 100 * correct / count,
            "accuracy": [100 * r / len(test_set) for r in right],
            "lr": rate, "images_per_s": count / seconds, "seconds": seconds,
        }  # fmt: skip
        if health is not None:
            record["health"] = health.report(min(rate, learning_rate(config, epoch)) / config.lr)
        history.append(record)
        at = {"epoch": epoch + 1, "batch": 0, "sums": [0.0, 0.0, 0.0], "seconds": 0.0}
        save()
        draw = stopping or epoch + 1 == config.epochs or time.monotonic() - last_drawn > DRAW_SECONDS
        save_results(draw)
        last_save = time.monotonic()
        last_drawn = last_save if draw else last_drawn
        if config.tracker:
            accelerator.log(loop.scalars(record), step=epoch + 1)
        accelerator.print(loop.epoch_line(record))
        for line in loop.warning_lines(record):
            accelerator.print(line)
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
            stored = runs.training_of(runs.read_config(resumed), resumed).to_dict()
            config, run = settings.for_resume(stored, given), Path(resumed)
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
    except RuntimeError as error:
        if not process_died(error):
            raise
        sys.exit("error: another process has died; what was saved is intact, continue with --resume")
    except KeyboardInterrupt:  # from the first batch on, Ctrl-C is for Stop
        sys.exit("stopped before the first batch")


if __name__ == "__main__":
    main()
