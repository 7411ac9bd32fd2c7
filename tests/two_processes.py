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
from train_tools import TINY

import empf
import train
from empf import config as settings
from empf import runs
from empf.data import Augment, Batches, load

CASES = {  # settings of the network; mode of learning; steps drawn in two batches, T = 2
    "random": ({}, "random", [[2], [1]]),
    "two steps": ({}, "random", [[1, 2], [1, 2]]),
    "mem_bn": ({"neuron": "mem_bn"}, "random", [[1], [2]]),
    "parallel": ({"parallel": 0.5, "spike_bits": 4}, "random", [[2], [2]]),
    "all parallel": ({"parallel": 1.0}, "random", [[1], [1]]),
    "seca": ({"seca": 2}, "every", [[], []]),
    "stbp": ({"neuron": "mem_bn", "seca": 1}, "stbp", [[], []]),
    "lif": ({"neuron": "lif"}, "random", [[2], [1]]),
}


def gradients(model, batch, learning, steps, **wrappers) -> dict[str, torch.Tensor]:
    images, target = batch
    empf.online_backward(model, images.double(), target, F.cross_entropy, learning=learning, steps=steps, **wrappers)
    named = (model.module if hasattr(model, "module") else model).named_parameters()
    return {name: p.grad.clone() for name, p in named}


def compare_gradients(accelerator, network: dict, learning: str, draws: list[list[int]]) -> dict[str, float]:
    """Largest difference between the gradients of two processes and of one that has the joined batch, in float64.

    Norms are frozen. Two batches: DDP complains about a parameter without a gradient when the second one comes.
    """
    data, _ = load("digits", limit=48)
    augment = Augment(crop=True, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    part = Batches(data, 12, train=True, augment=augment, rank=accelerator.process_index, world=2)
    joined = Batches(data, 24, train=True, augment=augment)
    torch.manual_seed(0)
    config = settings.from_flags({"width": 0.125, "T": 2, **network}).model()
    single = empf.build(config).double().train()
    empf.freeze_norm(single)
    double = empf.build(config).double().train()
    double.load_state_dict(single.state_dict())
    empf.freeze_norm(double)
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
    return {"difference": difference, "largest": largest, "without": without}


class Spy:
    """Notes the steps drawn, the running means evaluated and the files written; sends SIGTERM at batch `signal_at`."""

    def __init__(self):
        self.backward, self.evaluate, self.write = train.empf.online_backward, train.correct_per_step, runs.write_atomic
        train.empf.online_backward, train.correct_per_step = self.on_batch, self.on_test
        runs.write_atomic = self.on_write
        self.steps, self.means, self.files, self.signal_at = [], [], [], None

    def on_batch(self, *args, steps, **kwargs):
        self.steps.append(steps)
        if len(self.steps) == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.backward(*args, steps=steps, **kwargs)

    def on_test(self, model, batches):
        self.means.append(model.stem.bn.running_mean.tolist())
        return self.evaluate(model, batches)

    def on_write(self, path, data):
        self.files.append(path.name)
        self.write(path, data)


def main(folder: Path) -> None:
    runs.has_matplotlib = lambda: False  # drawing the curves would take most of the time
    flags = partial(settings.parser().parse_args)
    accelerator = train.make_accelerator(settings.from_flags(vars(flags(TINY))))
    found = {"gradients": {name: compare_gradients(accelerator, *case) for name, case in CASES.items()}}

    def run(name: str, *extra: str) -> None:
        config = settings.from_flags(
            vars(flags([*TINY, "--batch-size", "16", "--output-dir", str(folder / name), *extra]))
        )
        train.train(accelerator, config, None)

    def resume(name: str) -> None:
        config = settings.for_resume(runs.read_config(folder / name)["train"], {})
        train.train(accelerator, config, folder / name)

    spy = Spy()
    run("whole")
    found |= {name: gather_object([getattr(spy, name)]) for name in ("steps", "means", "files")}
    run("within", "--max-steps", "2")
    resume("within")
    run("between", "--max-steps", "3")
    resume("between")
    spy.steps.clear()
    spy.signal_at = 2 if accelerator.process_index == 1 else None
    run("signalled")
    found["signalled"] = gather_object([len(spy.steps)])
    if accelerator.is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
