"""Run folders of which something was altered: refused in one sentence, or the same network, nothing else.

    python tests/fuzz_runs.py 20000 [SEED]

A case changes bytes, values or tensors of config.json, metrics.jsonl, model.safetensors or state.pt, or puts another
thing in the place of a file. Weights or settings that are others may make another network, which is sound, and of
which nothing is claimed.
"""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from random import Random
from unittest import mock

import safetensors.torch
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fuzz_packed import SHALLOW
from fuzz_tools import by_hand, refusal, some_bytes, some_value
from torch.optim.swa_utils import AveragedModel
from train_tools import run_train

import empf
from empf import models, runs
from empf.deploy.origin import Origin
from empf.training.config import TrainConfig, training_of
from empf.training.health import Health
from empf.training.optimizers import make_optimizer
from empf.training.session import restore

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FILES = ("config.json", "metrics.jsonl", "model.safetensors", "state/state.pt")
NUMBERS, WHOLE = [float("nan"), float("inf"), 1e38, 0.0], [0, 1, 127]
TENSORS = [
    torch.ones(1), torch.zeros(0), torch.ones(3, dtype=torch.int64), torch.ones(2, dtype=torch.complex64),
    torch.zeros(1).expand(10**6, 10**6), torch.full((10,), float("nan")), torch.ones(2, 2).to_sparse(),
]  # fmt: skip


@cache
def original(folder: Path) -> tuple[Path, torch.Tensor]:
    """(run, logits) of a training that was stopped within its second epoch."""
    run = folder / "original"
    run_train("--ema", "0.5", "--max-steps", "4", "--output-dir", run)
    net = empf.load(run)
    assert Origin.of(net).accuracy
    with torch.no_grad():
        return run, net(X)


def some_tensors(tensors: dict, r: Random) -> None:
    name, other = r.choice(list(tensors)), r.choice(list(tensors))
    tensor, how = tensors[name], r.randrange(8)
    if not isinstance(tensor, torch.Tensor) or how == 0:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif how == 1:
        del tensors[name]
    elif how == 2:
        tensors[r.choice(["more", "\x1b[2J", "n" * 5000])] = tensor
    elif tensor.numel() > 10**7 or tensor.layout != torch.strided:
        tensors[name] = tensors[other]
    elif how == 3:
        tensors[name] = tensor.to(r.choice([torch.float64, torch.float16, torch.int32, torch.uint8]))
    elif how == 4:
        tensors[name] = tensor.flatten()[: r.randrange(tensor.numel() + 1)].clone()
    elif how == 5:
        tensors[name] = tensor.contiguous().clone()
        tensors[name].view(-1)[-1:] = r.choice(NUMBERS if tensor.is_floating_point() else WHOLE)
    elif how == 6:
        tensors[name] = r.choice(TENSORS)
    else:
        tensors[name] = torch.zeros(10**6)


def altered(path: Path, r: Random) -> None:
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 64
    if r.random() < 0.3:
        path.write_bytes(some_bytes(data, r, header))
    elif path.suffix == ".json":
        path.write_text(json.dumps(some_value(json.loads(data), r)))
    elif path.suffix == ".jsonl":
        lines = [json.loads(line) for line in data.splitlines()]
        at = r.randrange(len(lines))
        lines[at] = some_value(lines[at], r)
        path.write_text("\n".join(json.dumps(line) for line in lines))
    elif path.suffix == ".safetensors":
        tensors = dict(sorted(safetensors.torch.load(data).items()))
        some_tensors(tensors, r)
        plain = {n: t.contiguous() for n, t in tensors.items() if t.layout == torch.strided and t.numel() < 10**7}
        path.write_bytes(safetensors.torch.save({n: t.clone() for n, t in plain.items()}))
    else:
        state = torch.load(path, weights_only=True)
        for _ in range(r.choice((1, 1, 3))):
            part = r.choice([state[n] for n in ("model", "average") if isinstance(state.get(n), dict)] or [{}])
            if r.random() < 0.4 and part:
                some_tensors(part, r)
            else:
                state = some_value(state, r, tuple(TENSORS))
                if not isinstance(state, dict):
                    break
        torch.save(state, path)


def another_thing(path: Path, r: Random) -> None:
    """A folder, a link to itself, nothing, or another file of the run in the place of a file."""
    content = [p.read_bytes() for p in sorted(path.parent.iterdir()) if p.is_file()]
    path.unlink()
    how = r.randrange(4)
    if how == 0:
        path.mkdir()
    elif how == 1:
        path.symlink_to(path)
    elif how == 2:
        path.write_bytes(r.choice(content))


def one(r: Random, folder: Path) -> str:
    """What becomes of an altered run, where its network is loaded and where its training is continued."""
    with mock.patch.dict(models.RESNETS, SHALLOW):
        whole, wanted = original(folder)
        run = folder / "run"
        shutil.copytree(whole, run)
        try:
            path = run / r.choice(FILES)
            (another_thing if r.random() < 0.05 else altered)(path, r)
            return continued(run) if path.name == "state.pt" or r.random() < 0.1 else loaded(run, wanted)
        finally:
            shutil.rmtree(run)


def loaded(run: Path, wanted: torch.Tensor) -> str:
    try:
        net = empf.load(run)
        origin = Origin.of(net)
        c = net.config
        x = X if (c.in_channels, c.size) == (1, (8, 8)) else torch.ones(1, c.in_channels, *c.size)
        with torch.no_grad():  # long or large within the limits, but not for a test
            found = net(x) if c.T * max(c.size) < 1000 else x
    except (ValueError, FileNotFoundError) as error:
        return refusal(error, run)
    if torch.equal(found, wanted):
        return "the same network"
    assert not origin.accuracy and origin.epochs is None, "results are claimed of another network"
    return "another network"


def continued(run: Path) -> str:
    """As train.py does, without the data."""
    try:
        config: TrainConfig = training_of(runs.read_config(run), run)
        state = runs.load_state(run)
        model = empf.build(config.model())
        runs.check_fits(model.config, {n: tuple(t.shape) for n, t in state["model"].items()}, run)
        average = AveragedModel(model, use_buffers=True) if config.ema else None
        parts = dict(model=model, optimizer=make_optimizer(model, config), average=average, health=Health(model, 3))
        restore(parts, state, run)
        torch.set_rng_state(state["rng"])
        best = runs.best_epoch(state["history"])
    except (ValueError, FileNotFoundError) as error:
        return refusal(error, run)
    numbers = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert all(tensor.isfinite().all() for tensor in numbers)  # 1e38 is finite, and its network is another
    assert best is None or best <= len(state["history"])
    parts["health"].report(1.0)
    return "continued"


if __name__ == "__main__":
    by_hand(one)
