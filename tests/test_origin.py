"""Where weights come from: what a run recorded, and the fingerprint that says whether they are still its own."""

import re
import shutil

import pytest
import torch

import empf
from empf.deploy.origin import Origin
from empf.files import fingerprint
from empf.runs import save_config, save_results


@pytest.mark.parametrize("name, value, kind", [("dataset", [], "str"), ("epochs", "3", "int"), ("split", 1, "str")])
def test_an_origin_of_other_types_is_refused(name, value, kind):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {kind}, got {value!r}")):
        Origin.from_dict({name: value})


def test_what_is_true_of_any_weights_stays_without_results():
    origin = Origin("digits", ("a",), (0.5,), (0.25,), (90.0,), 3, split="random", resize="mean")
    assert origin.without_results() == Origin("digits", ("a",), (0.5,), (0.25,), split="random", resize="mean")
    assert origin.frames() == {"resize": "mean"}


def test_a_fingerprint_changes_with_every_number_name_type_and_shape():
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    same = {"b": torch.ones(3, 2).t(), "a": torch.arange(6.0)}
    others = [
        state | {"a": torch.arange(6.0).nextafter(torch.tensor(9.0))}, state | {"b": torch.ones(3, 2)},
        state | {"a": torch.arange(6.0).int()}, {"a": state["a"], "c": state["b"]},
    ]  # fmt: skip
    assert fingerprint(state) == fingerprint(same)
    assert len({fingerprint(state, "text"), *(fingerprint(other) for other in [state, *others])}) == 6


def test_other_weights_in_a_run_have_no_accuracy(tmp_path):
    """An older or foreign model.safetensors: what the run measured is not said of it."""
    models = [empf.resnet18(width=0.0625, image_size=8, in_channels=1, T=1) for _ in range(2)]
    for name, model in zip(("run", "other"), models, strict=True):
        save_config(tmp_path / name, model.config, {"dataset": "digits", "seed": 0}, ["a"], (0.5,), (0.5,))
        save_results(tmp_path / name, model, [{"epoch": 1, "accuracy": [50.0]}])
    assert Origin.of(empf.load(tmp_path / "run")).accuracy == (50.0,)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "run")
    origin = Origin.of(empf.load(tmp_path / "run"))
    assert (origin.accuracy, origin.epochs, origin.dataset) == ((), None, "digits")
