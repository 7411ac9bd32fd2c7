"""Can the network still learn? A cheap look at a few batches of each epoch, and warnings with a name and a remedy.

    density     share of non-zero spikes of each layer of neurons, over the time steps that were run
    gradient    |dW| / |W| of each layer of synapses, Frobenius norms
    flips       share of the 1-bit (or ternary) weights that are no longer what they were an epoch ago
    leak, threshold, alpha, beta    smallest and largest value in each layer of neurons

Nothing is read from the device while the epoch runs. In training by several processes the first one looks, at its own
part of the batches.

    python -m empf.training.health RUN    all warnings of a run, by epoch
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from empf.neuron import EMPFNeuron, StatefulNeuron
from empf.runs import is_count, is_numbers, read_metrics, unlike
from empf.synapse import quantize_weight
from empf.terminal import shown, steady_output

LOOKS, IMAGES = 4, 16  # batches per epoch, and at most every twentieth; images of them whose spikes are counted
SPARSE, DENSE = 1e-3, 0.98  # shares of non-zero spikes
EDGE = 0.01  # a sigmoid this close to 0 or 1 has lost 96 % of its slope
LARGE = 10.0  # of alpha and beta, which start at 0.5
VANISHED = 1e-4  # of the largest gradient of all layers
FEW_BITS = 2  # so few clip most spikes: thresholds and leaks run away, which a lower learning rate only delays
RATE, EXPECTED = 0.1, 20  # weights flip above this share of the peak learning rate, if so many would at the median rate


class Health:
    """What is seen of any network in one epoch of `batches` batches, and its quantised weights of an epoch ago.

    `watch(number)` goes around the forward and backward pass of each batch, `report` ends the epoch. `frozen`: names of
    parameters that are meant to stay as they are.
    """

    def __init__(self, model: nn.Module, batches: int, frozen: Collection[str] = ()):
        self.model, self.frozen = model, frozen
        every = max(20, -(-batches // LOOKS))
        self.looked_at = set(range(min(every, batches), batches + 1, every))
        self.neurons = {name: m for name, m in model.named_modules() if isinstance(m, StatefulNeuron)}
        low_bit = {name: m for name, m in model.named_modules() if hasattr(m, "kind")}
        dense = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        self.synapses = dense | low_bit
        self.kinds = {name: m.kind for name, m in low_bit.items()}
        wanted = getattr(getattr(model, "config", None), "weights", "full")
        if wanted != "full":  # a network of this library says itself what its hidden layers have to be
            self.kinds |= {n: wanted for n in dense.keys() - low_bit.keys() if n.split(".")[0] not in ("stem", "head")}
        self.states = self.weight_states()
        self.clear()

    def clear(self) -> None:
        self.seen: dict[str, dict[str, list]] = {"density": {}, "gradient": {}}  # per layer: sum, what it is divided by
        self.stateful: dict[str, list[int]] = {}  # parallel layers with a potential of this shape

    @contextmanager
    def watch(self, number: int) -> Iterator[None]:
        """Look at the batch inside, if its number (from 1) is one of the few."""
        if number not in self.looked_at:
            yield
            return
        for name, m in self.neurons.items():
            m.observer = partial(self.count, name)
        try:
            yield
        finally:
            for m in self.neurons.values():
                m.observer = None
        for name, m in self.synapses.items():
            if m.weight.grad is not None:
                self.add("gradient", name, m.weight.grad.norm() / m.weight.detach().norm().clamp(min=1e-30), 1)
        for name, m in self.neurons.items():
            if getattr(m, "parallel", False) and m.v is not None:
                self.stateful[name] = list(m.v.shape)

    def count(self, name: str, spikes: Tensor) -> None:
        some = spikes[:, :IMAGES]
        self.add("density", name, torch.count_nonzero(some), some.numel())

    def add(self, what: str, name: str, value: Tensor, count: int) -> None:
        total = self.seen[what].setdefault(name, [0, 0])
        total[0], total[1] = total[0] + value, total[1] + count

    @torch.no_grad()
    def weight_states(self) -> dict[str, Tensor]:
        """-1, 0 or 1 for each weight that has to be binary or ternary."""
        found = {}
        for name, kind in self.kinds.items():
            granularity = getattr(self.synapses[name], "granularity", "channel")
            found[name] = quantize_weight(self.synapses[name].weight, kind, granularity).sign().to(torch.int8)
        return found

    def state_dict(self) -> dict:
        """For a run that is continued, also within an epoch."""
        seen = {
            what: {n: [float(total), count] for n, (total, count) in layers.items()}
            for what, layers in self.seen.items()
        }
        return {"states": self.states, "seen": seen, "stateful": self.stateful}

    def load_state_dict(self, state: dict | None) -> None:
        """After the model's; None where the run went without so far. Raises ValueError unless it fits."""
        if state is None:
            self.states = self.weight_states()
            return
        layers = {"density": self.neurons, "gradient": self.synapses}
        wanted = {
            "states": self.states, "stateful": {n: at for n, at in state["stateful"].items() if n in self.neurons},
            "seen": {w: {n: [0.0, 1] for n in state["seen"][w] if n in layers[w]} for w in layers},
        }  # fmt: skip
        if (place := unlike(state, wanted, "health")) is not None:
            raise ValueError(place)
        sums = [pair for layers in state["seen"].values() for pair in layers.values()]
        if not all(is_numbers(pair) and is_count(pair[1], 1) for pair in sums):
            raise ValueError("health seen")
        if not all(map(is_numbers, state["stateful"].values())):
            raise ValueError("health stateful")
        device = next(self.model.parameters()).device
        self.states = {name: tensor.to(device) for name, tensor in state["states"].items()}
        self.seen, self.stateful = state["seen"], dict(state["stateful"])

    @torch.no_grad()
    def report(self, rate: float) -> dict:
        """End the epoch: the values of each layer, and `warnings`, a list of sentences.

        `rate`: the lowest learning rate of the epoch as a share of the peak.
        """
        values = {what: {n: float(s) / c for n, (s, c) in layers.items()} for what, layers in self.seen.items()}
        states = self.weight_states()
        values["flips"] = {n: (now != self.states[n]).float().mean().item() for n, now in states.items()}
        ranges = {name: self.ranges(name) for name in ("leak", "threshold", "alpha", "beta")}
        warnings = [
            *self.density_warnings(values["density"]),
            *self.range_warnings(ranges),
            *self.gradient_warnings(values["gradient"]),
            *self.flip_warnings(values["flips"], rate),
            *self.structure_warnings(),
        ]
        self.states = states
        self.clear()
        return {**rounded(values), **rounded({k: v for k, v in ranges.items() if v}), "warnings": warnings}

    def ranges(self, parameter: str) -> dict[str, list[float]]:
        """Smallest and largest value in each layer that learns this parameter."""
        learning = {
            n: getattr(m, parameter)
            for n, m in self.neurons.items()
            if isinstance(m, EMPFNeuron) and hasattr(m, parameter) and not (m.parallel and parameter == "leak")
        }
        return {n: [v.min().item(), v.max().item()] for n, v in learning.items()}

    def density_warnings(self, density: dict[str, float]) -> Iterator[str]:
        for name, share in density.items():
            if share < SPARSE:
                yield (
                    f"{name}: only {100 * share:.2g} % of its spikes are not zero, what follows it learns nothing: "
                    "start again with a lower --lr or more --warmup-epochs"
                )
            if share > DENSE and getattr(self.neurons[name], "activation", "relu") == "relu":
                yield (
                    f"{name}: {100 * share:.1f} % of its spikes are not zero, its threshold does not select any more: "
                    "start again with a lower --lr, or with --neuron mem_bn"
                )

    def range_warnings(self, ranges: dict[str, dict[str, list[float]]]) -> Iterator[str]:
        for parameter, layers in ranges.items():
            bounds = (EDGE, 1 - EDGE) if parameter in ("leak", "threshold") else (-LARGE, LARGE)
            for name, (low, high) in layers.items():
                if not (bounds[0] <= low and high <= bounds[1]):  # also where one is not a number
                    value = high if not high <= bounds[1] else low
                    yield (
                        f"{name}: its {parameter} has run away to {value:.4g} (of {bounds[0]:g} to {bounds[1]:g}): "
                        f"start again with {self.remedy('a lower --lr or more --warmup-epochs')}"
                    )

    def remedy(self, otherwise: str) -> str:
        """What to try; `otherwise`: where it is not for want of spike bits."""
        few = [n for n in self.neurons.values() if (getattr(n, "spike_bits", None) or 32) <= FEW_BITS]
        if not few:
            return otherwise
        clip = " or --spike-gradient clipped" * any(n.spike_gradient != "clipped" for n in few)
        return f"more --spike-bits than {min(n.spike_bits for n in few)}{clip}"

    def gradient_warnings(self, gradient: dict[str, float]) -> Iterator[str]:
        largest = max(gradient.values(), default=0.0)
        for name, size in gradient.items():
            if size < VANISHED * largest:
                yield (
                    f"{name}: its gradient vanishes, |dW| / |W| is {size:.2g} and {largest:.2g} elsewhere: look for a "
                    f"silent layer behind it, or start again with {self.remedy('--neuron mem_bn or fewer layers')}"
                )

    def flip_warnings(self, flips: dict[str, float], rate: float) -> Iterator[str]:
        """Late in the schedule nothing flips, and in a small layer not always something."""
        flips = {name: share for name, share in flips.items() if f"{name}.weight" not in self.frozen}
        usual = median(flips.values()) if flips else 0.0
        for name, share in flips.items():
            weights = self.states[name].numel()
            if share == 0 and rate >= RATE and (usual == 0 or usual * weights >= EXPECTED):
                yield (
                    f"{name}: none of its {weights} weights has flipped in this epoch, it has stopped learning: raise "
                    "--lr, and check that the layer is not frozen (requires_grad, latent weights beyond -1..1)"
                )

    def structure_warnings(self) -> Iterator[str]:
        for name, shape in self.stateful.items():
            yield (
                f"{name}: it is parallel, but holds a membrane potential of shape {tuple(shape)}: "
                "its steps depend on each other; let its forward leave v = None"
            )
        for name, kind in self.kinds.items():
            module = self.synapses[name]
            rows = (module.effective_weight() if hasattr(module, "effective_weight") else module.weight).flatten(1)
            size = rows.abs()
            fits = size == size.amax(1, keepdim=True)
            if kind == "ternary":
                fits |= size == 0
            if not fits.all():
                channel = int((~fits).sum(1).argmax())
                yield (
                    f"{name}: it is not {kind}, channel {channel} has {len(rows[channel].unique())} different weights: "
                    "build it as BinaryConv2d or BinaryLinear, else it cannot be packed"
                )


def rounded(values: dict) -> dict:
    """Four significant digits are enough for a log."""
    if isinstance(values, dict):
        return {name: rounded(value) for name, value in values.items()}
    return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.4g}")


def listed(run: Path) -> list[str]:
    """All warnings of a run folder, one line each. Raises FileNotFoundError, or ValueError for a damaged file."""
    if not (run / "metrics.jsonl").exists():
        raise FileNotFoundError(f"{run} has no metrics.jsonl: give a run folder that train.py wrote")
    return [f"epoch {r['epoch']}: {w}" for r in read_metrics(run) for w in r.get("health", {}).get("warnings", [])]


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.exit("error: give one run folder: python -m empf.training.health RUN")
    with steady_output():
        try:
            print("\n".join(map(shown, listed(Path(argv[0])))) or "no warnings")
        except (ValueError, OSError) as error:
            sys.exit(f"error: {shown(error)}")


if __name__ == "__main__":
    main()
