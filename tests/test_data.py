"""Loading: every layout, and one clear sentence per fault. Batches: order, sharing, and each augmentation by itself."""

import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from make_data import disk_folder, image_folder, parquet_folder, pictures, to_dataset
from PIL import Image

from empf import data
from empf.data import DATASETS, Augment, Batches, ImageSet, load

datasets.disable_progress_bars()


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """PIL images as uint8 [N, C, H, W]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)


def random_set(count: int, name: str = "cifar10", seed: int = 0) -> ImageSet:
    """In memory; all pixels > 0, so that the black border of a crop can be told from the image."""
    spec = DATASETS[name]
    generator = torch.Generator().manual_seed(seed)
    shape = (count, spec.channels, spec.image_size, spec.image_size)
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(spec.num_classes, (count,), generator=generator)
    return ImageSet(images, labels, [str(i) for i in range(spec.num_classes)], spec)


def normalised(images: torch.Tensor, name: str = "cifar10") -> torch.Tensor:
    """(pixel/255 - mean) / std of uint8 [..., C, H, W], in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (DATASETS[name].mean, DATASETS[name].std))
    return (images.double() / 255 - mean) / std


def stored(batch: torch.Tensor, name: str = "cifar10") -> torch.Tensor:
    """The uint8 pixels of a normalised batch."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (DATASETS[name].mean, DATASETS[name].std))
    exact = (batch.double() * std + mean) * 255
    assert (exact - exact.round()).abs().max() < 1e-3
    return exact.round().to(torch.uint8)


def assert_same(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for (images, targets), (expected_images, expected_targets) in zip(got, expected, strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(targets, expected_targets)


# ---- loading


@pytest.mark.parametrize("name", ["cifar10", "digits"])
@pytest.mark.parametrize("write", [parquet_folder, image_folder, disk_folder])
def test_every_layout_gives_the_stored_pixels(tmp_path, write, name):
    folder = write(tmp_path / "set", name, train=23, test=11)
    before = sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*"))
    for seed, split in enumerate(load(name, folder)):
        images, labels = pictures((23, 11)[seed], name, seed=seed)
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert torch.equal(split.images, pixels(images))
        assert split.labels.tolist() == labels
        assert split.class_names == [f"class{i:03}" for i in range(10)]
        assert split.spec is DATASETS[name]
    assert sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*")) == before  # nothing written there


@pytest.mark.parametrize(
    "columns, train, test",
    [
        (("image", "label"), "train.parquet", "validation.parquet"),
        (("img", "fine_label"), "train/a.parquet", "valid/a.parquet"),
        (("image", "fine_label"), "data/train-00000-of-00001.parquet", "data/val-00000-of-00001.parquet"),
    ],
)
def test_column_and_split_aliases(tmp_path, columns, train, test):
    for seed, file in enumerate((train, test)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        rows = to_dataset(*pictures(12, "cifar10", seed=seed), "cifar10", columns=columns, class_label=False)
        rows.to_parquet(tmp_path / file)
    splits = load("cifar10", tmp_path)
    for seed, split in enumerate(splits):
        assert torch.equal(split.images, pixels(pictures(12, "cifar10", seed=seed)[0]))
        assert split.class_names == [str(i) for i in range(10)]


def test_grey_and_palette_images_become_rgb(tmp_path):
    folder = image_folder(tmp_path, "cifar10", train=20, test=10)
    grey = np.random.default_rng(3).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "train/class000/00000.png")
    Image.new("RGB", (32, 32), (10, 20, 30)).quantize().save(folder / "train/class001/00001.png")
    train, _ = load("cifar10", folder)
    assert torch.equal(train.images[0], torch.from_numpy(grey).expand(3, 32, 32))
    assert train.images[1].unique(dim=1).squeeze().unique(dim=1).flatten().tolist() == [10, 20, 30]


@pytest.mark.parametrize("write", [parquet_folder, image_folder, disk_folder])
def test_limit_takes_the_first_images_of_each_split(tmp_path, write):
    folder = write(tmp_path / "set", "cifar10", train=23, test=11)
    for limit in (5, 15, 100):  # 15 reaches into the second file of the parquet folder
        for got, whole in zip(load("cifar10", folder, limit=limit), load("cifar10", folder), strict=True):
            assert torch.equal(got.images, whole.images[:limit])
            assert torch.equal(got.labels, whole.labels[:limit])


def test_limit_decodes_no_more_than_it_takes(tmp_path):
    folder = image_folder(tmp_path, "cifar10", train=12, test=10)
    (folder / "train/class005/00005.png").write_bytes(b"not an image")
    assert len(load("cifar10", folder, limit=5)[0]) == 5
    with pytest.raises(ValueError, match="image 5 of train"):
        load("cifar10", folder, limit=6)


def test_digits_are_split_evenly_and_always_alike():
    from sklearn.datasets import load_digits

    train, test = load("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape[1:] == (1, 8, 8)
    for split, share in ((train, 0.8), (test, 0.2)):
        exact = torch.from_numpy(np.bincount(load_digits().target)) * share
        assert (split.labels.bincount() - exact).abs().max() <= 1
    # every digit is in exactly one split, with its label; v -> round(v * 255 / 16) can be undone
    both = torch.cat((train.images, test.images)).double().mul(16 / 255).round().long().flatten(1)
    got = sorted(zip(both.tolist(), torch.cat((train.labels, test.labels)).tolist(), strict=True))
    source = load_digits()
    assert got == sorted(zip(source.data.astype(int).tolist(), source.target.tolist(), strict=True))
    assert train.images.max() == 255 and 16 in train.images.unique()  # 1 -> 15.94 -> 16: rounded, not cut off

    again, _ = load("digits", limit=100)
    assert torch.equal(again.images, train.images[:100])
    other, _ = load("digits", seed=1)
    assert not torch.equal(other.images, train.images)


def test_digits_mean_and_std_are_those_of_the_training_images():
    train, _ = load("digits")
    scaled = train.images.double() / 255
    assert train.spec.mean == pytest.approx((scaled.mean().item(),), abs=5e-5)
    assert train.spec.std == pytest.approx((scaled.std().item(),), abs=5e-5)


def test_the_hub_is_asked_for_the_right_dataset(monkeypatch):
    asked = []

    def load_dataset(hub_id):
        asked.append(hub_id)
        rows = [
            to_dataset(*pictures(12, "cifar100", seed=seed), "cifar100", columns=("img", "fine_label"))
            for seed in (0, 1)
        ]
        return datasets.DatasetDict(train=rows[0], valid=rows[1])

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    train, test = load("cifar100", limit=7)
    assert asked == ["uoft-cs/cifar100"]
    assert torch.equal(train.images, pixels(pictures(7, "cifar100")[0]))
    assert len(test) == 7 and len(test.class_names) == 100


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), datasets.exceptions.DatasetNotFoundError("gone")])
def test_hub_out_of_reach(monkeypatch, error):
    def load_dataset(hub_id):
        raise error

    monkeypatch.setattr(data.datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"uoft-cs/cifar10 .*(no route|gone).* --data FOLDER") as caught:
        load("cifar10")
    assert "\n" not in str(caught.value)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'empf\[demo\]'"):
        load("digits")


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("mnist", {}, r"unknown dataset 'mnist': choose one of digits, cifar10, cifar100, imagenet200"),
        ("imagenet1k", {}, "imagenet1k does not fit in memory and will be streamed in a later version"),
        ("dvs-cifar10", {}, "dvs-cifar10 holds events, which a later version will read"),
        ("digits", {"limit": -1}, "limit must be at least 1 image, got -1"),
        ("digits", {"limit": 0}, "limit must be at least 1 image, got 0"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(name, **arguments)


def test_missing_folder_and_missing_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*--data"):
        load("cifar10", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing to see")
    with pytest.raises(FileNotFoundError, match=r"no train split in .*: expected train-\*\.parquet"):
        load("cifar10", tmp_path)
    image_folder(tmp_path, "cifar10", train=10, test=0)
    with pytest.raises(FileNotFoundError, match="no test split in"):
        load("cifar10", tmp_path)
    datasets.DatasetDict(train=to_dataset(*pictures(10, "cifar10"), "cifar10")).save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match="no test split in .*disk: it has train"):
        load("cifar10", tmp_path / "disk")
    (tmp_path / "empty/train/class000").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in train of .*empty"):
        load("cifar10", tmp_path / "empty")


def test_missing_shard(tmp_path):
    folder = parquet_folder(tmp_path, "cifar10")
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"found 1 of the 2 files of .*train-\*\.parquet: copy the missing ones"):
        load("cifar10", folder)


def faulty(folder: Path, images: list, labels: list, name: str = "cifar10", **options) -> Path:
    """A parquet folder with these training rows and a sound test split."""
    parquet_folder(folder, name)
    for shard in folder.glob("train-*"):
        shard.unlink()
    to_dataset(images, labels, name, **options).to_parquet(folder / "train.parquet")
    return folder


def test_missing_columns_are_named(tmp_path):
    folder = faulty(tmp_path, *pictures(10, "cifar10"), columns=("picture", "label"))
    with pytest.raises(ValueError, match="train.parquet has the columns picture, label: it needs one of img | image "):
        load("cifar10", folder)


def test_column_that_holds_no_images(tmp_path):
    pq.write_table(pa.table({"img": [1, 2], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="column img holds int64: store the images as datasets.Image"):
        load("cifar10", tmp_path)


def test_image_of_the_wrong_size(tmp_path):
    images, labels = pictures(10, "cifar10")
    images[7] = images[7].resize((28, 30))
    message = "image 7 of train of .* is 28x30 pixels, but cifar10 has 32x32"
    with pytest.raises(ValueError, match=message):
        load("cifar10", faulty(tmp_path, images, labels))


@pytest.mark.parametrize(
    "name, mode, message",
    [
        ("digits", "RGB", "RGB, but digits needs 8-bit grey"),
        ("cifar10", "I;16", "I;16, but cifar10 needs 8-bit colour"),
    ],
)
def test_wrong_pixel_format(tmp_path, name, mode, message):
    folder = image_folder(tmp_path, name, train=20, test=10)
    side = DATASETS[name].image_size
    Image.new(mode, (side, side)).save(folder / "train/class003/00003.png")
    with pytest.raises(
        ValueError, match=rf"image 3 of train of .*class003.00003\.png\) has the pixel format {message}"
    ):
        load(name, folder)


@pytest.mark.parametrize("label", [-1, 10, None])
def test_label_out_of_range(tmp_path, label):
    images, labels = pictures(10, "cifar10")
    labels[4] = label
    with pytest.raises(ValueError, match=rf"image 4 of train of .* has the label {label}, .* labels 0\.\.9"):
        load("cifar10", faulty(tmp_path, images, labels, class_label=False))


def test_another_number_of_classes(tmp_path):
    (image_folder(tmp_path, "cifar10", train=20, test=10) / "train/class009/00009.png").unlink()
    (tmp_path / "train/class009/00019.png").unlink()
    (tmp_path / "train/class009").rmdir()
    with pytest.raises(ValueError, match="train of .* has 9 classes, but cifar10 has 10: check --dataset"):
        load("cifar10", tmp_path)


def test_classes_named_differently_in_train_and_test(tmp_path):
    (image_folder(tmp_path, "cifar10", train=20, test=10) / "test/class009").rename(tmp_path / "test/classical")
    with pytest.raises(ValueError, match="train and test of .* name their classes differently"):
        load("cifar10", tmp_path)


def test_corrupt_image_is_named(tmp_path):
    folder = image_folder(tmp_path / "files", "cifar10", train=20, test=10)
    file = folder / "test/class002/00002.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"cannot decode image 2 of test of .*class002.00002\.png\) \(.*replace"):
        load("cifar10", folder)

    images, labels = pictures(10, "cifar10")
    images[8] = {"bytes": b"\x89PNG\r\n\x1a\n and no more", "path": "cat.png"}
    with pytest.raises(ValueError, match=r"cannot decode image 8 of train of .* \(cat\.png\)"):
        load("cifar10", faulty(tmp_path / "rows", images, labels))
    Image.new("RGB", (32, 32)).save(tmp_path / "bomb.bmp")
    header = bytearray((tmp_path / "bomb.bmp").read_bytes())
    header[18:26] = (20000).to_bytes(4, "little") * 2  # announces 20000 x 20000 pixels
    images[8] = {"bytes": bytes(header), "path": None}
    with pytest.raises(ValueError, match=r"cannot decode image 8 of train of .* \("):
        load("cifar10", faulty(tmp_path / "rows", images, labels))
    images[8] = None
    with pytest.raises(ValueError, match="image 8 of train of .* is empty: remove the row"):
        load("cifar10", faulty(tmp_path / "rows", images, labels))


def test_corrupt_file_is_named(tmp_path):
    folder = parquet_folder(tmp_path / "parquet", "cifar10")
    shard = folder / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot read .*train-00001-of-00002\.parquet \(.*copy the file again"):
        load("cifar10", folder)

    not_text = pa.array([b"\xff"]).view(pa.string())
    image = pa.StructArray.from_arrays([pa.array([b"pixels"]), not_text], ["bytes", "path"])
    pq.write_table(pa.table({"img": image, "label": [0]}), shard)
    with pytest.raises(ValueError, match=r"cannot read .*train-00001-of-00002\.parquet \(.*copy the file again"):
        load("cifar10", folder)

    folder = disk_folder(tmp_path / "disk", "cifar10")
    (file,) = (folder / "test").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read .*disk \(.*write it again with save_to_disk"):
        load("cifar10", folder)


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

    batches = Batches(whole, 8, train=True, seed=3, drop_last=False)
    got = torch.cat([labels for _, labels in batches])
    assert len(batches) == 7 and torch.equal(got.sort().values, torch.arange(50))
    assert torch.equal(got[:48], orders[0])


@pytest.mark.parametrize("train", [True, False])
def test_an_epoch_resumed_at_any_batch_is_the_same(train):
    def batches() -> Batches:
        made = Batches(random_set(45), 8, train=train, seed=5, augment=EVERYTHING, drop_last=False)
        made.set_epoch(2)
        return made

    whole = list(batches())
    assert len(whole) == 6
    assert_same(list(batches()), whole)
    for start in (1, 5, 6):
        assert_same(list(batches().iterate(start=start)), whole[start:])


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("augment", [Augment(crop=True, flip=True), EVERYTHING], ids=["hard", "soft"])
def test_ranks_see_parts_of_the_joined_batch(world, drop_last, augment):
    whole = random_set(65)
    options = {"train": True, "seed": 1, "augment": augment, "drop_last": drop_last}
    joined = Batches(whole, 6 * world, **options)
    ranks = [Batches(whole, 6, rank=rank, world=world, **options) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {len(joined)} == {65 // (6 * world) + (not drop_last)}
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert_same(together, list(joined))
    for rank in ranks:
        assert all(len(images) == 6 for images, _ in list(rank)[: 65 // (6 * world)])


def test_a_rest_too_small_for_all_ranks_is_left_out():
    ranks = [Batches(random_set(13), 2, train=True, rank=rank, world=3, drop_last=False) for rank in range(3)]
    assert [len(list(rank)) for rank in ranks] == [len(rank) for rank in ranks] == [2, 2, 2]


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
