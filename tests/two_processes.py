"""What test_distributed.py looks at, done by both processes of `accelerate launch`: FOLDER/found.json on exit."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from train_tools import TINY, in_double

import empf
import train
from empf import runs
from empf.data.batches import Augment, Batches
from empf.data.load import load_data
from empf.training import config as settings
from empf.training import processes, session
from empf.training.sync_norm import sync_norms

# 2 epochs of 10 joined batches of 32 images, the same for any number of processes
SYNC = ["--epochs", "2", "--limit", "320", "--sync-bn", "--no-crop"]
FLIP = [*SYNC, "--epochs", "1", "--optimizer", "flip", "--lr", "0.05", "--steps-per-batch", "2"]

CASES = {  # settings of the network; mode of learning; steps drawn in two batches, T = 2; are the norms joined
    "random": ({}, "random", [[2], [1]]),
    "two steps": ({}, "random", [[1, 2], [1, 2]]),
    "mem_bn": ({"neuron": "mem_bn"}, "random", [[1], [2]]),
    "parallel": ({"parallel": 0.5, "spike_bits": 4}, "random", [[2], [2]]),
    "all parallel": ({"parallel": 1.0}, "random", [[1], [1]]),
    "seca": ({"seca": 2}, "every", [[], []]),
    "stbp": ({"neuron": "mem_bn", "seca": 1}, "stbp", [[], []]),
    "lif": ({"neuron": "lif"}, "random", [[2], [1]]),
    "joined norms": ({"seca": 1}, "random", [[2], [1]], True),
    "joined mem_bn": ({"neuron": "mem_bn", "parallel": 0.5}, "random", [[1, 2], [2]], True),
    "joined, stbp": ({"neuron": "mem_bn", "arch": "resnet19"}, "stbp", [[], []], True),
}


def gradients(model, batch, learning, steps, **wrappers) -> dict[str, torch.Tensor]:
    images, target = batch
    empf.online_backward(model, images.double(), target, F.cross_entropy, learning=learning, steps=steps, **wrappers)
    named = (model.module if hasattr(model, "module") else model).named_parameters()
    return {name: p.grad.clone() for name, p in named}


def compare_gradients(
    accelerator, network: dict, learning: str, draws: list[list[int]], joined_norms: bool = False
) -> dict[str, float]:
    """Largest difference between the gradients of two processes and of one that has the joined batch, in float64.

    Norms are frozen, or have the statistics of the joined batch. Two batches: DDP complains about a parameter without
    a gradient when the second one comes.
    """
    data, _ = load_data("digits", limit=48)
    augment = Augment(crop=True, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    part = Batches(data, 12, train=True, augment=augment, rank=accelerator.process_index, world=2)
    joined = Batches(data, 24, train=True, augment=augment)
    torch.manual_seed(0)
    config = settings.from_flags({"width": 0.125, "T": 2, **network}).model()
    single = empf.build(config).double().train()
    with torch.no_grad():
        for _ in range(20):  # running statistics with which the neurons fire
            empf.reset(single)
            single(next(iter(joined))[0].double())
    double = empf.build(config).double().train()
    double.load_state_dict(single.state_dict())
    if joined_norms:
        sync_norms(double)
    empf.freeze_norm(single, not joined_norms)
    empf.freeze_norm(double, not joined_norms)
    model = accelerator.prepare(double)
    wrappers = dict(backward=accelerator.backward, no_sync=lambda: accelerator.no_sync(model))
    difference, largest, without = 0.0, 0.0, 0
    for steps, batch, whole in zip(draws, part, joined, strict=True):
        found = gradients(model, batch, learning, steps, **wrappers)
        expected = gradients(single, whole, learning, steps)
        without += sum(p.grad is None for p in model.parameters())
        for name in expected:
            difference = max(difference, (found[name] - expected[name]).abs().max().item())
            largest = max(largest, expected[name].abs().max().item())
        model.zero_grad()
        single.zero_grad()
    for mine, other in zip(double.buffers(), single.buffers(), strict=True):
        difference = max(difference, (mine - other).abs().max().item())
    silent = sum(not expected[name].any() for name in expected if name.endswith("conv.weight"))
    return {"difference": difference, "largest": largest, "without": without, "silent": silent}


class Spy:
    """Notes steps drawn, losses, running means and heads evaluated, files written; SIGTERM at batch `signal_at`."""

    def __init__(self):
        self.backward, self.evaluate, self.write = train.empf.online_backward, train.scores, runs.write_atomic
        train.empf.online_backward, train.scores = self.on_batch, self.on_test
        runs.write_atomic = self.on_write
        self.steps, self.losses, self.means, self.heads, self.files, self.signal_at = [], [], [], [], [], None

    def on_batch(self, *args, steps, **kwargs):
        self.steps.append(steps)
        if len(self.steps) == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss, logits = self.backward(*args, steps=steps, **kwargs)
        self.losses.append(loss.item())
        return loss, logits

    def on_test(self, model, batches):
        self.means.append(model.stem.bn.running_mean.tolist())
        self.heads.append(model.head.weight.norm().item())
        return self.evaluate(model, batches)

    def on_write(self, path, data):
        self.files.append(path.name)
        self.write(path, data)


def main(folder: Path) -> None:
    session.has_matplotlib = lambda: False  # drawing the curves would take most of the time
    flags = partial(settings.parser().parse_args)
    accelerator = train.make_accelerator(settings.from_flags(vars(flags(TINY))))
    found = {"gradients": {name: compare_gradients(accelerator, *case) for name, case in CASES.items()}}

    def run(name: str, *extra: str, engine=accelerator) -> None:
        config = settings.from_flags(
            vars(flags([*TINY, "--batch-size", "16", "--output-dir", str(folder / name), *extra]))
        )
        train.train(engine, config, None)

    def resume(name: str) -> None:
        accelerator.wait_for_everyone()  # the first process has just saved
        config = settings.for_resume(runs.read_config(folder / name)["train"], {})
        train.train(accelerator, config, folder / name)

    spy = Spy()
    run("whole")
    found |= {name: gather_object([getattr(spy, name)]) for name in ("steps", "means", "files")}
    spy.means.clear()
    for name in ("averaged", "averaged again"):
        run(name, "--ema", "0.5", "--epochs", "1")
    found["averaged"] = gather_object([spy.means])
    run("within", "--max-steps", "2")
    resume("within")
    run("between", "--max-steps", "3")
    resume("between")

    spy.losses.clear()
    with in_double():
        run("joined", *SYNC)
        found["joined"] = gather_object([spy.losses])
        run("two then one", *SYNC, "--max-steps", "14")
        resume("one then two")  # the test has begun it
        run("flipped", *FLIP, "--max-steps", "7")
        resume("flipped")

    processes.COMPRESSION["powersgd"][1]["start_powerSGD_iter"] = 2
    compressing = train.make_accelerator(settings.from_flags(vars(flags([*TINY, "--grad-compression", "powersgd"]))))
    spy.heads.clear()
    run("compressed", "--grad-compression", "powersgd", engine=compressing)
    found["compressed"] = gather_object([spy.heads])
    try:
        train.make_accelerator(settings.from_flags(vars(flags([*TINY, "--grad-compression", "bf16"]))))
    except ValueError as error:
        found["bf16"] = str(error)

    spy.steps.clear()
    spy.signal_at = 2 if accelerator.process_index == 1 else None
    run("signalled")
    found["signalled"] = gather_object([len(spy.steps)])
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    processes.settle()
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
