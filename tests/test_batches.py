"""Batches of images in memory: order, sharing among processes, and each augmentation by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from make_data import assert_same, normalised, random_set, stored

from empf.data.batches import Augment, Batches
from empf.data.events import EventBatches, EventSet
from empf.data.load import make_batches
from empf.data.sets import DATASETS, ImageSet

# ---- order and sharing

EVERYTHING = Augment(crop=True, flip=True, cutout=9, mixup=0.8, cutmix=1.0, label_smoothing=0.1)


def test_an_epoch_takes_every_image_once_in_a_new_order():
    whole = random_set(50)
    whole = replace(whole, labels=torch.arange(50))  # the label tells which image it is
    batches = Batches(whole, 8, train=True, seed=3)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        got = list(batches)
        assert len(got) == len(batches) == 6
        for images, labels in got:
            assert images.dtype == torch.float32 and labels.dtype == torch.int64
            torch.testing.assert_close(images.double(), normalised(whole.images[labels]), rtol=0, atol=1e-6)
        orders.append(torch.cat([labels for _, labels in got]))
        assert orders[-1].unique().numel() == 48
    assert not torch.equal(*orders)
    other = torch.cat([labels for _, labels in Batches(whole, 8, train=True, seed=4)])
    assert not torch.equal(orders[0], other)


@pytest.mark.parametrize("train", [True, False])
def test_an_epoch_resumed_at_any_batch_is_the_same(train):
    def make_batches() -> Batches:
        made = Batches(random_set(45), 8, train=train, seed=5, augment=EVERYTHING)
        made.set_epoch(2)
        return made

    whole = list(make_batches())
    assert len(whole) == (5 if train else 6)
    assert_same(list(make_batches()), whole)
    for start in (1, 5, len(whole)):
        assert_same(list(make_batches().iterate(start=start)), whole[start:])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("augment", [Augment(crop=True, flip=True), EVERYTHING], ids=["hard", "soft"])
def test_ranks_see_parts_of_the_joined_batch(world, augment):
    whole = random_set(65)
    options = {"train": True, "seed": 1, "augment": augment}
    joined = Batches(whole, 6 * world, **options)
    ranks = [Batches(whole, 6, rank=rank, world=world, **options) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(joined)} == {65 // (6 * world)}
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_same(together, list(joined))
    for rank in ranks:
        assert all(len(images) == 6 for images, _ in rank)


@pytest.mark.parametrize("count, world, size", [(10, 1, 4), (11, 2, 3), (13, 3, 4), (2, 3, 4), (12, 3, 4)])
def test_ranks_share_the_test_images_exactly(count, world, size):
    whole = random_set(count)
    shares = []
    for rank in range(world):
        batches = Batches(whole, size, train=False, rank=rank, world=world, augment=EVERYTHING)
        got = list(batches)
        assert len(got) == len(batches)
        assert all(0 < len(images) <= size for images, _ in got)
        shares.append(got)
    images, labels = (torch.cat([batch[part] for share in shares for batch in share]) for part in (0, 1))
    torch.testing.assert_close(images.double(), normalised(whole.images), rtol=0, atol=1e-6)
    assert torch.equal(labels, whole.labels)
    counts = [sum(len(images) for images, _ in share) for share in shares]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 4, "rank": 2, "world": 2}, "rank=2, world=2"),
        ({"batch_size": 4, "seed": -1}, "seed=-1"),
        ({"batch_size": 6, "world": 2}, "10 training images do not fill one batch of 12: use a smaller --batch-size"),
    ],
)
def test_batches_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(random_set(10), train=True, **arguments)


@pytest.mark.parametrize("field", ["cutout", "mixup", "cutmix", "label_smoothing"])
def test_augmentation_out_of_range(field):
    with pytest.raises(ValueError, match=f"{field} must not be negative, got -1"):
        Augment(**{field: -1})


def test_label_smoothing_above_one():
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1, got 1.5"):
        Augment(label_smoothing=1.5)


# ---- augmentation


def plain(whole: ImageSet, augment: Augment | None = None, size: int = 16, epoch: int = 0) -> list:
    batches = Batches(whole, size, train=True, seed=7, augment=augment)
    batches.set_epoch(epoch)
    return list(batches)


def shifted(image: np.ndarray, y: int, x: int, flip: bool) -> np.ndarray:
    """What a crop window at (y, x) of the image, moved by -y and -x and black elsewhere, shows; one pixel at a time."""
    channels, side, _ = image.shape
    out = np.zeros_like(image)
    for row in range(side):
        for column in range(side):
            source_row, source_column = row + y, (side - 1 - column if flip else column) + x
            if 0 <= source_row < side and 0 <= source_column < side:
                out[:, row, column] = image[:, source_row, source_column]
    return out


def test_crop_and_flip_show_every_shift_and_nothing_else():
    whole = random_set(64)
    reference = {(y, x, f): None for y in range(-4, 5) for x in range(-4, 5) for f in (False, True)}
    seen = []
    for epoch in range(2):
        before = plain(whole, epoch=epoch)
        after = plain(whole, Augment(crop=True, flip=True), epoch=epoch)
        for (images, labels), (augmented, augmented_labels) in zip(before, after, strict=True):
            assert torch.equal(labels, augmented_labels)
            for image, result in zip(stored(images).numpy(), stored(augmented).numpy(), strict=True):
                # the centre pixel is unique enough to leave few candidates for the slow loop
                candidates = [
                    (y, x, f)
                    for y, x, f in reference
                    if (image[:, 16 + y, (15 if f else 16) + x] == result[:, 16, 16]).all()
                ]
                matches = [c for c in candidates if np.array_equal(shifted(image, *c), result)]
                assert len(matches) == 1
                seen += matches
    assert {y for y, _, _ in seen} == {x for _, x, _ in seen} == set(range(-4, 5))
    assert 40 <= sum(f for _, _, f in seen) <= 88  # of 128, flips with probability 1/2: within 4 sigma


@pytest.mark.parametrize("name, padding", [("digits", 1), ("imagenet200", 8)])
def test_crop_shifts_by_up_to_the_padding_of_the_dataset(name, padding):
    whole = random_set(64, name)
    side = whole.spec.image_size
    borders = set()
    for (images, _), (augmented, _) in zip(plain(whole), plain(whole, Augment(crop=True)), strict=True):
        for image, result in zip(stored(images, name).numpy(), stored(augmented, name).numpy(), strict=True):
            rows = np.flatnonzero(result.any(axis=(0, 2)))
            columns = np.flatnonzero(result.any(axis=(0, 1)))
            y = -rows[0] if rows[0] else side - 1 - rows[-1]
            x = -columns[0] if columns[0] else side - 1 - columns[-1]
            np.testing.assert_array_equal(shifted(image, y, x, False), result)
            borders |= {y, x}
    assert borders == set(range(-padding, padding + 1))


def test_digits_are_never_mirrored():
    whole = random_set(64, "digits")
    assert_same(plain(whole, Augment(flip=True)), plain(whole))


@pytest.mark.parametrize("side", [1, 8, 9])
def test_cutout_sets_one_square_to_the_mean_colour(side):
    whole = random_set(64)
    augment = Augment(crop=True, flip=True)
    centres = []
    for before, after in zip(plain(whole, augment), plain(whole, replace(augment, cutout=side)), strict=True):
        for image, result in zip(before[0].numpy(), after[0].numpy(), strict=True):
            hole = (result == 0).all(axis=0)
            ys, xs = np.nonzero(hole)
            fits = []
            for y in range(32):  # the square of every centre, one pixel at a time
                for x in {int(xs.min()) + side // 2, int(xs.max()) - (side - 1 - side // 2)} & set(range(32)):
                    square = np.zeros((32, 32), bool)
                    square[
                        max(y - side // 2, 0) : y - side // 2 + side, max(x - side // 2, 0) : x - side // 2 + side
                    ] = True
                    if np.array_equal(square, hole):
                        fits.append((y, x))
            assert len(fits) == 1
            centres += fits
            np.testing.assert_array_equal(result, np.where(hole, np.float32(0), image))
    centres = np.array(centres)
    assert centres.min() < 4 and centres.max() > 27  # holes reach over every border


def expected_targets(labels: torch.Tensor, share: float, smoothing: float, classes: int) -> torch.Tensor:
    """A share of the own label, the rest of the label at the mirrored place, smoothed; one image at a time."""
    out = torch.zeros(len(labels), classes, dtype=torch.float64)
    for i in range(len(labels)):
        out[i, labels[i]] += share * (1 - smoothing)
        out[i, labels[len(labels) - 1 - i]] += (1 - share) * (1 - smoothing)
        out[i] += smoothing / classes
    return out


def share_of(targets: torch.Tensor, labels: torch.Tensor, smoothing: float) -> float:
    """The share that the targets of a batch tell, from the first pair with two labels."""
    i = int((labels != labels.flip(0)).nonzero()[0])
    uniform = smoothing / targets.shape[1]
    return (targets[i, labels[i]].item() - uniform) / (1 - smoothing)


def test_label_smoothing_alone():
    whole = random_set(32)
    for (images, labels), (same, targets) in zip(plain(whole), plain(whole, Augment(label_smoothing=0.1)), strict=True):
        assert torch.equal(images, same)
        assert targets.dtype == torch.float32
        torch.testing.assert_close(targets.double(), expected_targets(labels, 1.0, 0.1, 10), rtol=0, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_the_weighted_sum_with_the_mirrored_batch(smoothing):
    whole = random_set(160)
    augment = Augment(crop=True, flip=True, cutout=4)
    mixed = plain(whole, replace(augment, mixup=0.8, label_smoothing=smoothing))
    shares = []
    for (images, _), (_, labels), (result, targets) in zip(plain(whole, augment), plain(whole), mixed, strict=True):
        shares.append(share := share_of(targets, labels, smoothing))
        expected = share * images.double() + (1 - share) * images.double().flip(0)
        torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(targets.double(), expected_targets(labels, share, smoothing, 10), rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(16), rtol=0, atol=1e-6)
    assert min(shares) < 0.3 and max(shares) > 0.7


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cutmix_swaps_one_box_and_weighs_by_its_area(smoothing):
    whole = random_set(160)
    augment = Augment(crop=True, flip=True)
    mixed = plain(whole, replace(augment, cutmix=1.0, label_smoothing=smoothing))
    areas = []
    for (images, labels), (result, targets) in zip(plain(whole, augment), mixed, strict=True):
        changed = (result != images).any(dim=(0, 1))
        rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
        box = torch.zeros(32, 32, dtype=torch.bool)
        if changed.any():
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        assert torch.equal(changed, box)
        assert torch.equal(result, torch.where(box, images.flip(0), images))
        areas.append(box.sum().item() / 1024)
        expected = expected_targets(labels, 1 - areas[-1], smoothing, 10)
        torch.testing.assert_close(targets.double(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.sum(1), torch.ones(16), rtol=0, atol=1e-6)
    assert min(areas) < 0.3 and max(areas) > 0.5


def test_mixup_and_cutmix_take_turns_by_chance():
    whole = random_set(8, "digits")
    counts = {"mixup": 0, "cutmix": 0}
    for epoch in range(100):
        ((images, _),) = plain(whole, size=8, epoch=epoch)
        ((result, _),) = plain(whole, Augment(mixup=0.8, cutmix=1.0), size=8, epoch=epoch)
        # a box takes every pixel from one of the two images, a sum takes hardly any
        taken = ((result == images) | (result == images.flip(0))).float().mean()
        counts["cutmix" if taken == 1 else "mixup"] += 1
    assert 30 <= counts["mixup"] <= 70


def test_switching_one_augmentation_on_leaves_the_draws_of_the_others():
    whole = random_set(32)
    both = plain(whole, Augment(crop=True, cutout=8))
    for (cropped, _), (result, _) in zip(plain(whole, Augment(crop=True)), both, strict=True):
        assert torch.equal(result[result != 0], cropped[result != 0])


@pytest.mark.gpu
def test_batches_on_the_gpu_equal_those_on_the_cpu():
    whole = random_set(48)
    assert whole.to("cuda").images.is_cuda
    for (images, targets), (expected, expected_soft) in zip(
        plain(whole.to("cuda"), EVERYTHING), plain(whole, EVERYTHING), strict=True
    ):
        assert images.is_cuda and targets.is_cuda
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(targets.cpu(), expected_soft, rtol=0, atol=1e-6)


# ---- the kind of batches that fits the data


def test_batches_of_images_are_made_by_the_factory():
    whole = random_set(20)
    options = dict(train=True, seed=2, rank=1, world=2, augment=EVERYTHING)
    made = make_batches(whole, 4, workers=3, **options)
    assert type(made) is Batches
    assert_same(list(made), list(Batches(whole, 4, **options)))


def test_batches_of_events_are_made_by_the_factory():
    frames = torch.rand(6, 3, 2, 8, 8).half()
    spec = replace(DATASETS["dvs-cifar10"], image_size=8)
    events = EventSet(frames, torch.arange(6), [str(i) for i in range(6)], spec, "folders")
    augment = Augment(crop=True, flip=True, roll=3, label_smoothing=0.1)
    made = make_batches(events, 4, train=True, seed=2, augment=augment)
    assert type(made) is EventBatches
    expected = EventBatches(events, 4, train=True, seed=2, augment=augment)
    assert_same(list(made), list(expected))
    ((plain, _),) = make_batches(events, 6, train=False)
    assert torch.equal(plain, frames.transpose(0, 1).float())
    with pytest.raises(ValueError, match="mixup and cutmix are for images, not for events: set them to 0"):
        make_batches(events, 4, train=True, augment=Augment(cutmix=3, mixup=0.1))
    with pytest.raises(ValueError, match="mixup is for images, not for events: set it to 0"):
        make_batches(events, 4, train=True, augment=Augment(mixup=0.1))
