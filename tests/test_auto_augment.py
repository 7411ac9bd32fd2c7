"""Policies of augmentation: what they do to batches, and that they are drawn as all else is."""

import sys

import pytest
import torch
from make_data import STREAMED, normalised, random_set, stream_folder

from empf.data import auto_augment
from empf.data.auto_augment import POLICIES, augmented, check_policy
from empf.data.batches import Augment, Batches
from empf.data.load import load_data, make_batches
from empf.data.sets import DATASETS

pytest.importorskip("kornia")


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_changes_images_and_keeps_their_range(policy, channels):
    images = torch.rand(40, channels, 16, 20, generator=torch.Generator().manual_seed(0)) * 255
    before, state = images.clone(), torch.get_rng_state()
    made = augmented(images, policy, 0.0, (1, 2, 3))
    assert made.shape == images.shape and made.dtype == torch.float32 and torch.equal(images, before)
    assert made.min() >= 0 and made.max() <= 255 and (made != images).flatten(1).any(1).sum() > 10
    assert torch.equal(made, augmented(images, policy, 0.0, (1, 2, 3)))
    assert not torch.equal(made, augmented(images, policy, 0.0, (1, 2, 4)))
    assert torch.equal(torch.get_rng_state(), state)


def test_erasing_makes_a_rectangle_black():
    images = torch.full((200, 3, 32, 32), 200.0)
    made = augmented(images, "none", 0.5, (0,))
    erased = (made != 200).any(1)  # B H W
    assert 70 < erased.flatten(1).any(1).sum() < 130 and (made[made < 199] == 0).all()
    for area in erased[erased.flatten(1).any(1)]:
        rows, columns = area.any(1), area.any(0)
        assert area.sum() == rows.sum() * columns.sum() and 0.01 < area.float().mean() < 0.4


@pytest.mark.parametrize("augment", [Augment(auto_augment="trivial"), Augment(erasing=0.9)])
def test_batches_are_a_pure_function_of_seed_epoch_and_number(augment):
    data = random_set(48)

    def made(epoch: int = 0, start: int = 0, seed: int = 3, **options) -> list:
        batches = Batches(data, 16, train=True, seed=seed, augment=augment, **options)
        batches.set_epoch(epoch)
        return [images for images, _ in batches.iterate(start)]

    whole = made()
    assert all(torch.equal(a, b) for a, b in zip(made(start=1), whole[1:], strict=True))
    assert not torch.equal(made(epoch=1)[0], whole[0]) and not torch.equal(made(seed=4)[0], whole[0])
    assert not torch.equal(whole[0], next(iter(Batches(data, 16, train=True, seed=3)))[0])
    test = torch.cat([images for images, _ in Batches(data, 16, train=False, augment=augment)])
    torch.testing.assert_close(test.double(), normalised(data.images), rtol=0, atol=1e-5)


def test_streamed_batches_have_policies_too(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, "streamed", STREAMED)
    train, _ = load_data("streamed", stream_folder(tmp_path, {"train": [40], "validation": [4]}))
    plain, made, again = (
        [images for images, _ in make_batches(train, 8, train=True, augment=a)]
        for a in (Augment(), Augment(auto_augment="rand"), Augment(auto_augment="rand"))
    )
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
    assert sum(not torch.equal(a, b) for a, b in zip(made, plain, strict=True)) >= 4


def test_wrong_settings(monkeypatch):
    with pytest.raises(ValueError, match="auto_augment must be one of none, cifar, trivial, rand, got 'auto'"):
        Augment(auto_augment="auto")
    with pytest.raises(ValueError, match="erasing is a share and must lie between 0 and 1, got 2"):
        Augment(erasing=2)
    auto_augment._steps.cache_clear()
    monkeypatch.setitem(sys.modules, "kornia.augmentation", None)
    with pytest.raises(ValueError, match=r"auto_augment and erasing need a package: pip install 'empf\[augment\]'"):
        check_policy("trivial", 0.0)
    check_policy("none", 0.0)
