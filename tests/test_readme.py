"""What the README prints is true: its examples run, its flags, files and names exist."""

import json
import re
from dataclasses import fields
from pathlib import Path
from statistics import mean, median, stdev

import torch

import empf
from bench.ablation import against
from bench.recipe import CHOICES
from empf.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAIN = {f.name.replace("_", "-") for f in fields(TrainConfig)} | {"resume", "no-crop", "no-flip", "no-flip-adaptive"}
SCRIPTS = [ROOT / "eval.py", ROOT / "empf/diagnose/__main__.py", *(ROOT / "bench").glob("*.py")]
OTHER = {flag for script in SCRIPTS for flag in re.findall(r'"--([a-z][\w-]*)"', script.read_text())}
OTHER |= {"help", "cpu", "num-processes", "config-file", "machine-rank", "main-process-ip"}  # of accelerate launch
OTHER |= {
    "gradient-accumulation-steps",
    "dist",
    "logdir",
    "strict",
    "index-url",
}  # also pip, pytest, tensorboard, twine
WITHOUT_LATENT = {"SGD", "flip", "flip, slower"}  # have their own row
CONSOLE = r"(accelerate launch|python (train\.py|-m empf train)) "


def check_flags(text: str) -> set[str]:
    """The flags of training that a text names; none may be unknown."""
    named = {name.replace("_", "-") for name in re.findall(r"--([a-zA-Z][\w-]*)", text)}
    assert named <= TRAIN | OTHER, named - TRAIN - OTHER
    return named & TRAIN


def links(text: str) -> list[str]:
    """The files of the repository that a text links to."""
    return re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", text)


def extras(requirement: str) -> list[str]:
    """Of empf[a,b]: a and b."""
    return re.findall(r"\w+", "".join(re.findall(r"^(?:empf|\.)\[(.*)\]$", requirement)))


def run_example(number):
    code = re.findall(r"```python\n(.*?)```", README, re.S)[number]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_example_runs():
    names = run_example(0)
    assert names["logits"].shape == (4, 8, 100)
    assert names["loss"].isfinite()
    assert all(p.grad is not None for p in names["model"].parameters())


def test_the_example_of_an_own_network_runs(capsys):
    names = run_example(1)
    assert names["logits"].shape == (8, 10) and all(p.grad is not None for p in names["net"].parameters())
    assert float(capsys.readouterr().out) > 0
    x, packed = names["x"], names["packed"]
    empf.reset(names["net"])
    assert torch.allclose(packed(x), names["net"](x), atol=1e-5)


def test_online_backward_is_the_example_in_one_call():
    model = empf.resnet18(num_classes=100, T=4, weights="binary", width=0.25)
    images, labels = torch.randn(4, 3, 32, 32), torch.randint(0, 100, (4,))
    loss, _ = empf.online_backward(model, images, labels, torch.nn.functional.cross_entropy, steps=[3])
    assert loss.isfinite()


def test_flags_exist():
    pages = [ROOT / "docs/reference/commands.md", *(ROOT / "docs/how-to").glob("*.md")]  # they were once in the README
    assert len(check_flags(README + "".join(page.read_text() for page in pages))) > 40


def test_linked_files_exist():
    assert len(links(README)) > 20
    for target in links(README):
        assert (ROOT / target).exists(), target


def test_named_results_exist():
    for text in (README, (ROOT / "docs/results.md").read_text()):
        named = set(re.findall(r"`([\w/-]+\.(?:jsonl?|png))`", text)) - {"metrics.jsonl", "config.json"}
        assert len(named) > 8
        for name in named:
            assert (ROOT / "bench/results" / name.removeprefix("bench/results/")).exists(), name


def figures_of_the_files() -> tuple[list[str], list[str]]:
    """What the files of results say, as README and docs/results.md write it; then, as the latter alone does."""
    found = lambda name: json.loads((ROOT / "bench/results" / name).read_text())  # noqa: E731
    runs = [json.loads(line) for line in (ROOT / "bench/results/recipe/confirm.jsonl").read_text().splitlines()]
    first, (long,) = ([r for r in runs if r["recipe"] == "new" and r["flags"]["epochs"] == n] for n in (3, 10))
    short = [r for r in runs if r["recipe"] == "short"]
    accuracy, of_first = ([r["accuracy"][-1] for r in rows] for rows in (short, first))
    time = sorted(round(r["minutes"]) for r in short)
    digits, train, packed, bits = map(
        found, ("digits.json", "train-cpu.json", "deploy-cpu.json", "deploy-cpu-4bit.json")
    )
    seconds = sum(epoch["seconds"] for epoch in digits["training"]["epochs"])
    saved = [train["variants"][name]["bytes"]["saved"] / 1e6 for name in ("random", "stbp")]
    faster = [[d["batch"][n]["speed_of_packed_over"]["model"]["median"] for n in ("1", "64")] for d in (packed, bits)]
    cosines = [
        found(f"separability-{n}.json")["gradients"]["all weights"]["mean_of_losses"]["cosine"] for n in ("empf", "lif")
    ]
    runtimes, spikes = found("runtimes.json"), ("float", "bf16", "4-bit")
    cells = {
        name: [[r["packed_over"][name]["median"] for r in runtimes["rows"] if r["spikes"] == kind] for kind in spikes]
        for name in ("model", "ONNX Runtime", "OpenVINO")
    }
    in_fp32 = [r["packed_over"]["ONNX Runtime, fp32"]["median"] for r in runtimes["rows"] if r["spikes"] == "4-bit"]
    slower = {name: [sum(over > 1 for over in kind) for kind in kinds] for name, kinds in cells.items()}
    firsts = [r["first_call_ms"] for r in runtimes["first"] if r["spikes"] == "float" and r["width"] in (0.25, 1)]
    int8 = [r for r in runtimes["rows"] if (r["spikes"], r["threads"]) == ("4-bit", 1)]
    gains = [r["ms"]["ONNX Runtime, fp32"]["median"] / r["ms"]["ONNX Runtime"]["median"] for r in int8]
    gains = dict(zip(((r["width"], r["batch"]) for r in int8), gains, strict=True))
    own = [r["packed_over"]["ONNX Runtime"]["median"] for r in int8 if r["width"] == 1 and r["batch"] < 64]
    (loaded,) = [r for r in runtimes["first"] if (r["spikes"], r["width"]) == ("4-bit", 1)]
    rows = found("commits.json")["rows"]
    covered = [[r["second_over_first"]["median"] for r in rows if r["bits"] == bits] for bits in (None, 4)]
    cores = found("scaling-cores.json")["cells"]
    best = found("cifar100-best.json")
    minutes = sum(epoch["seconds"] for epoch in best["training"]["epochs"]) / 60
    lines = (ROOT / "bench/results/state/runs.jsonl").read_text().splitlines()
    sequences = [r for r in map(json.loads, lines) if not r["held_out"] and r["updates"] == 300]

    def of(task: str, learning: str, answer: str) -> list[float]:
        keys = [dict(task=task, learning=learning, neuron=n) for n in ("vanilla", "Mem-BN", "parallel", "LIF")]
        return [mean(r[answer] for r in sequences if key.items() <= r.items()) for key in keys]

    by_rows = zip(of("digits by rows", "random", "last"), of("digits by rows", "losses", "last"), strict=True)
    both = [
        f"{digits['accuracy'][-1]:.2f} % of {digits['images']} test images after 30 epochs; {seconds:.0f} s",
        f"{mean(accuracy):.1f} +- {stdev(accuracy):.1f} % of the 10,000 test images ({len(short)} seeds) in "
        f"{time[0]} to {time[-1]} min",
        f"{best['accuracy'][-1]:.1f} % (one seed, tested once) in {minutes:.0f} min",
        f"{best['accuracy_with_mirror'][-1]:.1f} % together with mirror images",
        f"{best['packed']['file_mb']:.2f} MB packed",
        *{f"{train['speed_of_random_over'][name]['median']:.1f} times the images/s" for name in ("every", "stbp")},
        *(f"{megabytes:,.0f} MB" for megabytes in saved),
        f"{packed['file_mb']['packed']:.2f} MB (the paper",
        f"{packed['file_mb']['full precision']:.2f} MB in full precision",
        f"{faster[0][0]:.1f} times as fast with 1 image, {faster[0][1]:.1f} times with 64",
        f"{faster[1][0]:.1f} and {faster[1][1]:.1f} times",
        *(
            "{}: {}, with spikes in bf16 {}, of 4 bits {}".format(
                name.replace("model", "`model.eval()`"),
                *(f"{median(over):.2f} ({min(over):.2f} to {max(over):.2f})" for over in kinds),
            )
            for name, kinds in cells.items()
        ),
        f"there in int8 (in fp32 {median(in_fp32):.2f} ({min(in_fp32):.2f} to {max(in_fp32):.2f}))",
        *(
            "slower than {} in {} of {} cells, with spikes in bf16 in {}, of 4 bits in {}".format(
                name, slower[name][0], len(cells[name][0]), *slower[name][1:]
            )
            for name in ("ONNX Runtime", "OpenVINO")
        ),
        *("packed {:.0f} ms, `model.eval()` {:.0f}, ONNX Runtime {:.0f}, OpenVINO {:.0f}".format(
            *(first[name]["median"] for name in ("packed", "model", "ONNX Runtime", "OpenVINO"))) for first in firsts),
        f"{cosines[0]:.3f}", f"{cosines[1]:.3f}",
        "vanilla {:.1f}, Mem-BN {:.1f}, parallel {:.1f}, LIF {:.1f} %".format(*of("speech", "random", "sum")),
        "vanilla {} and {}, Mem-BN {} and {}, parallel {} and {}, LIF {} and {} %".format(
            *(f"{accuracy:.1f}" for pair in by_rows for accuracy in pair)
        ),
    ]  # fmt: skip
    in_bf16 = [r["accuracy"][-1] for r in runs if r["recipe"] == "new, bf16"]

    def chosen(name: str, epochs: int = 10) -> str:
        found = [r["accuracy"][-1] for r in runs if r["recipe"] == name and r["flags"]["epochs"] == epochs]
        return f"{mean(found):.1f} % ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else f"{found[0]:.1f} %"

    def difference(name: str) -> str:
        of_seed = [
            {r["seed"]: r["accuracy"][-1] for r in runs if r["recipe"] == recipe and r["flags"]["epochs"] == 10}
            for recipe in (name, CHOICES[name][1])
        ]
        n, middle, half = against(*of_seed)
        assert n == 3
        return f"| {name} | {CHOICES[name][1]} | {middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f}) |"

    return both, [
        f"floating point {chosen('base')}, 4 bits with the clipped gradient "
        f"{chosen('4-bit spikes, clipped gradient')}, "
        f"with the identity, which is the paper's and the default, {chosen('4-bit spikes')}",
        *(difference(name) for name in CHOICES if name not in WITHOUT_LATENT),
        f"3 epochs {chosen('flip, slower', 3)}, by SGD {chosen('SGD', 3)}; 10 epochs {chosen('flip, slower')}, by SGD "
        f"{chosen('SGD')}; 3 seeds each. With `--flip-rate 0.02 --flip-threshold 0.1` {chosen('flip', 3)} and, one "
        f"seed, {chosen('flip')}",
        f"{mean(in_bf16):.1f} +- {stdev(in_bf16):.1f} % (3 seeds), fp32 {mean(of_first):.1f}",
        f"{mean(of_first):.1f} +- {stdev(of_first):.1f} % of the 10,000 test images (3 seeds) in "
        f"{first[0]['minutes']:.0f} min",
        f"{long['accuracy'][-1]:.1f} % (one seed) in {long['minutes']:.0f} min",
        ", ".join(f"x{w:g} {gains[w, 1]:.2f} and {gains[w, 16]:.2f}" for w in (0.125, 0.25, 0.5, 1)),
        "packed over int8: x1 {:.2f} and {:.2f}".format(*own),
        "float spikes {}, of 4 bits {}".format(
            *(f"{median(over):.2f} ({min(over):.2f} to {max(over):.2f})" for over in covered)
        ),
        "x1 is loaded in {:.0f} ms in place of {:.0f}, from {:.2f} MB ({:.2f} in fp32)".format(
            *(
                loaded[part][name] if part == "file_mb" else loaded[part][name]["median"]
                for part in ("load_ms", "file_mb")
                for name in ("ONNX Runtime", "ONNX Runtime, fp32")
            )
        ),
        ", ".join(
            f"x{c['width']:g} {c['type']} {c['processes_over_threads']['median']:.2f}"
            for c in sorted(cores, key=lambda c: (c["type"] == "bf16", c["width"]))
        ),
        f"the packed file has {found('cifar100-small.json')['accuracy'][-1]:.1f} % too, and "
        f"{found('cifar100-small.json')['file_mb']:.2f} MB",
    ]


def test_the_numbers_are_those_of_the_files():
    separability = (ROOT / "docs/tutorials/separability.md").read_text()
    results = (ROOT / "docs/results.md").read_text() + separability
    both, further = figures_of_the_files()
    for figure in both:
        assert figure in README, figure
    for figure in both + further:
        assert figure in results, figure


def test_the_first_two_lines_install_and_run():
    first, second = re.findall(r"^    (pip install .*)$", README, re.M)[:2]
    assert first.endswith("accelerate launch train.py") and second.endswith("&& pytest -n auto --dist loadgroup")
