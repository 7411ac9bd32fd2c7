"""Loading: every layout, and one clear sentence per fault."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from make_data import disk_folder, image_folder, parquet_folder, pictures, to_dataset
from make_events import recordings
from PIL import Image

from empf.data import load as data
from empf.data.event_frames import EventSettings
from empf.data.load import load_data, load_test
from empf.data.sets import DATASETS, ImageSettings

datasets.disable_progress_bars()


def pixels(images: list[Image.Image]) -> torch.Tensor:
    """PIL images as uint8 [N, C, H, W]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["cifar10", "digits"])
@pytest.mark.parametrize("write", [parquet_folder, image_folder, disk_folder])
def test_every_layout_gives_the_stored_pixels(tmp_path, write, name):
    folder = write(tmp_path / "set", name, train=23, test=11)
    before = sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*"))
    for seed, split in enumerate(load_data(name, folder)):
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
    splits = load_data("cifar10", tmp_path)
    for seed, split in enumerate(splits):
        assert torch.equal(split.images, pixels(pictures(12, "cifar10", seed=seed)[0]))
        assert split.class_names == [str(i) for i in range(10)]


def test_grey_and_palette_images_become_rgb(tmp_path):
    folder = image_folder(tmp_path, "cifar10", train=20, test=10)
    grey = np.random.default_rng(3).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(grey).save(folder / "train/class000/00000.png")
    Image.new("RGB", (32, 32), (10, 20, 30)).quantize().save(folder / "train/class001/00001.png")
    train, _ = load_data("cifar10", folder)
    assert torch.equal(train.images[0], torch.from_numpy(grey).expand(3, 32, 32))
    assert train.images[1].unique(dim=1).squeeze().unique(dim=1).flatten().tolist() == [10, 20, 30]


@pytest.mark.parametrize("write", [parquet_folder, image_folder, disk_folder])
def test_limit_takes_the_first_images_of_each_split(tmp_path, write):
    folder = write(tmp_path / "set", "cifar10", train=23, test=11)
    for limit in (5, 15, 100):  # 15 reaches into the second file of the parquet folder
        for got, whole in zip(load_data("cifar10", folder, limit=limit), load_data("cifar10", folder), strict=True):
            assert torch.equal(got.images, whole.images[:limit])
            assert torch.equal(got.labels, whole.labels[:limit])


@pytest.mark.parametrize("write", ["parquet", "disk"])
def test_limit_takes_all_classes_where_they_follow_one_another(tmp_path, write):
    images, _ = pictures(30, "cifar10")
    labels = [(9 - i // 3) for i in range(30)]  # 9 9 9 8 8 8 ... 0 0 0
    rows = datasets.DatasetDict(train=to_dataset(images, labels, "cifar10"), test=to_dataset(images, labels, "cifar10"))
    if write == "disk":
        rows.save_to_disk(tmp_path)
    else:
        rows["train"].to_parquet(tmp_path / "train.parquet", batch_size=4)
        for shard in range(2):  # a class lies across the border of two files
            part = rows["test"].shard(2, shard, contiguous=True)
            part.to_parquet(tmp_path / f"test-{shard:05}-of-00002.parquet")
    for limit, expected in ((4, [0, 3, 6, 9]), (14, [*range(0, 30, 3), 1, 4, 7, 10]), (99, None)):
        order = expected or [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]
        for part in load_data("cifar10", tmp_path, limit=limit):
            assert part.labels.tolist() == [labels[i] for i in order]
            assert torch.equal(part.images, pixels([images[i] for i in order]))


def test_limit_decodes_no_more_than_it_takes(tmp_path):
    folder = image_folder(tmp_path, "cifar10", train=12, test=10)
    (folder / "train/class005/00005.png").write_bytes(b"not an image")
    assert len(load_data("cifar10", folder, limit=5)[0]) == 5
    with pytest.raises(ValueError, match="image 5 of train"):
        load_data("cifar10", folder, limit=6)


def test_digits_are_split_evenly_and_always_alike():
    from sklearn.datasets import load_digits

    train, test = load_data("digits")
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

    again, _ = load_data("digits", limit=100)
    assert torch.equal(again.images, train.images[:100])
    other, _ = load_data("digits", seed=1)
    assert not torch.equal(other.images, train.images)


def test_the_hub_is_asked_for_the_right_dataset(monkeypatch):
    asked = []

    def load_dataset(hub_id):
        asked.append(hub_id)
        rows = [
            to_dataset(*pictures(12, "cifar100", seed=seed), "cifar100", columns=("img", "fine_label"))
            for seed in (0, 1)
        ]
        return datasets.DatasetDict(train=rows[0], valid=rows[1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, test = load_data("cifar100", limit=7)
    assert asked == ["uoft-cs/cifar100"]
    assert torch.equal(train.images, pixels(pictures(7, "cifar100")[0]))
    assert len(test) == 7 and len(test.class_names) == 100


@pytest.mark.parametrize("error", [ConnectionError("no\nroute"), datasets.exceptions.DatasetNotFoundError("gone")])
def test_hub_out_of_reach(monkeypatch, error):
    def load_dataset(hub_id):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"uoft-cs/cifar10 .*(no route|gone).* --data FOLDER") as caught:
        load_data("cifar10")
    assert "\n" not in str(caught.value)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'empf\[demo\]'"):
        load_data("digits")


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        (
            "mnist",
            {},
            r"unknown dataset 'mnist': choose one of digits, cifar10, cifar100, imagenet200, imagenet1k, dvs",
        ),
        ("photos/of/mine", {}, "no folder photos/of/mine: check the path given with --dataset"),
        ("/photos", {}, "no folder /photos: check the path given with --dataset"),
        (
            "dvs-cifar10",
            {},
            "dvs-cifar10 is not on the Hugging Face Hub: pass the folder of its recordings with --data",
        ),
        ("digits", {"streaming": True}, "the digits lie in memory as they are: leave --streaming out"),
        (
            "digits",
            {"images": ImageSettings(9, test_split="x", config="y")},
            "the digits lie in memory as they are: leave --test-split and --config and --image-size out",
        ),
        (
            "digits",
            {"events": EventSettings(by="time")},
            "frames_by is for events, not for the images of digits: leave",
        ),
        ("digits", {"limit": -1}, "limit must be at least 1 image, got -1"),
        ("digits", {"limit": 0}, "limit must be at least 1 image, got 0"),
    ],
)
def test_wrong_arguments(name, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_data(name, **arguments)


LOOKED_UP = ("image_column", "label_column", "train_split", "test_split", "config")


@pytest.mark.parametrize("name", LOOKED_UP)
def test_what_nothing_would_heed_is_refused(tmp_path, name):
    """In training, and where other data are tested: digits, recordings, and columns of class folders."""
    flag, spec, given = f"leave --{name.replace('_', '-')} out", DATASETS["digits"], {name: "x"}
    recordings(tmp_path / "events", classes=2, each=1)
    with pytest.raises(ValueError, match=f"events holds recordings by class: {flag}"):
        load_data(str(tmp_path / "events"), images=ImageSettings(**given))
    for place, why in (
        (None, "the digits lie in memory as they are"),
        (tmp_path / "events", "holds recordings by class"),
    ):
        with pytest.raises(ValueError, match=f"{why}: {flag}"):
            load_test("digits" if place is None else str(place), spec=spec, columns=given)
    load_test("digits", spec=spec, images=ImageSettings(**given))  # of the training, where they meant something
    if "column" in name:
        folder = image_folder(tmp_path / "images", "digits", train=20, test=10)
        for call in (
            lambda: load_data("digits", folder, images=ImageSettings(**given)),
            lambda: load_test("digits", folder, spec=spec, columns=given),
        ):
            with pytest.raises(ValueError, match=f"images has a folder for each class: {flag}"):
                call()
        assert len(load_test("digits", folder, spec=spec, images=ImageSettings(**given))) == 10


def test_missing_folder_and_missing_split(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere.*--data"):
        load_data("cifar10", tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("nothing to see")
    for given in (lambda file: load_data("cifar10", file), lambda file: load_data(str(file))):
        with pytest.raises(FileNotFoundError, match="no folder .*notes.txt: check the path given with --data"):
            given(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"no train split in .*: expected train-\*\.parquet"):
        load_data("cifar10", tmp_path)
    image_folder(tmp_path, "cifar10", train=10, test=0)
    with pytest.raises(FileNotFoundError, match="no test split in"):
        load_data("cifar10", tmp_path)
    datasets.DatasetDict(train=to_dataset(*pictures(10, "cifar10"), "cifar10")).save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match="no test split in .*disk, it has train: name one"):
        load_data("cifar10", tmp_path / "disk")
    (tmp_path / "empty/train/class000").mkdir(parents=True)
    with pytest.raises(ValueError, match="no images in train of .*empty"):
        load_data("cifar10", tmp_path / "empty")


def test_missing_shard(tmp_path):
    folder = parquet_folder(tmp_path, "cifar10")
    (folder / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"found 1 of the 2 files of .*train-\*\.parquet: copy the missing ones"):
        load_data("cifar10", folder)


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
        load_data("cifar10", folder)


def test_column_that_holds_no_images(tmp_path):
    pq.write_table(pa.table({"img": [1, 2], "label": [0, 1]}), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="column img holds int64: store the images as datasets.Image"):
        load_data("cifar10", tmp_path)


def test_image_of_the_wrong_size(tmp_path):
    images, labels = pictures(10, "cifar10")
    images[7] = images[7].resize((28, 30))
    message = "image 7 of train of .* is 28x30 pixels, but cifar10 has 32x32"
    with pytest.raises(ValueError, match=message):
        load_data("cifar10", faulty(tmp_path, images, labels))


@pytest.mark.parametrize("mode", ["RGB", "I;16"])
def test_wrong_pixel_format(tmp_path, mode):
    folder = image_folder(tmp_path, "digits", train=20, test=10)
    Image.new(mode, (8, 8)).save(folder / "train/class003/00003.png")
    message = rf"image 3 of train of .*class003.00003\.png\) has the pixel format {mode}, but digits needs 8-bit grey"
    with pytest.raises(ValueError, match=message):
        load_data("digits", folder)


@pytest.mark.parametrize("label", [-1, 10, None])
def test_label_out_of_range(tmp_path, label):
    images, labels = pictures(10, "cifar10")
    labels[4] = label
    with pytest.raises(ValueError, match=rf"image 4 of train of .* has the label {label}, .* labels 0\.\.9"):
        load_data("cifar10", faulty(tmp_path, images, labels, class_label=False))


def test_another_number_of_classes(tmp_path):
    (image_folder(tmp_path, "cifar10", train=20, test=10) / "train/class009/00009.png").unlink()
    (tmp_path / "train/class009/00019.png").unlink()
    (tmp_path / "train/class009").rmdir()
    with pytest.raises(ValueError, match="train of .* has 9 classes, but cifar10 has 10: check --dataset"):
        load_data("cifar10", tmp_path)


def test_classes_named_differently_in_train_and_test(tmp_path):
    (image_folder(tmp_path, "cifar10", train=20, test=10) / "test/class009").rename(tmp_path / "test/classical")
    with pytest.raises(ValueError, match="train and test of .* name their classes differently"):
        load_data("cifar10", tmp_path)


def test_corrupt_image_is_named(tmp_path):
    folder = image_folder(tmp_path / "files", "cifar10", train=20, test=10)
    file = folder / "test/class002/00002.png"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"cannot decode image 2 of test of .*class002.00002\.png\) \(.*replace"):
        load_data("cifar10", folder)

    images, labels = pictures(10, "cifar10")
    images[8] = {"bytes": b"\x89PNG\r\n\x1a\n and no more", "path": "cat.png"}
    with pytest.raises(ValueError, match=r"cannot decode image 8 of train of .* \(cat\.png\)"):
        load_data("cifar10", faulty(tmp_path / "rows", images, labels))
    Image.new("RGB", (32, 32)).save(tmp_path / "bomb.bmp")
    header = bytearray((tmp_path / "bomb.bmp").read_bytes())
    header[18:26] = (20000).to_bytes(4, "little") * 2  # announces 20000 x 20000 pixels
    images[8] = {"bytes": bytes(header), "path": None}
    with pytest.raises(ValueError, match=r"cannot decode image 8 of train of .* \("):
        load_data("cifar10", faulty(tmp_path / "rows", images, labels))
    images[8] = None
    with pytest.raises(ValueError, match=r"cannot decode image 8 of .* \(the image is empty\): replace or remove it"):
        load_data("cifar10", faulty(tmp_path / "rows", images, labels))


def test_corrupt_file_is_named(tmp_path):
    folder = parquet_folder(tmp_path / "parquet", "cifar10")
    shard = folder / "train-00001-of-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"cannot read .*train-00001-of-00002\.parquet \(.*copy the file again"):
        load_data("cifar10", folder)

    not_text = pa.array([b"\xff"]).view(pa.string())
    image = pa.StructArray.from_arrays([pa.array([b"pixels"]), not_text], ["bytes", "path"])
    table = pa.table({"img": image, "label": [0]})
    first = pq.read_schema(folder / "train-00000-of-00002.parquet")
    pq.write_table(table.replace_schema_metadata(first.metadata), shard)
    with pytest.raises(ValueError, match=r"cannot read .*train-00001-of-00002\.parquet \(.*copy the file again"):
        load_data("cifar10", folder)

    folder = disk_folder(tmp_path / "disk", "cifar10")
    (file,) = (folder / "test").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot read .*disk \(.*write it again with save_to_disk"):
        load_data("cifar10", folder)


def test_events_are_loaded_with_their_settings(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data, "load_events", lambda *given, **options: asked.append((given, options)))
    settings = EventSettings(5, split="random", by="time", orientation="mirrored", resize="8bit")
    load_data("dvs-cifar10", tmp_path, events=settings, limit=3, seed=2)
    spec = DATASETS["dvs-cifar10"]
    known = dict(device="cpu", limit=3, seed=2, spec=spec)
    assert [(given, {n: options[n] for n in known}) for given, options in asked] == [((tmp_path, settings), known)]


def test_a_known_set_is_tested_with_the_labels_of_its_training(tmp_path):
    """Whatever order the test split names the classes in, and without the training images."""
    folder = parquet_folder(tmp_path, "cifar10", test=10)
    train, test = load_data("cifar10", folder)
    names = list(reversed(train.class_names))
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    rows = {"img": pictures(10, "cifar10", seed=1)[0], "label": list(range(9, -1, -1))}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "test-00000-of-00001.parquet")
    for file in folder.glob("train*"):
        file.unlink()
    again = load_test("cifar10", folder, spec=train.spec, classes=train.class_names)
    assert torch.equal(again.images, test.images) and torch.equal(again.labels, test.labels)
    assert again.class_names == train.class_names
