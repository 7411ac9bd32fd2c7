"""train.py: learns, writes its folder, and every setting of the network and of the training runs."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from make_data import image_folder, pictures, stream_folder
from make_events import moving_bars
from torch.utils._python_dispatch import TorchDispatchMode
from train_tools import in_double, leftovers, metrics, resume, run_train, trace

import empf
import train
from empf import runs
from empf.data.batches import Batches
from empf.data.load import load_data
from empf.machine import cpu_threads
from empf.training import config as settings
from empf.training import session as loop
from empf.training.config import TrainConfig
from empf.training.health import Health

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """One real command line: 3 epochs of 20 batches, all the rest by default."""
    folder = tmp_path_factory.mktemp("work")
    flags = ["--width", "0.125", "--T", "2", "--epochs", "3", "--limit", "640", "--batch-size", "32"]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--warmup-epochs", "0", "--threads", "1"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "digits-resnet18", result


def test_learns(learned):
    records = metrics(learned[0])
    losses = [record["loss"] for record in records]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 0.9 * np.log(10)
    assert records[2]["accuracy"][-1] > 25  # % of 10 classes; 35 when this was written


def test_writes_the_run_folder(learned):
    run = learned[0]
    assert leftovers(run) == []
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert empf.load(run).config == TrainConfig(width=0.125, T=2).model()
    records = metrics(run)
    assert [record["epoch"] for record in records] == [1, 2, 3]
    for record in records:
        assert len(record["accuracy"]) == 2
        for accuracy in record["accuracy"]:
            assert accuracy * 360 / 100 == pytest.approx(round(accuracy * 360 / 100), abs=1e-9)
        assert record["images_per_s"] == pytest.approx(640 / record["seconds"])
    assert 0 < records[2]["test_loss"] < records[0]["test_loss"]
    config = json.loads((run / "config.json").read_text())
    assert TrainConfig.from_dict(config["train"]).to_dict() == config["train"]


def test_tells_what_it_does(learned):
    """Standard output is for people: one line per epoch, and what to do next; the progress bar is on stderr."""
    run, result = learned
    lines = result.stdout.splitlines()
    assert lines[0] == "resnet18, binary weights, T = 2: 0.02 MB (0.70 MB full); 640 training, 360 test images"
    assert lines[1] == f"1 x cpu (1 threads), kernels: torch, run: {Path('runs', run.name)}"
    pattern = (
        r"epoch   {}  loss \d\.\d{{4}}  train \d+\.\d\d %  test after each step \d+\.\d\d \d+\.\d\d %  \d+ images/s"
    )
    for epoch, line in enumerate(lines[2:5], 1):
        assert re.match(pattern.format(epoch), line)
    assert lines[5:] == [f"finished; evaluate it with: python -m empf eval {Path('runs', run.name)}"]
    bars = re.findall(
        r"epoch \d/3: .*? (\d+)/20 \[.*?loss=\d\.\d+, accuracy=\d+\.\d%, images/s=\d+, t=([12])\]", result.stderr
    )
    assert bars and {t for _, t in bars} == {"1", "2"}


def test_default_folder_is_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits-resnet18", "digits-resnet18-2"):
        run_train("--epochs", "1")
        assert metrics(tmp_path / "runs" / name)
    assert sorted(os.listdir("runs")) == ["digits-resnet18", "digits-resnet18-2"]


def test_folder_of_another_run_is_refused(learned):
    before = trace(learned[0])
    with pytest.raises(
        SystemExit, match="error: .* already holds a run: continue it with --resume .* or choose another"
    ):
        run_train("--output-dir", learned[0])
    assert trace(learned[0]) == before


@pytest.mark.parametrize(
    "flags",
    [
        ["--mixed-precision", "bf16", "--ema", "0.5"],
        ["--learning", "every", "--neuron", "lif"],
        ["--learning", "stbp", "--neuron", "mem_bn", "--seca", "2", "--per-channel"],
        ["--learning", "random", "--steps-per-batch", "2", "--parallel", "0.5", "--spike-bits", "4", "--seca", "1"],
        ["--weights", "ternary", "--activation", "gelu", "--arch", "resnet19"],
        ["--weights", "full", "--mixup", "0.8", "--cutmix", "1", "--label-smoothing", "0.1", "--cutout", "3", "--flip"],
    ],
    ids=" ".join,
)
def test_every_setting_trains(tmp_path, flags):
    """The weights move from end to end, and the network in the folder is the one that the flags name."""
    run = tmp_path / "run"
    run_train("--epochs", "1", "--output-dir", run, *flags)
    model, state = empf.load(run), runs.load_state(run)
    torch.manual_seed(0)
    start = dict(empf.build(model.config).named_parameters())
    moved = {name for name, parameter in start.items() if (state["model"][name] != parameter).any()}
    assert moved >= {name for name in start if re.search(r"(conv|head|linear)\.weight$|stem", name)}
    config = vars(settings.parser().parse_args(flags))
    for name in set(config) & set(model.config.to_dict()):
        assert getattr(model.config, name) == config[name]
    assert np.isfinite(metrics(run)[0]["loss"])


def test_the_moving_average_is_what_is_evaluated_and_saved(tmp_path):
    run = tmp_path / "run"
    run_train("--epochs", "1", "--ema", "0.5", "--output-dir", run)
    state = runs.load_state(run)
    for name, tensor in empf.load(run).state_dict().items():
        assert torch.equal(tensor, state["average"][f"module.{name}"])
    for name in ("head.weight", "stem.bn.running_mean"):
        assert not torch.equal(empf.load(run).state_dict()[name], state["model"][name])


def test_a_diverging_run_says_so(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="error: training diverged, .* lower --lr; the last good checkpoint is in"):
        run_train("--lr", "1e30", "--output-dir", run)
    assert all(tensor.isfinite().all() for tensor in runs.load_state(run)["model"].values())


def test_weights_that_diverge_after_the_last_loss_are_not_saved(tmp_path, monkeypatch):
    """The loss of a batch says nothing about the update that follows it."""
    backward = train.empf.online_backward

    def poisoned(model, *args, **kwargs):
        result = backward(model, *args, **kwargs)
        model.head.weight.grad.fill_(float("nan"))
        return result

    monkeypatch.setattr(train.empf, "online_backward", poisoned)
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match="error: training diverged, a weight is not finite: lower --lr"):
        run_train("--batch-size", "96", "--epochs", "1", "--output-dir", run)
    assert all(tensor.isfinite().all() for tensor in runs.load_state(run)["model"].values())


def test_a_batch_that_is_too_small_is_one_sentence(tmp_path):
    """In the last layers one digit has a single pixel."""
    with pytest.raises(SystemExit, match="^error: batch norm needs more than one value .* use a larger batch"):
        run_train("--batch-size", "1", "--limit", "2", "--output-dir", tmp_path / "run")


def test_a_wrong_image_in_the_folder_is_one_sentence(tmp_path):
    folder = image_folder(tmp_path / "data", "digits", train=32, test=10)
    file = folder / "test" / "class003" / "00003.png"
    assert file.exists()
    pictures(1, "cifar10")[0][0].save(file)
    with pytest.raises(SystemExit, match="error: image 3 of test of .* is 32x32 pixels, but digits has 8x8"):
        run_train("--data", folder, "--output-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trains_from_a_folder(tmp_path):
    folder = image_folder(tmp_path / "data", "digits", train=40, test=20)
    run_train("--epochs", "1", "--data", folder, "--output-dir", tmp_path / "run")
    accuracy = metrics(tmp_path / "run")[0]["accuracy"]
    assert len(accuracy) == 2 and all(a % 5 == pytest.approx(0, abs=1e-9) for a in accuracy)  # of 20 images


def test_trains_on_events(tmp_path, monkeypatch):
    """Of two classes where the data set has ten: the network fits what is found."""
    monkeypatch.setenv("EMPF_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        moving_bars(tmp_path / "data" / split, 16, T=2, seed=0)
    run = tmp_path / "run"
    run_train("--dataset", "dvs-cifar10", "--data", tmp_path / "data", "--epochs", "1", "--output-dir", run)
    config = empf.load(run).config
    assert (config.arch, config.in_channels, config.image_size, config.num_classes) == ("vgg_snn", 2, 48, 2)
    assert len(metrics(run)[0]["accuracy"]) == 2 and metrics(run)[0]["health"]["warnings"] == []


def test_trains_on_images_that_are_streamed(tmp_path):
    folder = stream_folder(tmp_path / "data", {"train": [12], "validation": [6]})
    run = tmp_path / "run"
    flags = ["--batch-size", "4", "--limit", "12", "--epochs", "1", "--arch", "resnet18", "--workers", "0"]
    run_train("--dataset", "imagenet1k", "--data", folder, *flags, "--output-dir", run, "--max-steps", "2")
    resume(run)
    assert empf.load(run).config.image_size == 224
    assert len(metrics(run)) == 1


def test_tracker_writes_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run_train("--tracker", "tensorboard", "--output-dir", "run")
    assert os.listdir(tmp_path) == ["run"]
    events = EventAccumulator(str(tmp_path / "run" / "empf")).Reload()
    records = metrics(tmp_path / "run")
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([record["loss"] for record in records])
    assert events.Scalars("accuracy_t2")[-1].value == pytest.approx(records[-1]["accuracy"][1])


class Notebook(GeneralTracker):
    """A tracker that is not installed here, in place of W&B."""

    name, requires_logging_directory, tracker = "wandb", False, None
    pages: dict = {}

    def __init__(self, run_name, **options):
        super().__init__()
        self.pages["run"] = run_name

    def store_init_configuration(self, values):
        self.pages["config"] = values

    def log(self, values, step, **options):
        self.pages[step] = values


def test_two_trackers_are_told_the_same(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    both = [LoggerType("tensorboard"), LoggerType("wandb")]
    for place in ("empf.training.processes", "accelerate.tracking"):
        monkeypatch.setattr(f"{place}.get_available_trackers", lambda: both)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Notebook)
    run_train("--tracker", "tensorboard,wandb", "--epochs", "1", "--output-dir", tmp_path / "run")
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))
    assert Notebook.pages["run"] == "empf" and Notebook.pages["config"]["epochs"] == 1
    assert Notebook.pages[1]["accuracy_t2"] == metrics(tmp_path / "run")[0]["accuracy"][1]


def test_a_tracker_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("empf.training.processes.get_available_trackers", list)
    with pytest.raises(SystemExit, match="error: tracker 'wandb' is .* not installed: install it .* installed: none"):
        run_train("--tracker", "wandb,tensorboard", "--output-dir", tmp_path / "run")


def test_ctrl_c_before_the_first_batch(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_data", interrupted)
    with pytest.raises(SystemExit, match="stopped before the first batch"):
        run_train("--output-dir", tmp_path / "run")


def test_threads_are_set_although_the_launcher_allows_one(tmp_path, monkeypatch):
    """accelerate launch sets OMP_NUM_THREADS=1; torch has read it when train.py starts."""
    wanted = []
    monkeypatch.setattr(torch, "set_num_threads", wanted.append)
    run_train("--output-dir", tmp_path / "run", "--threads", "0", "--max-steps", "1")
    assert wanted[0] == cpu_threads(0) >= 1


# ---- the loop


def test_accumulated_batches_are_one_large_batch(tmp_path, monkeypatch):
    """With frozen norms, in float64: the same losses and weights. `every`, as each batch draws its own time steps."""
    build = train.empf.build

    def with_frozen_norms(config):
        model = build(config)
        with torch.no_grad():
            for _ in range(20):  # running statistics with which the neurons fire
                empf.reset(model)
                model(torch.randn(32, 1, 8, 8))
        empf.freeze_norm(model)
        return model

    monkeypatch.setattr(train.empf, "build", with_frozen_norms)
    flags = ["--learning", "every", "--no-crop", "--lr", "0.02"]
    with in_double():
        run_train(*flags, "--output-dir", tmp_path / "large")
        run_train(*flags, "--batch-size", "8", "--accumulate", "4", "--output-dir", tmp_path / "small")
    large, small = (runs.load_state(tmp_path / name)["model"] for name in ("large", "small"))
    torch.manual_seed(0)
    start = dict(build(TrainConfig(T=2, width=0.0625).model()).named_parameters())
    assert (start["stem.conv.weight"] - large["stem.conv.weight"]).abs().max() > 1e-3
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-9, atol=1e-12)
    for a, b in zip(metrics(tmp_path / "small"), metrics(tmp_path / "large"), strict=True):
        assert (a["loss"], a["accuracy"]) == (pytest.approx(b["loss"], rel=1e-9), b["accuracy"])


class Reads(TorchDispatchMode):
    """Counts the operations that would wait for a device: reading a number, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "is_nonzero",
            "masked_select",
        ):
            self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("network", [{}, {"neuron": "mem_bn", "seca": 1}, {"parallel": 0.5, "spike_bits": 4}], ids=str)
def test_nothing_is_read_from_the_device_within_the_loop(network):
    """Forward, backward, update and the sums; also in the batches that the health checks look at."""
    config = TrainConfig(T=2, width=0.0625, **network)
    model = empf.build(config.model())
    optimizer, meter, health = (
        train.make_optimizer(model, config),
        loop.Meter(None, [0.0] * 3),
        Health(model, 10),
    )
    images, target = torch.randn(4, 1, 8, 8), torch.arange(4)
    with Reads() as reads:
        for number in (9, 10):
            with health.watch(number):
                loss, logits = empf.online_backward(model, images, target, F.cross_entropy, steps=[2])
            meter.add(loss, logits, target)
            optimizer.step()
            optimizer.zero_grad()
        assert reads.found == Counter()
        loss.item()
        assert sum(reads.found.values()) == 1  # it does see them


def test_activations_keep_the_layout_of_the_weights(monkeypatch):
    """channels_last from the stem on, without a conversion between the convolutions."""
    seen = []

    def noted(module, inputs, output):
        seen.extend(t.is_contiguous(memory_format=torch.channels_last) for t in (inputs[0], output))

    model = empf.build(TrainConfig(width=0.0625, T=3, dataset="cifar10").model()).to(memory_format=torch.channels_last)
    for module in model.blocks.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(noted)
    empf.online_backward(model, torch.randn(2, 3, 32, 32), torch.arange(2), F.cross_entropy, steps=[3])
    assert len(seen) == 2 * 2 * 19 and all(seen)


def test_a_loss_that_is_not_finite_is_found_in_the_batch_it_came_from(tmp_path):
    """Losses are read some batches later: then the batch is drawn once more, to see whether its data are the cause."""
    batches = Batches(load_data("digits", limit=64)[0], 16, train=True)
    nan = float("nan")
    error = loop.divergence(batches, 4, [1.0, nan, nan], tmp_path)
    assert re.match("training diverged, the loss is not finite in epoch 1, batch 3: lower --lr", str(error))
    batches.data.images.data = batches.data.images.float()
    batches.data.images[:] = nan
    error = loop.divergence(batches, 4, [1.0, 2.0], tmp_path)  # that of another process
    assert re.match("the data of epoch 1, batch 4 hold numbers that are not finite: repair", str(error))


# ---- optimizer and schedule


def test_weight_decay_is_for_convolutions_and_linear_layers():
    config = TrainConfig(T=2, width=0.0625, neuron="mem_bn", seca=1, arch="resnet19", weight_decay=0.1)
    model = empf.build(config.model())
    names = {parameter: name for name, parameter in model.named_parameters()}
    optimizer = train.make_optimizer(model, config)
    decayed, others = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert sorted(decayed + others) == sorted(names.values())
    expected = {n for n in names.values() if re.search(r"(^|\.)(conv|head|linear)\.weight$", n) and "seca" not in n}
    assert set(decayed) == expected
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)


def test_learning_rate_warms_up_and_follows_a_cosine():
    config = TrainConfig(lr=0.5, epochs=20, warmup_epochs=4.0)
    expected = {0: 0.005, 2: 0.2525, 4: 0.5, 8: 0.25 * (1 + 2**-0.5), 12: 0.25, 20: 0.0, 21: 0.0}
    assert [train.learning_rate(config, p) for p in expected] == pytest.approx(list(expected.values()), abs=1e-12)
    assert train.learning_rate(config, 4 - 1e-9) == pytest.approx(0.5)
    cold = TrainConfig(lr=0.5, epochs=20, warmup_epochs=0.0)
    assert train.learning_rate(cold, 0) == 0.5 and train.learning_rate(cold, 10) == pytest.approx(0.25)
    short = TrainConfig(lr=0.5, epochs=2, warmup_epochs=4.0)  # ends while it warms up
    assert train.learning_rate(short, 2) == pytest.approx(0.2525)


def test_the_optimizer_follows_the_schedule(tmp_path, monkeypatch):
    seen, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self))[1]
    )
    run_train("--output-dir", tmp_path / "run", "--lr", "0.1", "--warmup-epochs", "1")  # 2 epochs of 3 batches
    config = TrainConfig(lr=0.1, epochs=2, warmup_epochs=1.0)
    assert seen == [[train.learning_rate(config, batch / 3)] * 2 for batch in range(6)]


def test_mem_bn_is_tested_with_calibrated_statistics(tmp_path, monkeypatch):
    seen = []

    def calibrate(model, images):
        before = [b.clone() for n, b in model.named_buffers() if "neuron.running" in n]
        empf.evaluate.calibrate(model, images)
        after = [b for n, b in model.named_buffers() if "neuron.running" in n]
        seen.append(not any(torch.equal(a, b) for a, b in zip(after, before, strict=True)))

    monkeypatch.setattr(empf, "calibrate", calibrate)
    run_train("--neuron", "mem_bn", "--epochs", "2", "--output-dir", tmp_path / "run")
    assert seen == [True, True]


def test_mem_bn_is_calibrated_on_images_as_they_are(tmp_path, monkeypatch):
    """Neither mixed nor shifted, and in random order: those of a class may lie together."""
    seen = []
    monkeypatch.setattr(empf, "calibrate", lambda model, images: seen.extend(images))
    flags = ["--mixup", "0.8", "--cutmix", "1", "--cutout", "3", "--label-smoothing", "0.1"]
    run_train("--neuron", "mem_bn", "--epochs", "1", *flags, "--output-dir", tmp_path / "run")
    plain = next(iter(Batches(load_data("digits", limit=96)[0], 96, train=False)))[0]
    found = torch.cat(seen)
    same = (found[:, None] == plain[None]).flatten(2).all(2)  # 96 96
    assert same.any(0).all() and same.any(1).all() and not same.diagonal().all()
