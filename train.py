"""Train a spiking neural network online, one random time step per batch.

    accelerate launch train.py                                    digits, needs no network
    accelerate launch train.py --dataset cifar100                 ResNet-18, 300 epochs, near the authors' recipe
    accelerate launch train.py --resume runs/cifar100-resnet18    continue where the run stopped

Every field of `empf.training.config.TrainConfig` is a flag. The run folder is described in `empf/runs.py`, what is
around the loop in `empf/training/session.py`.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read when torch loads: on a busy machine, long spinning crawls

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import empf
from empf.data.load import keep_apart, load_data, make_batches
from empf.evaluate import scores
from empf.terminal import shown, steady_output
from empf.training.capture import CapturedBackward
from empf.training.config import TrainConfig
from empf.training.fine_tuning import freeze, take_weights
from empf.training.flip import Flips
from empf.training.growth import grown, lend_steps, stage_of
from empf.training.health import Health
from empf.training.initial import begun
from empf.training.optimizers import flips_of, learning_rate, make_optimizer
from empf.training.processes import average_norms, make_accelerator, settle, start_processes, total, what_to_do
from empf.training.session import Batch, Session, check_size, of_call
from empf.training.sync_norm import sync_norms

CALIBRATION = 20  # batches of training images as they are, from which Mem-BN takes its statistics before a test


def train(accelerator: Accelerator, config: TrainConfig, run: Path | None = None) -> None:
    """Train a new network, or continue the run in the folder `run`."""
    with Session(accelerator, config, run) as session:
        device = accelerator.device

        # data, resident on the device; each process has its share of every batch
        train_set, test_set = load_data(
            config.dataset, config.data, limit=config.limit, device=device, **config.reading()
        )
        train_set, held = keep_apart(train_set, test_set, config.hold_out)
        share = dict(rank=accelerator.process_index, world=accelerator.num_processes, workers=config.workers)
        of_train = partial(make_batches, train_set, session.batch_size, train=True, seed=config.seed, **share)
        batches, plain_batches = of_train(augment=config.augment()), of_train()
        of_test = partial(make_batches, batch_size=max(session.batch_size, 256), train=False, **share)
        tests = [of_test(data) for data in (test_set, held) if data is not None]

        # network and optimizer
        check_size(config.model(train_set.spec), config, device)
        torch.manual_seed(config.seed)
        raw = begun(empf.build(config.model(train_set.spec)), config).to(device, memory_format=torch.channels_last)
        if config.init_from is not None and session.state is None:
            taken = take_weights(raw, empf.from_pretrained(config.init_from), train_set.class_names)
            session.notes.append(f"started from {config.init_from}: {taken}")
        frozen = freeze(raw, config.freeze)
        if config.sync_bn and accelerator.num_processes > 1:
            sync_norms(raw)
        flips = flips_of(raw, config, session.notes)
        optimizer = make_optimizer(raw, config)
        ema = get_ema_multi_avg_fn(config.ema)
        average = AveragedModel(raw, multi_avg_fn=ema, use_buffers=True) if config.ema else None
        evaluated = raw if average is None else average.module
        health = Health(raw, len(batches), frozen) if config.health and accelerator.is_main_process else None
        parts = dict(model=raw, optimizer=optimizer, average=average, health=health, flips=flips)
        session.begin(train_set, test_set, held, evaluated, **parts)
        model = accelerator.prepare(raw)
        captured = CapturedBackward(model, F.cross_entropy, learning=config.learning) if config.cuda_graphs else None

        for epoch in session.epochs(batches):
            model.train()
            start, stage = session.at["batch"], stage_of(config.grow, config.T, epoch / config.epochs)
            given = grown(raw, batches.iterate(start, session.begun_by), stage)
            for batch in updates(
                model, given, optimizer, epoch * len(batches) + start, len(batches),
                draw=partial(empf.draw_steps, stage.T, min(config.steps_per_batch, stage.T), config.seed),
                rate=lambda done: learning_rate(config, done / len(batches)),
                learning=config.learning, accumulate=config.accumulate,
                accelerator=accelerator, health=health, captured=captured, flips=flips,
            ):  # fmt: skip
                if batch.update and average is not None:
                    average.update_parameters(raw)
                if session.count(batch):
                    break
            else:
                for network in dict.fromkeys((raw, evaluated)):  # in the same order everywhere
                    average_norms(network)
                    lend_steps(network, stage.T)
                with accelerator.autocast():
                    empf.calibrate(evaluated, (images for images, _ in islice(plain_batches, CALIBRATION)))
                    average_norms(evaluated)
                    due = tests if session.test_is_due() else ()
                    sums = [total(scores(evaluated, test).to(device)).tolist() for test in due]
                session.record(*sums)


def updates(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    done: int,
    length: int,
    *,
    draw: Callable[[int], Sequence[int]],
    rate: Callable[[int], float],
    learning: str = "random",
    accumulate: int = 1,
    accelerator: Accelerator | None = None,
    health: Health | None = None,
    captured: CapturedBackward | None = None,
    flips: Flips | None = None,
) -> Iterator[Batch]:
    """Train on the batches (images, target) of an epoch of `length`, `done` batches having gone before in all.

    draw: the time steps of a batch, by the number of batches before it; rate: likewise the learning rate.
    accumulate: batches per update. accelerator: of several processes or mixed precision; health looks at some batches,
    the others are replayed from a graph where they are `captured`. flips: update synapses within the backward passes.
    """
    backward = Tensor.backward if accelerator is None else accelerator.backward
    no_sync = nullcontext if accelerator is None else partial(accelerator.no_sync, model)
    no_sync = no_sync if flips is None else partial(flips.gathering, no_sync)
    for before, (images, target) in enumerate(batches, done):
        number = before % length + 1
        size = min(accumulate, length - (number - 1) // accumulate * accumulate)  # batches that share the update
        update = number % accumulate == 0 or number == length
        steps = draw(before)
        if flips is not None:
            flips.lr = rate(before - (number - 1) % accumulate)
        with health.watch(number) if health else nullcontext(), nullcontext() if update else no_sync():
            if captured is not None and not (health and number in health.looked_at):
                loss, logits = captured(images, target, steps=steps, divisor=size)
            else:
                loss, logits = empf.online_backward(
                    model, images, target, F.cross_entropy, learning=learning, steps=steps,
                    backward=lambda loss, size=size: backward(loss / size), no_sync=no_sync,
                )  # fmt: skip
        if update:
            for group in optimizer.param_groups:
                group["lr"] = rate(before + 1 - size)
            optimizer.step()
            optimizer.zero_grad(set_to_none=images.device.type == "cpu")  # see make_optimizer
        yield Batch(loss, logits, target, steps, update)


def main(argv: list[str] | None = None) -> None:
    with steady_output():
        try:
            config, run = of_call(argv)
            start_processes(sys.argv)
            accelerator = make_accelerator(config)
            train(accelerator, config, run)
            settle()
            accelerator.end_training()
        except (ValueError, OSError) as error:  # bad flags, data, checkpoints, a full disk: one sentence
            sys.exit(f"error: {shown(error, 1000)}")
        except RuntimeError as error:
            if (sentence := what_to_do(error)) is None:
                raise
            sys.exit(f"error: {sentence}")
        except KeyboardInterrupt:  # from the first batch on, Ctrl-C is for Stop
            sys.exit("stopped before the first batch")


if __name__ == "__main__":
    main()
