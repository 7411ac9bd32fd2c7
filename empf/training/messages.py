"""What training says to people: what is trained on what, what was asked for in vain, how each epoch went."""

from dataclasses import fields

from torch import nn

from empf.accounting import account
from empf.data.events import EventSet
from empf.data.sets import DATASETS, ImageSet, StreamSet, is_held_out
from empf.models import SpikingNetwork
from empf.training.config import TrainConfig, of_launcher

SHOWN = 5  # warnings per epoch
FEW = 50  # updates, after which running statistics are not yet those of the network
Data = ImageSet | StreamSet | EventSet


def headline(model: SpikingNetwork, train: Data, test: Data, held: Data | None = None) -> str:
    """The network and its size, and how many images are for what."""
    config, size = model.config, account(model)
    sizes = f"{size['params_mb']:.2f} MB ({size['params_full_mb']:.2f} MB full)"
    counts, tail = f"{len(train)} training, ", f"; tested on {test.split}" if is_held_out(test) else ""
    if held is not None:
        counts, tail = f"{counts}{len(held)} held-out, ", f"; {held.split}, chooses the best epoch"
    return f"{config.arch}, {config.weights} weights, T = {config.T}: {sizes}; {counts}{len(test)} test images{tail}"


def without_effect(config: TrainConfig, processes: int, data: Data, model: nn.Module) -> list[str]:
    """A line for each flag that was given in vain, by the launcher, or beside one that would help it, for people."""
    in_memory, own_threshold = not isinstance(data, StreamSet), config.threshold != TrainConfig.threshold
    parallel = sum(getattr(module, "parallel", False) for module in model.modules())
    alone = "does nothing in a single process, start several with accelerate launch --num_processes N"
    idle = {f.name: config.optimizer != "flip" for f in fields(config) if f.name.startswith("flip_")}
    idle = {name: holds and "without --optimizer flip" for name, holds in idle.items()} | {
        "shortcut": config.arch == "vgg_snn" and "in a network without shortcuts",
        "granularity": config.weights != "ternary" and "without --weights ternary",
        "seca_bias": config.seca == 0 and "without --seca",
        "latent_init": config.weights == "full" and "with --weights full",
    }
    found = (
        {
            f"--{name.replace('_', '-')} {value}, as accelerate launch says": True
            for name, value in of_launcher(config.to_dict()).items()
        }
        | {
            f"--{name.replace('_', '-')} does nothing {why}": why
            and getattr(config, name) != getattr(TrainConfig, name)
            for name, why in idle.items()
        }
        | {
            f"--sync-bn {alone}": config.sync_bn and processes == 1,
            f"--grad-compression {alone}": config.grad_compression != "none" and processes == 1,
            f"--workers does nothing, {config.dataset} lies in memory": config.workers > 0 and in_memory,
            f"--flip does nothing, mirrored {config.dataset} may be of other classes": config.flip > data.spec.flip,
            f"--parallel {config.parallel:g} is too little, no neuron is parallel": config.parallel > 0 == parallel,
            "--threshold is that of --init-from where its neurons fit": config.init_from is not None and own_threshold,
            "n-bit spikes have trained better with --spike-gradient clipped": config.spike_bits is not None
            and config.spike_gradient == "identity",
        }
    )
    return [f"note: {line}" for line, holds in found.items() if holds]


def few_updates(config: TrainConfig, batches: int) -> str | None:
    """A line where so few images of one's own are trained on for so few epochs that nothing can come of it."""
    updates = config.epochs * -(-batches // config.accumulate)
    if updates >= FEW or config.dataset in DATASETS:
        return None
    count = f"{updates} updates in all, of {config.batch_size} images each"
    return f"note: {count}, are few: give more --epochs or a smaller --batch-size"


def epoch_line(record: dict) -> str:
    """One line of metrics.jsonl for people."""
    tested = "held out" if "tested_on" in record else "test"  # where nothing else is
    per_step = " ".join(f"{a:.2f}" for a in record.get("accuracy", []))
    test = f"{tested} after each step {per_step} %  " if per_step else ""
    held = f"held out {record['held_out'][-1]:.2f} %  " if "held_out" in record and tested == "test" else ""
    return (
        f"epoch {record['epoch']:3d}  loss {record['loss']:.4f}  train {record['train_accuracy']:.2f} %  {held}"
        f"{test}{record['images_per_s']:.0f} images/s  {record['seconds']:.1f} s"
    )


def warning_lines(record: dict) -> list[str]:
    """The first few warnings of an epoch, for people; one fault brings about many."""
    warnings = record.get("health", {}).get("warnings", [])
    lines = [f"warning: {warning}" for warning in warnings[:SHOWN]]
    more = len(warnings) - len(lines)
    return lines + [f"warning: {more} more: python -m empf.training.health RUN"] if more else lines
