"""What a folder of data holds: splits, classes and files. Names that are nobody's data are left out everywhere.

.DS_Store  ._cat.png  .ipynb_checkpoints  __MACOSX      what systems and notebooks leave behind
"""

import os
from collections.abc import Collection
from pathlib import Path

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".dng"}  # pictures all the same, which nobody means to leave out


def is_data(name: str) -> bool:
    """Whether a file or folder of this name belongs to the data."""
    return not name.startswith(".") and name != "__MACOSX"


def subfolders(folder: Path) -> list[Path]:
    """The folders of data in a folder, by name."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and is_data(child.name))


def files_below(folder: Path, suffixes: Collection[str]) -> list[str]:
    """Paths, relative to `folder`, of the files in and below it that end in one of `suffixes` in any case; sorted."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if is_data(name)]
        inside = os.path.relpath(parent, folder)
        for name in names:
            if is_data(name) and os.path.splitext(name)[1].lower() in suffixes:
                found.append(name if inside == "." else os.path.join(inside, name))
    return sorted(found)


def subfolder(folder: Path, names: Collection[str]) -> Path | None:
    """The first folder of these names that exists in a folder."""
    return next((folder / name for name in names if (folder / name).is_dir()), None)
