"""Where the images of a split lie: class folders, tables of file names, what save_to_disk wrote."""

import datasets
import pytest
from make_data import image_folder, pictures, to_dataset

from empf.data.sources import Columns, ImageFiles, SavedRows


def rows_of(source) -> list:
    return [row for block in source.blocks() for row in source.read(*block[:3], 0, block[3])]


def test_class_folders_are_read_one_of_each_class_in_turn(tmp_path):
    folder = image_folder(tmp_path, "cifar10", train=23) / "train"
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "1.png").touch()
    (folder / "class003" / "._x.png").touch()
    (folder / "__MACOSX" / "class003").mkdir(parents=True)
    source = ImageFiles.of_folder(folder)
    assert source.names == [f"class{i:03}" for i in range(10)]
    assert [row.label for row in rows_of(source)] == source.labels() == [i % 10 for i in range(23)]
    assert {row.where for row in rows_of(source)} == {str(f) for f in folder.rglob("0*.png")}


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("class003/IMG_1.HEIC", "1 pictures of .* not read, such as class003/IMG_1.HEIC: convert"),
        ("notes/read me.txt", "notes holds no image, so it is no class: fill it or take it away"),
    ],
)
def test_what_would_be_left_out_of_class_folders_is_refused(tmp_path, file, sentence):
    folder = image_folder(tmp_path, "cifar10", train=10) / "train"
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).touch()
    with pytest.raises(ValueError, match=sentence):
        ImageFiles.of_folder(folder)


@pytest.mark.parametrize(
    ("header", "values", "labels"),
    [
        ("file_name,label", ["cat", "dog"], ["cat", "dog"]),
        ("label,path,more", ["7,a/0.png,1", "9,a/ü 1.png,2"], [7, 9]),
        ("image,target", ["1.0", "2.0"], [1.0, 2.0]),
        ("filename,cls", ["true", "false"], [True, False]),
    ],
)
def test_a_table_names_files_and_their_labels(tmp_path, header, values, labels):
    names = ["a/0.png", "a/ü 1.png"]
    rows = values if "more" in header else [f"{name},{value}" for name, value in zip(names, values, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    source = ImageFiles.of_csv(tmp_path / "t.csv", Columns())
    assert source.labels() == labels and source.names is None
    assert [(row.where, row.label) for row in rows_of(source)] == [
        (str(tmp_path / name), label) for name, label in zip(names, labels, strict=True)
    ]


def test_a_table_in_another_encoding_or_with_files_twice(tmp_path):
    (tmp_path / "t.csv").write_bytes("file,label\n1.png,\xe4\n".encode("latin-1"))
    with pytest.raises(ValueError, match="t.csv is not UTF-8: save it as UTF-8"):
        ImageFiles.of_csv(tmp_path / "t.csv", Columns())
    (tmp_path / "t.csv").write_text("file,label\n1.png,a\n2.png,b\n1.png,b\n")
    with pytest.warns(UserWarning, match="t.csv names files again in 1 rows, which may be trained on and tested"):
        ImageFiles.of_csv(tmp_path / "t.csv", Columns())


def test_columns_can_be_named(tmp_path):
    (tmp_path / "t.csv").write_text("photo,label,kind\n1.png,0,x\n")
    with pytest.raises(ValueError, match="t.csv has the columns photo, label, kind: .* with --image-col"):
        ImageFiles.of_csv(tmp_path / "t.csv", Columns())
    assert ImageFiles.of_csv(tmp_path / "t.csv", Columns("photo", "kind")).labels() == ["x"]
    with pytest.raises(ValueError, match="needs one of photo for the image and one of class for the label"):
        ImageFiles.of_csv(tmp_path / "t.csv", Columns("photo", "class"))
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(ValueError, match="cannot read .*t.csv .*: write it as comma-separated values"):
        ImageFiles.of_csv(tmp_path / "t.csv", Columns())


def test_rows_of_a_saved_data_set():
    images, labels = pictures(150, "cifar10")
    rows = to_dataset(images, labels, "cifar10")
    source = SavedRows.of(rows, Columns(), "train of x")
    assert source.names == [f"class{i:03}" for i in range(10)] and source.labels() == labels
    found = rows_of(source)
    assert [row.label for row in found] == labels and found[149].where == "image 149 of train of x"
    (row,) = source.read(*source.blocks()[1, :3], 3, 4)
    assert row == found[67]
    with pytest.raises(ValueError, match="column label holds int64: store the images as datasets.Image"):
        SavedRows.of(datasets.Dataset.from_dict({"a": [1], "label": [2]}), Columns("label", "a"), "x")
