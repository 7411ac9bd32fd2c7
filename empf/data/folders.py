"""What a folder of data holds: splits, classes and files. Names that are nobody's data are left out everywhere.

.DS_Store  ._cat.png  .ipynb_checkpoints  __MACOSX      what systems and notebooks leave behind
"""

import os
from collections.abc import Collection
from pathlib import Path

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# pictures all the same, which nobody means to leave out
UNREAD_SUFFIXES = {".heic", ".heif", ".avif", ".jxl", ".jp2", ".dng", ".tga", ".ppm", ".pgm", ".pbm"}


def is_data(name: str) -> bool:
    """Whether a file or folder of this name belongs to the data."""
    return not name.startswith(".") and name != "__MACOSX"


def subfolders(folder: Path) -> list[Path]:
    """The folders of data in a folder, by name; ValueError for a link to a folder that it lies in."""
    return sorted(child for child in folder.iterdir() if is_data(child.name) and child.is_dir() and not _loops(child))


def files_below(folder: Path, suffixes: Collection[str]) -> list[str]:
    """Paths, relative to `folder`, of the files in and below it that end in one of `suffixes` in any case; sorted.

    Links are followed. Raises ValueError for a link to a folder that it lies in, OSError for a folder that cannot be
    read.
    """
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if is_data(name) and not _loops(Path(parent, name))]
        inside = os.path.relpath(parent, folder)
        for name in names:
            if is_data(name) and os.path.splitext(name)[1].lower() in suffixes:
                found.append(name if inside == "." else os.path.join(inside, name))
    return sorted(found)


def _loops(folder: Path) -> bool:
    if folder.is_symlink() and any(folder.samefile(above) for above in folder.absolute().parents):
        raise ValueError(f"{folder} is a link to a folder that it lies in: remove it")
    return False


def _raise(error: OSError) -> None:
    raise OSError(f"cannot read {error.filename} ({error.strerror}): check the rights to it") from error


def subfolder(folder: Path, names: Collection[str]) -> Path | None:
    """The first folder of these names, in any case, that exists in a folder."""
    wanted = [name.lower() for name in names]
    with os.scandir(folder) as entries:
        found = sorted(entry.name for entry in entries if entry.name.lower() in wanted and entry.is_dir())
    by_name = {name.lower(): folder / name for name in found}  # of Train and train, train
    return next((by_name[name] for name in wanted if name in by_name), None)
