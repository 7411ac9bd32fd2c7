"""Which splits a folder or a data set of the Hub has."""

import shutil
from types import SimpleNamespace

import datasets
import pytest
from make_data import image_folder, parquet_folder, pictures, stream_folder, to_dataset

from empf.data.find import in_folder, on_hub
from empf.data.sources import Columns, ImageFiles, ParquetFiles, SavedRows

datasets.disable_progress_bars()


def test_what_is_not_divided_is_one_source(tmp_path):
    folders = image_folder(tmp_path / "a", "cifar10", train=20, test=0) / "train"
    place = in_folder(folders, Columns())
    assert place.find("train") is None and isinstance(place.whole(), ImageFiles)
    files = parquet_folder(tmp_path / "b", "cifar10")
    for number, file in enumerate(sorted(files.glob("*.parquet"))):
        file.rename(files / f"part{number}.parquet")
    assert isinstance(in_folder(files, Columns()).whole(), ParquetFiles)
    table = tmp_path / "c"
    table.mkdir()
    (table / "labels.csv").write_text("file,label\n1.png,a\n")
    assert in_folder(table, Columns()).whole().labels() == ["a"]
    (table / "more.csv").write_text("file,label\n1.png,a\n")
    with pytest.raises(ValueError, match=r"several tables \(labels.csv, more.csv\): keep one, or name them train.csv"):
        in_folder(table, Columns()).whole()
    to_dataset(*pictures(10, "cifar10"), "cifar10").save_to_disk(tmp_path / "d")
    saved = in_folder(tmp_path / "d", Columns())
    assert isinstance(saved.whole(), SavedRows) and saved.find("train") is None
    assert in_folder(tmp_path / "a", Columns()).whole() is None  # it is divided


def test_folders_of_splits_in_any_case(tmp_path):
    """They are no classes."""
    image_folder(tmp_path, "cifar10", train=20, test=10)
    for split in ("train", "test"):
        (tmp_path / split).rename(tmp_path / split.title())
    place = in_folder(tmp_path, Columns())
    assert len(place.find("train")().labels()) == 20 and place.whole() is None


def test_a_saved_set_that_cannot_be_read_or_has_other_splits(tmp_path):
    rows = to_dataset(*pictures(10, "cifar10"), "cifar10")
    rows.select([]).save_to_disk(tmp_path / "empty")  # the library trips over it
    with pytest.raises(ValueError, match=r"cannot read .*empty \(.*\): write it again with save_to_disk"):
        in_folder(tmp_path / "empty", Columns())
    datasets.DatasetDict(fit=rows).save_to_disk(tmp_path / "fit")
    problem = str(in_folder(tmp_path / "fit", Columns()).missing("train"))
    assert problem.endswith("fit, it has fit: name one with --train-split or --test-split")


@pytest.mark.parametrize("name", ["train.csv", "train/metadata.csv"])
def test_tables_of_a_split(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("file_name,label\n1.png,3\n")
    source = in_folder(tmp_path, Columns()).find("train")()
    assert source.labels() == [3] and source.folder == str((tmp_path / name).parent)


def test_several_configurations_are_refused_until_one_is_named(tmp_path):
    for config, count in (("large", 40), ("small", 20)):
        stream_folder(tmp_path / config, {"train": [count], "test": [5]})
    place = in_folder(tmp_path, Columns())
    with pytest.raises(ValueError, match="has several configurations, in the folders large, small: name"):
        place.find("train")
    assert len(in_folder(tmp_path, Columns(), "small").find("train")().labels()) == 20
    with pytest.raises(FileNotFoundError, match="no configuration tiny in .*: it has the folders large, small"):
        in_folder(tmp_path, Columns(), "tiny")
    for config in ("large", "small"):  # not divided
        for file in (tmp_path / config).glob("test*"):
            file.unlink()
        (file,) = (tmp_path / config).glob("train*")
        file.rename(tmp_path / config / "all.parquet")
    with pytest.raises(ValueError, match="several configurations"):
        in_folder(tmp_path, Columns()).whole()
    shutil.rmtree(tmp_path / "large")
    assert len(in_folder(tmp_path, Columns()).whole().labels()) == 20


def test_several_configurations_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(*given):
        asked.append(given)
        if len(given) == 1:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nEx")
        return datasets.DatasetDict(train=to_dataset(*pictures(10, "cifar10"), "cifar10"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match="me/set has several configurations: name one of a, b with --config"):
        on_hub("me/set", Columns(), streaming=False, by_file=False)
    place = on_hub("me/set", Columns(), "a", streaming=False, by_file=False)
    assert asked == [("me/set",), ("me/set", "a")] and place.splits == ("train",)
    assert len(place.find("train")().labels()) == 10 and place.find("test") is None


def test_only_parquet_is_streamed_from_the_hub(monkeypatch):
    config = SimpleNamespace(data_files={"train": ["hf://x/a.zip"]})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *given: SimpleNamespace(config=config))
    with pytest.raises(ValueError, match="me/set has files such as hf://x/a.zip, which are not parquet"):
        on_hub("me/set", Columns(), streaming=True, by_file=True).find("train")()
