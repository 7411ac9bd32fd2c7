"""Images of one's own: every layout, any size, any label, and one clear sentence per fault."""

import io
import shutil
import warnings

import datasets
import numpy as np
import pytest
import torch
from make_data import CLASSES, LAYOUTS, SIZES, items, picture, rows_of, write
from PIL import ExifTags, Image

from empf.data.batches import Augment
from empf.data.load import hold_out, load_data, make_batches
from empf.data.sets import ImageSet, ImageSettings, StreamSet

datasets.disable_progress_bars()


def images_of(batches) -> dict[bytes, int]:
    """The images of all batches, with their labels."""
    pairs = [pair for images, labels in batches for pair in zip(images, labels.tolist(), strict=True)]
    return {image.numpy().tobytes(): label for image, label in pairs}


@pytest.mark.parametrize("sizes", ["square", "wide", "mixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_in_memory_and_streamed(tmp_path, layout, sizes):
    splits = {"train": items(8, sizes), "test": items(3, sizes)}
    folder = str(write(tmp_path / "own", layout, splits))
    settings = ImageSettings(size=(12, 16) if sizes == "mixed" else None)
    seen = []
    for streaming in (False, True):
        train, test = load_data(folder, streaming=streaming, images=settings)
        spec = train.spec
        assert (len(train), len(test)) == (24, 9) and train.class_names == test.class_names == list(CLASSES)
        assert spec == test.spec and (spec.channels, spec.num_classes, spec.name) == (3, 3, folder)
        assert spec.size == (settings.size or SIZES[sizes][0]) and spec.resized == (sizes == "mixed")
        assert isinstance(spec.image_size, int) == (sizes == "square")
        assert isinstance(test, StreamSet if streaming or spec.resized else ImageSet)
        parts = [images_of(make_batches(part, 4, train=False)) for part in (train, test)]
        assert [len(part) for part in parts] == [24, 9]
        seen.append((spec, *parts))
        augment = Augment(crop=True, flip=True, cutout=3, mixup=0.5, cutmix=1.0, label_smoothing=0.1)
        for images, targets in make_batches(train, 8, train=True, augment=augment):
            assert images.shape == (8, 3, *spec.size) and targets.shape == (8, 3)
    assert seen[0] == seen[1]
    if sizes != "mixed":  # the stored pixels, normalised by their own mean
        stored = np.stack([np.asarray(image) for _, image in splits["train"]]) / 255
        np.testing.assert_allclose(spec.mean, stored.mean((0, 1, 2)), atol=6e-5)
        np.testing.assert_allclose(spec.std, stored.std((0, 1, 2)), atol=6e-5)
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (spec.mean, spec.std))
        expected = torch.cat([images for images, _ in make_batches(test, 9, train=False)]).double()
        for (_, image), got in zip(splits["test"], sorted_like(splits["test"], expected, mean, std), strict=True):
            np.testing.assert_array_equal(np.asarray(image), got)


def sorted_like(pictures, images, mean, std) -> list[np.ndarray]:
    """The stored pixels of normalised images, in the order of `pictures`."""
    pixels = (images.permute(0, 2, 3, 1) * std + mean).mul(255).round().to(torch.uint8).numpy()
    found = {image.tobytes(): image for image in pixels}
    return [found[np.asarray(image).tobytes()] for _, image in pictures]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_test_split_a_part_of_every_class_is_held_out(tmp_path, layout):
    folder = str(write(tmp_path / "own", layout, {"": items(20, "square")}))
    train, test = load_data(folder)
    assert test.split == "0.1 of the training data, held out with seed 0, also used to choose the epoch"
    assert train.labels.bincount().tolist() == [18] * 3 and test.labels.bincount().tolist() == [2] * 3
    both = [{image.numpy().tobytes() for image in part.images} for part in (train, test)]
    assert len(both[0] | both[1]) == 60
    streamed = load_data(folder, streaming=True)
    assert [sorted(images_of(make_batches(part, 7, train=False))) for part in streamed] == [
        sorted(images_of(make_batches(part, 7, train=False))) for part in (train, test)
    ]
    more = load_data(folder, images=ImageSettings(hold_out=0.5))[1]
    assert more.labels.bincount().tolist() == [10] * 3
    other = load_data(folder, seed=1)[1]
    assert {image.numpy().tobytes() for image in other.images} != both[1]


def test_hold_out_leaves_one_of_each_class_on_both_sides(tmp_path):
    pictures = items(2, "square")
    data = load_data(str(write(tmp_path / "own", "folders", {"train": pictures, "test": pictures})))[0]
    for share in (0.01, 0.99):
        train, held = hold_out(data, share)
        assert train.labels.bincount().tolist() == held.labels.bincount().tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="hold_out is a share and must lie between 0 and 1, got 1"):
        hold_out(data, 1)
    with pytest.raises(ValueError, match="class 'ant' has a single image, of which none can be held out"):
        hold_out(data.chosen(np.array([0, 1, 2, 5])), 0.1)


@pytest.mark.parametrize("labels", ["strings", "floats"])
@pytest.mark.parametrize("layout", ["parquet", "saved"])
def test_labels_of_any_kind(tmp_path, layout, labels):
    splits = {"train": items(4, "square"), "test": items(2, "square")}
    train, test = load_data(str(write(tmp_path / "own", layout, splits, labels)))
    assert train.class_names == (list(CLASSES) if labels == "strings" else ["0", "1", "2"])
    for part, pictures in ((train, splits["train"]), (test, splits["test"])):
        assert part.labels.tolist() == [CLASSES.index(name) for name, _ in pictures]


def test_classes_of_shards_and_splits_in_another_order_are_mapped_by_name(tmp_path):
    splits = {"train": items(4, "square"), "test": items(2, "square")}
    folder = write(tmp_path / "own", "parquet", splits)
    other = list(CLASSES[::-1])
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=other)})
    for name, pictures in (("train-00001-of-00002", splits["train"][6:]), ("test", splits["test"])):
        rows = {"image": [image for _, image in pictures], "label": [other.index(name) for name, _ in pictures]}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    rows_of(splits["train"][:6]).to_parquet(folder / "train-00000-of-00002.parquet")
    (folder / "train.parquet").unlink()
    for streaming in (False, True):
        train, test = load_data(str(folder), streaming=streaming)
        for part, pictures in ((train, splits["train"]), (test, splits["test"])):
            spec = part.spec
            mean, std = (torch.tensor(values, dtype=torch.float64) for values in (spec.mean, spec.std))
            (images, labels), *_ = make_batches(part, 99, train=False)
            got = sorted_like(pictures, images.double(), mean, std)  # raises where a picture is missing
            assert len(got) == len(pictures)
            stored = (images.double().permute(0, 2, 3, 1) * std + mean).mul(255).round().to(torch.uint8).numpy()
            of_image = {image.tobytes(): int(label) for image, label in zip(stored, labels, strict=True)}
            assert [CLASSES[of_image[np.asarray(image).tobytes()]] for _, image in pictures] == [n for n, _ in pictures]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cow"])})
    rows = {"image": [image for _, image in splits["test"]], "label": [0] * 6}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train-00001-of-00002.parquet")
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet has other classes than .*00000"):
        load_data(str(folder))


def test_a_test_split_without_labels_is_passed_over_aloud(tmp_path):
    splits = {"train": items(4, "square"), "validation": items(2, "square")}
    folder = write(tmp_path / "own", "parquet", splits)
    rows = rows_of(items(3, "square")).map(lambda row: {"label": -1})
    rows.to_parquet(folder / "test.parquet")
    with pytest.warns(UserWarning, match="test of .* has no labels: testing on validation; --test-split decides"):
        _, test = load_data(str(folder))
    assert (len(test), test.split) == (6, "validation")
    with pytest.raises(ValueError, match="test of .* has no labels: name another split with --test-split"):
        load_data(str(folder), images=ImageSettings(test_split="test"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_data(str(folder), images=ImageSettings(test_split="validation"))[1]) == 6
    (folder / "validation.parquet").unlink()
    with pytest.warns(UserWarning, match="testing on images that are held out of the training set"):
        assert load_data(str(folder))[1].split.startswith("0.1 of the training data")


def test_splits_can_be_named(tmp_path):
    splits = {"small": items(4, "square"), "exam": items(2, "square")}
    for layout in LAYOUTS:
        folder = str(write(tmp_path / layout, layout, splits))
        train, test = load_data(folder, images=ImageSettings(train_split="small", test_split="exam"))
        assert (len(train), len(test), test.split) == (12, 6, "exam")
        with pytest.raises((ValueError, FileNotFoundError), match="no none split in"):
            load_data(folder, images=ImageSettings(train_split="none"))
        with pytest.raises((ValueError, FileNotFoundError), match="no none split in"):
            load_data(folder, images=ImageSettings(train_split="small", test_split="none"))


def test_sizes_that_differ_need_one_to_become(tmp_path):
    folder = str(write(tmp_path / "own", "folders", {"": items(4, "mixed")}))
    with pytest.raises(ValueError, match=r"height x width 16x16 \(6 images\), 20x24 \(6 images\): pass"):
        load_data(folder)
    train, _ = load_data(folder, images=ImageSettings(size=8))
    assert train.spec.image_size == 8 and train.spec.resized
    square = str(write(tmp_path / "square", "folders", {"": items(4, "square")}))
    assert not load_data(square, images=ImageSettings(size=16))[0].spec.resized
    with pytest.raises(ValueError, match="the size of images must be at least 1, got 0x3"):
        ImageSettings(size=(0, 3))


@pytest.mark.parametrize("streaming", [False, True])
def test_grey_images_have_one_channel(tmp_path, streaming):
    pictures = items(4, "square", grey=True)
    folder = write(tmp_path / "own", "folders", {"train": pictures, "test": pictures})
    for sixteen in (folder / "train" / "ant").glob("*"):
        Image.fromarray(np.asarray(Image.open(sixteen)).astype(np.uint16) * 257).save(sixteen)
    train, test = load_data(str(folder), streaming=streaming)
    assert (train.spec.channels, len(train.spec.mean)) == (1, 1)
    seen = [images_of(make_batches(part, 5, train=False)) for part in (train, test)]
    assert seen[0] == seen[1] and len(seen[0]) == 12  # 16 bits are scaled to 8
    Image.new("RGB", (16, 16), (9, 0, 0)).save(folder / "train" / "bee" / "x.png")
    assert load_data(str(folder), streaming=streaming)[0].spec.channels == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_every_kind_turned_and_hidden(tmp_path, streaming):
    pictures = items(4, "wide")
    folder = write(tmp_path / "own", "folders", {"train": pictures, "test": pictures})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for at, (kind, options) in enumerate((("TIFF", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PNG", {}))):
        for label, name in enumerate(CLASSES):
            number = at * 3 + label
            stored = pictures[number][1]
            file = folder / "train" / name / f"{number:04}.png"
            file.unlink()
            if kind == "PNG":
                stored, options = stored.transpose(Image.Transpose.ROTATE_90), {"exif": exif}
            stored.save(file.with_suffix(f".{kind.lower()}" if at % 2 else f".{kind}"), kind, **options)
    for hidden in (".ipynb_checkpoints/ant", "__MACOSX/ant", "train/__MACOSX", "train/.thumbs"):
        (folder / hidden).mkdir(parents=True)
        (folder / hidden / "1.png").write_bytes(b"damaged")
    (folder / "train" / "ant" / "._0000.png").write_bytes(b"damaged")
    (folder / "train" / ".DS_Store").write_bytes(b"damaged")
    train, test = load_data(str(folder), streaming=streaming)
    assert train.class_names == list(CLASSES)
    assert images_of(make_batches(train, 5, train=False)) == images_of(make_batches(test, 5, train=False))


def test_faults_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'cifra10': choose one of digits, .* or OWNER"):
        load_data("cifra10")
    folder = write(tmp_path / "own", "folders", {"": items(4, "square")})
    file = folder / "ant" / "0000.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"cannot decode image \d+ of train of .*ant.0000.png\) \(.*\): replace"):
        load_data(str(folder))
    buffer = io.BytesIO()
    picture(0, 0, (9, 9)).save(buffer, "PNG")
    file.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="height x width 16x16 .11 images., 9x9 .1 images.: pass --image-size"):
        load_data(str(folder))
    file.write_bytes(whole)
    for name in CLASSES[1:]:
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match="has only the class 'ant': give the folder in which"):
        load_data(str(folder))
    (tmp_path / "empty" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in train of .*empty"):
        load_data(str(tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match="no train split in"):
        load_data(str(write(tmp_path / "exam", "folders", {"test": items(2, "square")})))


def test_what_looks_wrong_is_said_aloud(tmp_path):
    """Names that differ in case or spaces, and those that a file stores and no image has."""
    folder = write(tmp_path / "own", "folders", {"": items(4, "square")})
    (folder / "cat").rename(folder / "Bee")
    with pytest.warns(UserWarning, match="own has the classes 'Bee', 'bee', which differ in case or spaces: are they"):
        assert load_data(str(folder))[0].class_names == ["Bee", "ant", "bee"]
    parquet = write(tmp_path / "rows", "parquet", {"": [item for item in items(4, "square") if item[0] != "bee"]})
    with pytest.warns(UserWarning, match="rows has the classes 'bee', of which there is no example"):
        load_data(str(parquet))
