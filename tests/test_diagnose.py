"""python -m empf.diagnose: on a run, and of the memory of a configuration."""

import json
import shutil

import pytest
import torch
from make_events import recordings

import empf
from empf import layer, runs
from empf.data.event_frames import EventSettings
from empf.data.events import load_events
from empf.diagnose import __main__ as diagnose
from empf.diagnose.separability import measure_separability
from empf.training.config import TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as train.py leaves it, of a network that never learned."""
    folder = tmp_path_factory.mktemp("run")
    train = TrainConfig(dataset="digits", width=0.0625, T=2, limit=64, seed=3, output_dir=str(folder))
    model = empf.build(train.model())
    runs.save_results(folder, model, [{"epoch": 7}])
    runs.save_config(folder, train.model(), train.to_dict(), [str(d) for d in range(10)], (0.3,), (0.4,))
    return folder


@pytest.fixture(autouse=True)
def threads():
    """Give back what the command sets for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_command_on_a_run(run, tmp_path, capsys, monkeypatch):
    out = [tmp_path / f"{name}.json" for name in ("first", "again", "untrained")]
    flags = [str(run), "--batch-size", "16", "--json"]
    diagnose.main([*flags, str(out[0])])
    text = capsys.readouterr().out
    assert "separable" in text and "{0, 1}" in text and "blocks.7.conv2.conv.weight" in text
    assert (run / "separability.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("empf.diagnose.__main__.has_matplotlib", lambda: False)
    diagnose.main([*flags, str(out[1])])
    diagnose.main([*flags, str(out[2]), "--untrained", "--split", "test"])
    assert not (run / "separability-untrained.png").exists()
    first, again, untrained = (json.loads(path.read_text()) for path in out)
    assert {**first, "machine": None} == {**again, "machine": None}
    assert first["verdict"]["separable"] and first["images"] == 16
    assert first["run"] == run.name and str(run) not in out[0].read_text()
    trained, config = first["training"], runs.read_config(run)
    assert trained["settings"] == {**config["train"], "output_dir": run.name}
    assert trained["epochs_done"] == 7 and untrained["training"]["epochs_done"] == 0
    assert trained["commit"] == config["git_commit"] and trained["versions"]["torch"]
    assert {"torch", "commit", "date"} <= first["machine"].keys()
    assert untrained["untrained"] and untrained["summary"]["cosine"] != first["summary"]["cosine"]
    torch.manual_seed(3)  # as train.py does before it builds the network
    expected = empf.build(empf.ModelConfig.from_dict(runs.read_config(run)["model"]))
    assert torch.equal(diagnose.load_model(run, True, "cpu").head.weight, expected.head.weight)
    with pytest.raises(SystemExit, match="needs matplotlib"):
        diagnose.main([str(run), "--figure", str(tmp_path / "f.png")])


def test_damaged_metrics_are_one_sentence(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("[" * 100_000)
    with pytest.raises(SystemExit, match="error: .*metrics.jsonl, line 1 is damaged: restore it from a copy"):
        diagnose.main([str(tmp_path / "run"), "--batch-size", "16"])
    with pytest.raises(SystemExit, match="error: .*config.json is a file of a run: choose another name"):
        diagnose.main([str(run), "--batch-size", "16", "--json", str(run / "config.json")])


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "either a run folder"),
        (["RUN", "--memory"], "either a run folder"),
        (["RUN", "--batch-size", "1"], "at least 2"),
        (["RUN", "--width", "2", "--T", "3"], "leave out --T and --width"),
        (["--memory", "--untrained", "--data", "X"], "leave out --untrained and --data"),
        (["--memory", "--image-size", "0"], "image_size must be at least 1, got 0"),
        (["RUN", "--batch-size", "65"], "64 training images do not fill"),
        (["nowhere"], "not a run folder"),
        (["--memory", "--width", "-1"], "width must be positive"),
        (["--memory", "--T", "0"], "from 1 on"),
        (["--memory", "--figure", "memory.bmp2"], "end with .png"),
    ],
)
def test_bad_flags_are_one_sentence(run, flags, message):
    with pytest.raises(SystemExit, match=message):
        diagnose.main([str(run) if flag == "RUN" else flag for flag in flags])


def test_a_folder_that_does_not_say_how_it_was_trained(run, tmp_path):
    folder = tmp_path / "model"
    model = empf.load(run)
    model.run = None  # as one that was never a run
    model.save_pretrained(folder)
    for flags in ([], ["--untrained"]):
        with pytest.raises(SystemExit, match="does not say on which data it was trained"):
            diagnose.main([str(folder), *flags])


def test_command_on_a_run_of_events(tmp_path, monkeypatch):
    """The images are those the run was trained on: its split, its frames."""
    monkeypatch.setenv("EMPF_CACHE", str(tmp_path / "cache"))
    data = recordings(tmp_path / "data", classes=2, each=10)
    train = TrainConfig(
        dataset="dvs-cifar10", data=str(data), arch="vgg_snn", width=0.0625, T=2, split="test100", frames_by="time",
        orientation="mirrored",
    )  # fmt: skip
    folder = tmp_path / "run"
    runs.save_results(folder, empf.build(train.model()), [])
    runs.save_config(folder, train.model(), train.to_dict(), ["class0", "class1"], (0.0, 0.0), (1.0, 1.0))
    seen = []

    def measured(model, x, target):
        seen.append((x, target))
        return measure_separability(model, x, target)

    monkeypatch.setattr(diagnose, "measure_separability", measured)
    monkeypatch.setattr("empf.diagnose.__main__.has_matplotlib", lambda: False)
    for split in ("train", "test"):
        diagnose.main([str(folder), "--batch-size", "2", "--split", split, "--json", str(tmp_path / "result.json")])
    sets = load_events(data, EventSettings(2, split="test100", by="time", orientation="mirrored"))
    for (x, target), known in zip(seen, sets, strict=True):
        for frames, label in zip(x.transpose(0, 1), target, strict=True):
            same = (known.frames.float() == frames).flatten(1).all(1)
            assert same.sum() == 1 and known.labels[same] == label
    settings = json.loads((tmp_path / "result.json").read_text())["training"]["settings"]
    assert settings["data"] == "data" and settings["split"] == "test100"


def test_memory_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(layer, "SMALL", 0)  # made again even where they are as small as here
    out = tmp_path / "memory.json"
    size = ["--width", "0.125", "--image-size", "16", "--batch-size", "4", "--T", "2", "1"]
    flags = ["--memory", "--threads", "1", *size, "--json", str(out)]
    diagnose.main([*flags, "--figure", str(tmp_path / "memory.svg")])
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert {"torch", "commit", "date"} <= found["machine"].keys()
    assert [(row["T"], row["learning"]) for row in rows] == [(T, name) for T in (1, 2) for name in empf.online.LEARNING]
    assert all(row["saved"] <= 0.5 * row["saved_plain"] for row in rows if row["learning"] != "stbp")
    assert "<svg" in (tmp_path / "memory.svg").read_text() and "stbp" in capsys.readouterr().out
