"""eval.py: the numbers of the run, its parts of the table, and one sentence for what is wrong."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from make_data import image_folder
from PIL import Image
from train_tools import metrics, run_train

import empf
from empf.data.batches import Batches
from empf.data.load import load_data
from empf.evaluate import correct_per_step, predictions, scores
from eval import check_classes, main, table


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run_train("--width", "0.125", "--epochs", "1", "--lr", "0.2", "--spike-bits", "4", "--output-dir", folder)
    return folder


def run_eval(*flags: str | Path) -> None:
    threads = torch.get_num_threads()
    try:
        main([*map(str, flags), "--threads", "1"])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result(run, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("results") / "result.json"
    run_eval(run, "--limit", "96", "--batch-size", "40", "--json", file)  # batches of 40, 40 and 16
    return json.loads(file.read_text())


def test_accuracy_is_that_of_the_last_epoch(run, result):
    assert result["accuracy"] == metrics(run)[-1]["accuracy"]
    assert len(result["accuracy"]) == 2 and result["images"] == 96


def test_a_result_stands_for_itself(run, result):
    """Without the run folder one knows what was run where, and how the network was trained; places stay private."""
    assert result["command"].startswith("python eval.py run --limit 96 --batch-size 40 --json result.json")
    assert {"cpu", "cores", "threads", "torch", "empf", "commit", "date"} <= set(result["machine"])
    config = json.loads((run / "config.json").read_text())
    assert result["training"]["epochs"] == metrics(run)
    assert result["training"]["train"] == config["train"] | {"output_dir": "run"}
    assert result["training"]["versions"] == config["versions"]
    assert str(run.parent) not in json.dumps(result)


def test_sizes_and_operations(run, result):
    model = empf.load(run)
    account = empf.account(model)
    assert {name: result[name] for name in account} == account
    assert result["file_mb"] == (run / "model.safetensors").stat().st_size / 1e6
    images, labels = next(iter(Batches(load_data("digits", limit=96)[1], 96, train=False)))
    counted = empf.spike_account(model, [(images, labels)])
    assert result["sops"] == counted["sops"] > 0
    assert result["energy_mj"] == pytest.approx(result["sops"] * 0.9e-9 * 4 / 32)  # 4-bit spikes
    assert result["energy_full_mj"] == pytest.approx(result["macs"] * 4.6e-9)
    assert result["density"] == counted["density"]
    assert set(result["density"]) == {f"blocks.{b}.conv{c}.neuron" for b in range(8) for c in (1, 2)}
    assert result["counted_images"] == 96 and result["images_per_s"] > 0


def test_spikes_are_counted_on_so_many_batches(run, tmp_path):
    run_eval(run, "--limit", "96", "--batch-size", "40", "--count-batches", "2", "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["counted_images"] == 80 and found["images"] == 96


def test_the_table_has_every_part(run, result, capsys):
    run_eval(run, "--limit", "96")
    printed = capsys.readouterr().out
    rows = dict(line.split("  ", 1) for line in printed.splitlines())
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["run"] == str(run)
    assert rows["network"] == "resnet18 x0.125, binary weights, empf neurons, T = 2"
    assert rows["test images"] == "96 of digits"
    assert rows["accuracy after step 2"] == f"{result['accuracy'][1]:.2f} %"
    assert rows["parameters, full precision"] == f"{result['params_full_mb']:.3f} MB"
    assert rows["parameters, stored"] == f"{result['params_mb']:.3f} MB"
    assert rows["parameters, as the authors count"].startswith(
        f"{result['params_authors_mb']:.3f} MB (2 bits if binary"
    )
    assert rows["model.safetensors on disk"].startswith(f"{result['file_mb']:.3f} MB")
    assert rows["NOPs per image"] == f"{result['nops'] / 1e6:.3f} M"
    assert rows["SOPs per image"] == f"{result['sops'] / 1e6:.3f} M (first 96 images)"
    assert rows["energy of the SOPs"] == f"{result['energy_mj']:.6f} mJ per image (4-bit spikes)"
    assert rows["density of blocks.0.conv1.neuron"] == f"{100 * result['density']['blocks.0.conv1.neuron']:.1f} %"
    assert rows["speed"].endswith("images/s")


def test_what_is_wrong_is_told_by_class(run, result, tmp_path, capsys):
    """Counted by hand from the logits; in the table, in JSON and in a picture."""
    images, labels = next(iter(Batches(load_data("digits", limit=96)[1], 96, train=False)))
    with torch.no_grad():
        sums = empf.load(run)(images).sum(0)
    assert result["top5"] == pytest.approx(
        100 * sum(label in row.topk(5).indices for row, label in zip(sums, labels, strict=True)) / 96
    )
    pairs = Counter(zip(labels.tolist(), sums.argmax(1).tolist(), strict=True))
    for label, found in enumerate(result["classes"]):
        own = [n for (true, _), n in pairs.items() if true == label]
        assert found == {"class": str(label), "images": sum(own), "accuracy": 100 * pairs[label, label] / sum(own)}
    wrong = {pair: n for pair, n in pairs.items() if pair[0] != pair[1]}
    assert [c["images"] for c in result["confused"]] == sorted(wrong.values(), reverse=True)[:10]
    for c in result["confused"]:
        label = int(c["class"])
        assert c["images"] == wrong[label, int(c["taken_for"])]
        assert c["share"] == 100 * c["images"] / result["classes"][label]["images"]
    printed = table(result)
    assert f"top-5 accuracy                    {result['top5']:.2f} %" in printed
    assert re.search(rf"^accuracy of 3 +{result['classes'][3]['accuracy']:.2f} % of", printed, re.M)
    assert re.search(rf"^{result['confused'][0]['class']} taken for \S+ +[\d.]+ %, ", printed, re.M)
    run_eval(run, "--limit", "96", "--figure", tmp_path / "classes.png")
    with Image.open(tmp_path / "classes.png") as picture:
        assert picture.width == 7.2 * 300


@pytest.mark.parametrize(
    "name, sentence", [("a.gif", "must end in .png, .pdf, .svg"), ("curves.png", "is a file of a run")]
)
def test_no_picture_can_be_drawn_there(run, name, sentence):
    with pytest.raises(SystemExit, match=sentence):
        run_eval(run, "--figure", run / name)


def test_spikes_of_lif_are_called_binary(result):
    lif = result["model"] | {"neuron": "lif", "spike_bits": None}
    assert "per image (binary spikes)" in table(result | {"model": lif})


def test_a_bf16_run_is_evaluated_as_it_was_trained(tmp_path, monkeypatch):
    kept = []

    def in_bf16(measure):
        def measured(*args):
            kept.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16)
            return measure(*args)

        return measured

    monkeypatch.setattr("train.scores", in_bf16(scores))
    monkeypatch.setattr("eval.predictions", in_bf16(predictions))
    flags = ["--width", "0.125", "--mixed-precision", "bf16", "--ema", "0.5", "--lr", "0.2"]
    run_train(*flags, "--epochs", "1", "--output-dir", tmp_path / "run")
    run_eval(tmp_path / "run", "--limit", "96", "--json", tmp_path / "result.json")
    assert kept == [True] * 3  # train.py once, eval.py twice: it warms up
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["mixed_precision"] == "bf16"
    assert found["accuracy"] == metrics(tmp_path / "run")[-1]["accuracy"]


def test_predictions_are_those_of_the_summed_logits():
    """Checked against a loop over images and steps; the mode of the model is given back."""
    torch.manual_seed(1)
    model = empf.resnet18(num_classes=3, in_channels=1, image_size=8, T=3, width=0.125).train()
    batches = [(torch.randn(n, 1, 8, 8), torch.randint(3, (n,))) for n in (5, 2)]
    found = correct_per_step(model, batches).tolist()
    assert model.training and model.t == 0
    model.eval()
    expected = [0, 0, 0]
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            empf.reset(model)
            total = torch.zeros(3)
            for t in range(3):
                with torch.no_grad():
                    total += model(image[None], steps=1)[0, 0]
                expected[t] += int(total.argmax() == label)
    assert found == expected and 0 < found[0] < 7


def test_data_from_another_folder(run, tmp_path):
    folder = image_folder(tmp_path / "data", "digits", train=10, test=20)
    run_eval(run, "--data", folder, "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["images"] == 20


def without_settings(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"train": {}}))


def another_architecture(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config["model"]["width"] = 0.25
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, flags, sentence",
    [
        (shutil.rmtree, [], "is not a run folder, it has no config.json"),
        (without_settings, [], "does not say on which data it was trained"),
        (lambda run: (run / "metrics.jsonl").write_text("{"), [], "metrics.jsonl, line 1 is damaged"),
        (another_architecture, [], "belongs to another architecture than the configured resnet18"),
        (lambda run: (run / "model.safetensors").write_bytes(b"1234"), [], "model.safetensors is damaged"),
        (lambda run: (run / "config.json").write_text("{"), [], "config.json is damaged"),
        (None, ["--batch-size", "0"], "--batch-size and --count-batches must be at least 1"),
        (None, ["--limit", "0"], "limit must be at least 1"),
        (None, ["--limit", "x"], "argument --limit: invalid int value: 'x'"),
        (
            None,
            ["--test-split", "x", "--config", "y"],
            "lie in memory as they are: leave --test-split and --config out",
        ),
        (None, ["--data="], "data must not be empty: leave --data out"),
        (None, ["--device="], "device must not be empty: leave --device out"),
        (None, ["--json", "RUN/state/lock"], "lock is a file of a run: choose another name"),
        (None, ["--fast"], "unrecognized arguments: --fast"),
        (None, ["--device", "toaster"], "cannot use --device toaster ("),
        (None, ["--device", "meta"], "cannot use --device meta ("),
        (None, ["--workers", "1000000"], "workers must lie in 0.."),
        (None, ["--json", "RUN/config.json"], "config.json is a file of a run: choose another name"),
        (None, ["--data", "no/such/folder"], "no folder no/such/folder"),
        (None, ["--json", "/dev/null/result.json"], "could not write /dev/null/result.json ("),
    ],
)
def test_what_is_wrong_is_one_sentence(run, tmp_path, capsys, damage, flags, sentence):
    copy = shutil.copytree(run, tmp_path / "run")
    if damage is not None:
        damage(copy)
    with pytest.raises(SystemExit) as stop:
        run_eval(copy, "--limit", "32", *(flag.replace("RUN", str(copy)) for flag in flags))
    code = stop.value.code
    message = code if isinstance(code, str) else capsys.readouterr().err  # a string: printed at exit, code 1
    assert code not in (0, None)
    assert message.startswith("error: ") and sentence in message and message.strip().count("\n") == 0


def test_the_result_on_standard_output_is_nothing_but_json(run, capsys):
    capsys.readouterr()
    run_eval(run, "--limit", "32", "--json", "-", "--workers", "1")
    found = capsys.readouterr()
    assert json.loads(found.out)["images"] == 32
    assert found.err == "note: --workers does nothing, digits lies in memory\n"


def test_wholly_other_classes_are_refused():
    letters = ("a", "b", "c")
    with pytest.raises(ValueError, match=r"none of the classes of the data \(x, y, z, .* trained on \(a, b, c,"):
        check_classes(letters, ["x", "y", "z"])
    with pytest.raises(ValueError, match="the data give the label 0 to 'b', the network was trained with 1"):
        check_classes(letters, ["b", "a", "c"])
    for found in (letters, ["a", "b"], ["0", "1", "2"], ()):
        check_classes(letters, found)
        check_classes(["0", "1", "2"], found)
