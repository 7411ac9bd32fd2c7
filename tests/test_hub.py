"""Hub methods on local folders: what is written, that it can be read again, and what the model card says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deploy_tools import logits, trained
from huggingface_hub import ModelCard

import empf
from empf.deploy import hub
from empf.deploy.hub import from_pretrained, model_card
from empf.deploy.origin import Origin
from empf.deploy.pack import PackedModel, load_packed, pack
from empf.model_config import ModelConfig
from empf.models import SpikingNetwork
from empf.runs import load, save_config, save_results

CLASSES = [f"digit {i}" for i in range(10)]
HISTORY = [
    {"epoch": e, "loss": 1.0 / e, "accuracy": [70.0 + e, 80.0 + e, 90.0 + e / 3], "images_per_s": 1.0} for e in (1, 2)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model, _ = trained(neuron="mem_bn", seca=1)
    save_config(folder, model.config, {"dataset": "digits", "data": None, "seed": 0}, CLASSES, (0.25,), (0.5,))
    save_results(folder, model, HISTORY)
    return folder


def test_a_run_gives_the_packed_network_its_names_and_numbers(run):
    wanted = Origin("digits", tuple(CLASSES), (0.25,), (0.5,), tuple(HISTORY[-1]["accuracy"]), 2)
    assert pack(load(run)).origin == wanted
    assert pack(trained()[0]).origin == Origin()


@pytest.mark.parametrize("text", ["{", "3", '{"accuracy": ["x"]}'])
def test_damaged_metrics_are_one_sentence(run, tmp_path, text):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"line 1 is damaged: restore it from a copy of the run"):
        pack(load(tmp_path / "run"))


def test_a_model_survives_save_and_from_pretrained(run, tmp_path):
    _, x = trained(neuron="mem_bn", seca=1)
    model = load(run)
    model.save_pretrained(tmp_path / "model")
    names = {"config.json", "metrics.jsonl", "model.safetensors", "README.md"}
    assert {p.name for p in (tmp_path / "model").iterdir()} == names
    again = SpikingNetwork.from_pretrained(tmp_path / "model")
    assert type(again) is type(model) and again.config == model.config and not again.training
    assert torch.equal(logits(again, x), logits(model, x))
    assert Origin.of(again) == Origin.of(model)
    assert load(tmp_path / "model").config == model.config  # it is a run folder


def test_a_model_without_a_run_can_be_saved_too(tmp_path):
    model, x = trained()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(SpikingNetwork.from_pretrained(str(tmp_path / "model")), x), logits(model, x))
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert "accuracy" not in card.text and card.data.eval_results is None


def test_a_packed_model_survives_save_and_from_pretrained(run, tmp_path):
    _, x = trained(neuron="mem_bn", seca=1)
    packed = pack(load(run))
    packed.save_pretrained(tmp_path / "packed")
    assert {p.name for p in (tmp_path / "packed").iterdir()} == {"packed.safetensors", "config.json", "README.md"}
    again = PackedModel.from_pretrained(tmp_path / "packed")
    assert again.origin == packed.origin
    assert torch.equal(logits(again, x), logits(packed, x))
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["origin"]["classes"] == CLASSES
    assert load_packed(tmp_path / "packed" / "packed.safetensors").config == packed.config


@pytest.mark.parametrize("kind", ["model", "packed"])
def test_the_card_says_what_the_run_recorded(run, tmp_path, kind):
    model = load(run)
    (model if kind == "model" else pack(model)).save_pretrained(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "empf" and "spiking-neural-network" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type) == ("digits", "accuracy")
    assert result.metric_value == pytest.approx(HISTORY[-1]["accuracy"][-1], abs=1e-3)
    for step, accuracy in enumerate(HISTORY[-1]["accuracy"], 1):
        assert f"| test accuracy after step {step} | {accuracy:.2f} % |" in card.text
    size = empf.account(model)
    assert f"| parameters | {size['params_mb']:.2f} MB (" in card.text
    assert f"| parameters as the authors count | {size['params_authors_mb']:.2f} MB (" in card.text
    assert "Trained for 2 epochs on digits." in card.text and "[0.25]" in card.text
    assert "model = empf.from_pretrained(NAME)" in card.text


def test_the_card_names_the_data_set_as_the_hub_does():
    packed = pack(trained()[0])
    packed.origin = Origin("cifar100", accuracy=(50.0,))
    card = model_card(packed)
    assert card.data.datasets == ["uoft-cs/cifar100"] and card.data.model_name == "resnet18 on cifar100"


def test_the_card_of_a_network_for_events():
    packed = pack(trained("vgg_snn")[0])
    packed.origin = Origin("dvs-cifar10", mean=(0.0, 0.0), std=(1.0, 1.0), split="random")
    text = model_card(packed).text
    assert "logits = model(events)  # [T,N,2,H,W] -> [T,N,classes]" in text
    assert "| split of the recordings | random |" in text and "mean counts" in text and "scaled to 0..1" not in text


@pytest.mark.parametrize("kind", ["model", "packed"])
def test_a_changed_network_makes_no_claim_about_its_accuracy(run, tmp_path, kind):
    net = load(run) if kind == "model" else pack(load(run))
    with torch.no_grad():
        next(net.buffers()).mul_(2)
    net.save_pretrained(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "test accuracy" not in card.text and "Trained for" not in card.text and card.data.eval_results is None
    assert "[0.25]" in card.text  # what remains true is still said
    again = type(net).from_pretrained(tmp_path / "out")
    origin = Origin.of(again) if kind == "model" else again.origin
    assert origin == Origin("digits", tuple(CLASSES), (0.25,), (0.5,))
    if kind == "model":
        assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""
        assert pack(net).origin == origin


def test_a_model_does_not_overwrite_its_run(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="is the run that the model was read from: choose another folder"):
        load(tmp_path / "run").save_pretrained(tmp_path / "run")
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize("kind", ["model", "packed"])
def test_push_to_hub_uploads_the_folder(run, monkeypatch, kind):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return type("Repository", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **options):
            sent[repo_id] = {p.name: p.stat().st_size for p in Path(folder_path).iterdir()}
            return "https://huggingface.co/commit"

    monkeypatch.setattr(hub.hf, "HfApi", Api)
    model = load(run) if kind == "model" else pack(load(run))
    assert model.push_to_hub("someone/net") == "https://huggingface.co/commit"
    files = {"model": {"model.safetensors", "metrics.jsonl"}, "packed": {"packed.safetensors"}}[kind]
    assert set(sent["someone/net"]) == files | {"config.json", "README.md"} and min(sent["someone/net"].values()) > 0


def test_a_repository_is_downloaded_file_by_file(run, tmp_path, monkeypatch):
    """The options of the user are handed on; metrics may be missing."""
    from huggingface_hub.errors import EntryNotFoundError

    load(run).save_pretrained(tmp_path / "snapshot")
    (tmp_path / "snapshot" / "metrics.jsonl").unlink()
    asked = []

    def download(repo_id, filename, **options):
        asked.append((repo_id, filename, options.get("revision")))
        if not (tmp_path / "snapshot" / filename).is_file():
            raise EntryNotFoundError("404")
        return str(tmp_path / "snapshot" / filename)

    monkeypatch.setattr(hub.hf, "hf_hub_download", download)
    model = SpikingNetwork.from_pretrained("someone/net", revision="v1")
    assert model.config.neuron == "mem_bn"
    names = {"packed.safetensors", "config.json", "model.safetensors", "metrics.jsonl"}
    assert {(repository, revision) for repository, _, revision in asked} == {("someone/net", "v1")}
    assert {name for _, name, _ in asked} == names


@pytest.mark.parametrize("cls", [SpikingNetwork, PackedModel])
def test_a_folder_without_a_network(cls, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [from_pretrained, SpikingNetwork.from_pretrained, PackedModel.from_pretrained])
def test_a_keyword_that_is_not_known_is_an_error(run, tmp_path, load):
    """A network has the settings it was saved with: others would be silently ignored."""
    with pytest.raises(TypeError, match="'T'|'num_classes'|'foo'"):
        load(run, T=8, num_classes=5, foo=1)


def test_one_function_reads_both_kinds_and_a_class_only_its_own(run, tmp_path):
    model = load(run)
    packed = pack(model)
    packed.save_pretrained(tmp_path / "packed")
    assert empf.from_pretrained(tmp_path / "packed").to_bytes() == packed.to_bytes()
    assert type(empf.from_pretrained(run)) is type(model)
    with pytest.raises(ValueError, match="packed holds a PackedModel, .* call empf.from_pretrained"):
        SpikingNetwork.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="holds a ResNet, which is not packed"):
        PackedModel.from_pretrained(run)


def test_an_own_model_card_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    trained()[0].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_nothing_of_the_hub_is_imported_before_it_is_needed():
    """Half of what `import empf` takes beside torch would be imports that a network does not need."""
    heavy = ("huggingface_hub.hf_api", "datasets", "accelerate", "pyarrow", "matplotlib", "onnx")
    code = f"import sys, empf; print([name for name in {heavy} if name in sys.modules])\n"
    code += "try: empf.from_pretrained('no/such', local_files_only=True)\nexcept FileNotFoundError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules, sentence = done.stdout.splitlines()
    assert modules == "[]" and sentence.startswith("there is no folder or file no/such, and the Hub gives no such")


def test_networks_that_come_with_the_library_need_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)  # an absolute path in the library, not one below the present folder
    for folder in hub.NETWORKS.iterdir():
        net = from_pretrained(folder.name)
        assert isinstance(net, PackedModel) and len(net.origin.classes) == net.config.num_classes
        card = ModelCard.load(folder / "README.md")
        assert card.data.eval_results[0].metric_value == pytest.approx(net.origin.accuracy[-1], abs=1e-4)
        about = json.loads((folder / "config.json").read_text())
        assert ModelConfig.from_dict(about["packed"]) == net.config
        with pytest.raises(ValueError, match="which is packed"):
            SpikingNetwork.from_pretrained(folder.name)


def test_what_lies_here_goes_before_a_network_of_the_library(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model, _ = trained()
    model.save_pretrained("digits-resnet18")
    assert type(from_pretrained("digits-resnet18")) is type(model)
    assert hub.shipped("here/digits-resnet18") == Path("here/digits-resnet18")
    assert hub.shipped("..") == Path("..") and hub.shipped("no-such") == Path("no-such")


def test_a_name_that_is_wrong_is_told_which_are_there(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(hub.hf, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match="check the name; .*digits-resnet18.* come with the library"):
        from_pretrained("digits-resnet81")
