"""What a folder of data holds, and what is nobody's data."""

import os
from pathlib import Path

import pytest

from empf.data.folders import files_below, is_data, subfolder, subfolders
from empf.data.sets import TEST_SPLITS


@pytest.mark.parametrize("name", [".DS_Store", "._cat.png", ".ipynb_checkpoints", "__MACOSX"])
def test_names_that_begin_with_a_dot_are_nobodys_data(tmp_path, name):
    assert not is_data(name)
    for inside in (name, f"cats/{name}", f"{name}/cats"):
        (tmp_path / inside).mkdir(parents=True)
        (tmp_path / inside / "left.png").touch()
    for inside in ("cats/1.png", "cats/deep/2.PNG", "cats/deep/3.txt", "dogs/._4.png", "dogs/5.png"):
        (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / inside).touch()
    assert [folder.name for folder in subfolders(tmp_path)] == ["cats", "dogs"]
    assert files_below(tmp_path, {".png"}) == ["cats/1.png", str(Path("cats/deep/2.PNG")), "dogs/5.png"]
    assert files_below(tmp_path / "cats", {".png"}) == ["1.png", str(Path("deep/2.PNG"))]


def test_links_are_followed_and_circles_refused(tmp_path):
    for name in ("own/cats/1.png", "elsewhere/2.png", "elsewhere/deep/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    own = tmp_path / "own"
    (own / "cats" / "more").symlink_to(tmp_path / "elsewhere")
    assert files_below(own, {".png"}) == ["cats/1.png", "cats/more/2.png", "cats/more/deep/3.png"]
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(own / "cats")  # a circle of two links
    with pytest.raises(ValueError, match="more/deep/back is a link to a folder that it lies in: remove it"):
        files_below(own, {".png"})
    (own / "self").symlink_to("..")
    with pytest.raises(ValueError, match="own/self is a link to a folder that it lies in: remove it"):
        subfolders(own)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "cats").mkdir()
    scan = os.scandir

    def denied(path):
        if str(path).endswith("cats"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(OSError, match=r"cannot read .*cats \(Permission denied\): check the rights to it"):
        files_below(tmp_path, {".png"})


def test_the_first_of_several_names_of_a_split_is_taken(tmp_path):
    assert subfolder(tmp_path, TEST_SPLITS) is None
    for name in ("val", "validation"):
        (tmp_path / name).mkdir()
    assert subfolder(tmp_path, TEST_SPLITS) == tmp_path / "validation"
    (tmp_path / "Test").mkdir()
    assert subfolder(tmp_path, TEST_SPLITS) == tmp_path / "Test"
    (tmp_path / "test").mkdir()
    assert subfolder(tmp_path, TEST_SPLITS).name == "test"
