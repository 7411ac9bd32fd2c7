"""What a folder of data holds, and what is nobody's data."""

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


def test_the_first_of_several_names_of_a_split_is_taken(tmp_path):
    assert subfolder(tmp_path, TEST_SPLITS) is None
    for name in ("val", "validation"):
        (tmp_path / name).mkdir()
    assert subfolder(tmp_path, TEST_SPLITS) == tmp_path / "validation"
