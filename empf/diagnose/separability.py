"""How separable is the gradient in time? Measured on one batch, on the network as it trains (batch statistics).

neurons     each spiking neuron is given the currents that it sees in the network, and autograd returns every
                F[t, t'] = d s[t] / d I[t'],   t' <= t
            F[t, t] is ds/dm. Theory for EM-PF: with on[t] = [mh[t] > threshold] and g the gain of Mem-BN (else 1),
                F[t, t'] = on[t] g[t] * prod_{j = t' .. t-1} leak[j+1] (1 - on[j]) g[j]
            so ds/dm is 0 or g, whatever m is, and nothing crosses a spike; n-bit spikes have the gradient of s. Where
            it is clipped, the first on[t] is 0 above the largest code too, those of the reset are not.
            The online factors are taken twice: all steps in one call, and one call for each, which is what trains.
            Mem-BN: the statistics are those of the batch, taken as constants; then mh = g m + h, and a neuron is a
            function of its own current alone. ds/dm is given in units of g, to a multiple of 2^-20: the neuron and
            this file may form g in different orders of the same operations. Without Mem-BN nothing is rounded.
gradients   of all weights, online against through time: see `empf.diagnose.gradients`.

arXiv 2410.07547, sec. 4
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from empf.diagnose.gradients import compare_gradients
from empf.evaluate import restored
from empf.kernels.neuron import largest
from empf.neuron import StatefulNeuron, per_channel
from empf.online import reset, time_steps

FACTOR_TOLERANCE = 1e-5  # of a measured against a predicted factor, relative to max(1, predicted)
GAIN_ROUNDING = 2.0**-20  # of ds/dm in units of the gain of Mem-BN
FEW_VALUES = 8  # ds/dm with more distinct values is a curve
SAMPLES = 200  # neurons of each layer and step that a figure shows
ELEMENTS = 2**21  # neurons of a layer whose factors are measured: the batch is cut where it has more


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Training mode without gradients from before; afterwards the model is as it was."""
    with restored(model):
        model.train()
        model.zero_grad(set_to_none=True)
        yield


@torch.no_grad()
def record_currents(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The currents (T, N, C, ...) that each spiking neuron sees, by name of the neuron."""
    names = {m: name for name, m in model.named_modules() if isinstance(m, StatefulNeuron)}
    parts: dict[str, list[Tensor]] = {}

    def keep(neuron: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        parts.setdefault(names[neuron], []).append(inputs[0].clone())

    handles = [neuron.register_forward_pre_hook(keep) for neuron in names]
    reset(model)
    try:
        logits = model(x)
    finally:
        for handle in handles:
            handle.remove()
    reset(model)
    T = time_steps(model)
    if logits.dim() != 3 or len(logits) != T:
        raise ValueError(
            f"model(x) must return the logits of all T = {T} steps, (T, N, classes), got shape {tuple(logits.shape)}"
        )
    for name in names.values():
        if (steps := sum(map(len, parts.get(name, [])))) != T:
            raise ValueError(f"the network runs {steps} of the {T} steps of {name}, so its current cannot be measured")
    return {name: torch.cat(parts[name]) for name in names.values()}


@dataclass
class Trajectory:
    """What a neuron does with its currents: a tensor per step, (N, C, ...) or broadcasting to it.

    `near`: in this step or before, m was so close to a switching point (the threshold, or the largest code where the
    gradient is clipped) that rounding decides the side; these are left out of what is compared with the theory.
    """

    x: list[Tensor]  # mh - threshold
    gain: list[Tensor]  # mh = gain * m + shift
    leak: list[Tensor]
    near: list[Tensor]
    top: float  # spikes above it pass no gradient on

    def on(self, t: int) -> Tensor:
        return self.x[t] > 0

    def region(self, t: int) -> Tensor:
        """0 silent (below the threshold), 1 linear (s = mh - threshold), 2 clipped."""
        return self.on(t).int() + (self.x[t] > self.top).int()

    def predicted(self, t: int) -> list[Tensor]:
        """F[t, 0..t] by the theory."""
        product = (self.region(t) == 1) * self.gain[t]
        row = [product]
        for j in reversed(range(t)):
            product = product * self.leak[j + 1] * ~self.on(j) * self.gain[j]
            row.insert(0, product)
        return row


@torch.no_grad()
def follow(neuron: StatefulNeuron, current: Tensor) -> Trajectory:
    """Run the neuron over `current` (T, N, C, ...). Mem-BN is left with the statistics of this batch, frozen."""
    dims = current.dim() - 1
    mem_bn, parallel = getattr(neuron, "mem_bn", False), getattr(neuron, "parallel", False)
    bits = neuron.spike_bits if getattr(neuron, "spike_gradient", None) == "clipped" else None
    path = Trajectory([], [], [], [], float("inf") if bits is None else largest(bits, neuron.spike_step))
    batch = [d for d in range(dims) if d != 1]
    near = torch.zeros_like(current[0], dtype=torch.bool)
    if mem_bn:
        neuron.frozen_norm = True
    neuron.reset()
    for t, i in enumerate(current):  # N C ...
        leak, theta = (per_channel(p[t], dims) for p in (neuron.leak, neuron.threshold))
        m = i if parallel or neuron.v is None else leak * neuron.v + i
        gain, shift = i.new_ones(()), i.new_zeros(())
        if mem_bn:
            neuron.running_mean[t] = m.mean(batch)
            neuron.running_var[t] = m.var(batch, correction=0)
            gain, shift = (per_channel(p[t], dims) for p in neuron.folded_norm())
        x = gain * m + shift - theta
        rounding = 8 * torch.finfo(m.dtype).eps * ((gain * m).abs() + shift.abs() + theta)
        near = near | (x.abs() <= rounding) | ((x - path.top).abs() <= rounding)
        path.x.append(x), path.gain.append(gain), path.leak.append(leak), path.near.append(near)
        neuron(current[t : t + 1])
    neuron.reset()
    return path


def factors(neuron: StatefulNeuron, current: Tensor, online: bool, one_by_one: bool = False) -> Iterator[list[Tensor]]:
    """Rows t = 0..T-1 of F as autograd has them: d s[t] / d I[t'] for t' = 0..t, each (N, C, ...).

    `one_by_one`: a call for each step, with the potential handed on in `.v`, instead of one call for all of them.
    """
    leaves = [i.clone().requires_grad_() for i in current]
    neuron.online = online
    neuron.reset()
    spikes = [neuron(i.unsqueeze(0))[0] for i in leaves] if one_by_one else neuron(torch.stack(leaves))
    for t, s in enumerate(spikes):
        row = torch.autograd.grad(s.sum(), leaves[: t + 1], retain_graph=True, allow_unused=True)
        yield [torch.zeros_like(s) if f is None else f for f in row]
    neuron.reset()


def spread(values: Tensor, region: Tensor, sure: Tensor) -> float:
    """Largest difference of `values` within one region: exactly 0 for a step function of m - threshold."""
    widest = 0.0
    for r in range(3):
        if (inside := values[sure & (region == r)]).numel():
            widest = max(widest, float(inside.max() - inside.min()))
    return widest


def distribution(values: Tensor, x: Tensor) -> dict:
    """Of ds/dm over neurons at x = mh - threshold: distinct values and their shares, or the mean curve over x."""
    found, counts = values.unique(return_counts=True)
    few = len(found) <= FEW_VALUES
    result = {
        "values": found.tolist() if few else None, "shares": (counts.double() / len(values)).tolist() if few else None,
        "min": float(found[0]), "max": float(found[-1]), "mean": float(values.double().mean()), "curve": None,
    }  # fmt: skip
    if not few:
        edges = torch.linspace(-2, 2, 41, device=x.device, dtype=x.dtype)
        bins, inside = torch.bucketize(x, edges) - 1, (x > -2) & (x <= 2)
        sums, counts = (torch.bincount(bins[inside], weights=w, minlength=40) for w in (values[inside].double(), None))
        mean = [total / n if n else None for total, n in zip(sums.tolist(), counts.tolist(), strict=True)]
        result["curve"] = {"x": ((edges[1:] + edges[:-1]) / 2).tolist(), "mean": mean}
    return result


def slope(factor: Tensor, gain: Tensor, mem_bn: bool) -> Tensor:
    """ds/dm from F[t, t]: in units of the gain of Mem-BN, see `GAIN_ROUNDING`; else as it is."""
    if not mem_bn:
        return factor
    units = torch.where(gain == 0, factor, factor / gain)
    return (units / GAIN_ROUNDING).round() * GAIN_ROUNDING


def measure_neuron(neuron: StatefulNeuron, current: Tensor) -> tuple[list[dict], list[dict]]:
    """Per time step: ds/dm, factors by lag, leaks of the online mode; and samples of them for a figure."""
    path = follow(neuron, current)
    images = max(1, min(current.shape[1], ELEMENTS // current[0, 0].numel()))
    cut = lambda tensors: [p[:images] if p.dim() == current.dim() - 1 else p for p in tensors]  # noqa: E731
    path.x, path.near, current = cut(path.x), cut(path.near), current[:, :images]
    steps, samples = [], []
    ways = [factors(neuron, current, False), *(factors(neuron, current, True, one_by_one=one) for one in (False, True))]
    for t, (row, joined, trained) in enumerate(zip(*ways, strict=True)):
        near, predicted = path.near[t], [p.expand_as(row[0]) for p in path.predicted(t)]
        sure = near if near.all() else ~near  # there is always something to look at
        slopes = [slope(f[-1], path.gain[t], getattr(neuron, "mem_bn", False)) for f in (trained, joined, row)]
        ds_dm = slopes[0]
        size = [float(f.abs().double().mean()) for f in row]
        found = [[f] for f in row[:-1]] + [[row[-1], joined[-1], trained[-1]]]
        errors = [
            max(float(((f - p).abs() / p.abs().clamp(min=1))[sure].max()) for f in same)
            for same, p in zip(found, predicted, strict=True)
        ]
        steps.append({
            "step": t + 1,
            "above_threshold": float(path.on(t).double().mean()),
            "ds_dm": distribution(ds_dm[sure], path.x[t][sure]),
            "dependence": max(spread(values, path.region(t), sure) for values in slopes),
            "gain": [float(path.gain[t].min()), float(path.gain[t].max())],
            "factors": [
                {
                    "lag": t - past, "measured": size[past], "predicted": float(predicted[past].abs().double().mean()),
                    "error": errors[past],
                }
                for past in reversed(range(t + 1))
            ],
            "factor_error": max(errors),
            "temporal_share": sum(size[:-1]) / total if (total := sum(size)) else 0.0,
            "online_leak": max([0.0, *(float(f.abs().max()) for f in (*joined[:-1], *trained[:-1]))]),
            "undecided": int(near.sum()),
        })  # fmt: skip
        pick = torch.linspace(0, ds_dm.numel() - 1, min(SAMPLES, ds_dm.numel())).long()
        at = lambda tensor, pick=pick: tensor.detach().flatten()[pick.to(tensor.device)].cpu().tolist()  # noqa: E731
        samples.append({
            "x": at(path.x[t]), "ds_dm": at(ds_dm),
            "factors": [(t - past, at(predicted[past]), at(row[past])) for past in range(t + 1)],
        })  # fmt: skip
    return steps, samples


def measure_separability(model: nn.Module, x: Tensor, target: Tensor) -> tuple[dict, dict[str, list[dict]]]:
    """How separable the gradient of a network is in time: all measurements on one batch, and samples for a figure.

    Args:
        model: a `SpikingNetwork`, or any module built from neurons of this library (`EMPFNeuron`, `LIFNeuron`, or your
            own `StatefulNeuron` with `.leak` and `.threshold`, (T,) or (T, C)) for which `model(x)` runs all T steps,
            in one call of each neuron or step by step, and returns the logits (T, N, classes). T is that of the
            neurons. It is measured in training mode and left as it was, its state reset.
        x: whatever the model takes. target: labels (N,).

    Returns (result, samples); the result holds plain values: "T", "mem_bn", "summary", "verdict", "neurons" (by layer,
    a list over steps), "gradients" (by layer). `empf.diagnose.separability_table(result)` is the table for people,
    `empf.diagnose.figures.draw_separability(result, samples, path)` the figure.

    The summary: cosine, norm_ratio, sign_agreement, temporal_share (|through time - online| / |through time|),
    random_bias and random_variance take all weights as one vector; the loss is the mean over the steps of the
    cross-entropy of each step's logits, which is that of `every` and the expectation of `random`. The others are the
    worst over all layers and steps.

    A batch norm that normalises several steps together couples them in both gradients alike: that is not seen here.
    Raises ValueError for a network without such neurons, with different T, or with another output.

    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), empf.EMPFNeuron(4), torch.nn.Linear(32, 10))
    >>> result, samples = empf.measure_separability(net, torch.randn(4, 16, 64), torch.arange(16) % 10)
    >>> result["verdict"]["separable"]
    True
    """
    neurons, samples = {}, {}
    T = time_steps(model)
    with as_trained(model):
        for name, current in record_currents(model, x).items():
            if not current.isfinite().all():
                raise ValueError(f"the current of {name} is not finite: the network cannot be measured")
            neurons[name], samples[name] = measure_neuron(model.get_submodule(name), current)
    with as_trained(model):
        gradients = compare_gradients(model, x, target, T)
    whole, steps = gradients["all weights"], [step for layer in neurons.values() for step in layer]
    values = [step["ds_dm"]["values"] for step in steps]
    union = None if None in values else sorted(set().union(*values))
    summary = {
        **whole["mean_of_losses"],
        "random_bias": whole["random"]["bias"],
        "random_variance": whole["random"]["variance"],
        "ds_dm_values": union if union is not None and len(union) <= FEW_VALUES else None,
        "ds_dm_range": [min(step["ds_dm"]["min"] for step in steps), max(step["ds_dm"]["max"] for step in steps)],
        "ds_dm_dependence": max(step["dependence"] for step in steps),
        "factor_error": max(step["factor_error"] for step in steps),
        "online_leak": max(step["online_leak"] for step in steps),
    }
    mem_bn = any(getattr(model.get_submodule(name), "mem_bn", False) for name in neurons)
    result = {"T": T, "mem_bn": mem_bn, "summary": summary, "verdict": verdict(neurons)}
    return result | {"neurons": neurons, "gradients": gradients}, samples


def verdict(neurons: dict[str, list[dict]]) -> dict:
    """Separable or not, and why: what speaks against it, with the worst layer; or what holds everywhere.

    "silent": layers without a neuron above its threshold, of which nothing can be said.
    """
    worst = {}
    for key in ("dependence", "factor_error", "online_leak"):
        worst[key] = max(((step[key], name, step["step"]) for name, steps in neurons.items() for step in steps))
    reasons = []
    for key, allowed, text in (
        ("dependence", 0.0, "ds/dm depends on the potential: it differs by {:.3g} on one side of the threshold"),
        ("factor_error", FACTOR_TOLERANCE, "gradient factors differ from the predicted ones by up to {:.3g}"),
        ("online_leak", 0.0, "the online mode is not: its gradient crosses time steps with factors up to {:.3g}"),
    ):
        value, name, step = worst[key]
        if not value <= allowed:  # not a number counts as a fault
            reasons.append(f"{text.format(value)} ({name}, step {step})")
    separable = not reasons
    if separable:
        reasons = [
            "ds/dm is a step function of m - threshold in every layer and step, all factors are products of masks and "
            f"leaks (error {worst['factor_error'][0]:.1e}), nothing crosses steps online"
        ]
    silent = [name for name, steps in neurons.items() if not any(step["above_threshold"] for step in steps)]
    return {"separable": separable, "reasons": reasons, "silent": silent}
