"""Which splits a folder or a data set of the Hugging Face Hub has, and where their images lie.

FOLDER/train-*.parquet  train.parquet  train/*.parquet  data/train-*.parquet     or *.parquet, not divided
FOLDER/train.csv  train/metadata.csv                                            or *.csv
FOLDER/train/<class>/*.png                                                      or <class>/*.png
what save_to_disk wrote, of a DatasetDict or of a Dataset
"""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import HfFileSystem, hf_hub_download

from empf.data.folders import is_data, subfolder, subfolders
from empf.data.rows import Source, one_line
from empf.data.sets import TEST_SPLITS, TRAIN_SPLITS
from empf.data.sources import Columns, ImageFiles, ParquetFiles, SavedRows

if TYPE_CHECKING:  # elsewhere it is imported where it is used: that takes a second
    import datasets

Open = Callable[[], Source]


@dataclass(frozen=True)
class Place:
    """Where a data set lies. `find(split)` opens a split, None if there is none of this name; `whole` opens what is not
    divided, None if it is. `splits`: their names, where they are known beforehand."""

    origin: str
    find: Callable[[str], Open | None]
    whole: Callable[[], Source | None] = lambda: None
    splits: tuple[str, ...] | None = None

    def missing(self, split: str) -> Exception:
        if self.splits is not None:
            return ValueError(
                f"no {split} split in {self.origin}, it has {', '.join(self.splits)}: name one with --train-split or "
                "--test-split"
            )
        return FileNotFoundError(
            f"no {split} split in {self.origin}: expected {split}-*.parquet, {split}.csv, {split}/<class>/*.png or the "
            "output of save_to_disk"
        )


def in_folder(path: Path, columns: Columns, config: str | None = None) -> Place:
    """What a local folder holds."""
    if config is not None:
        if not (path / config).is_dir():
            found = ", ".join(child.name for child in subfolders(path)) or "none"
            raise FileNotFoundError(f"no configuration {config} in {path}: it has the folders {found}")
        path = path / config
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        import datasets

        try:
            saved = datasets.load_from_disk(path)
        except Exception as error:  # the library meets damage in many ways
            raise ValueError(f"cannot read {path} ({one_line(error)}): write it again with save_to_disk") from error
        return of_datasets(saved, columns, str(path))
    return Place(str(path), partial(_split, path, columns), partial(_whole, path, columns))


def of_datasets(data: "datasets.DatasetDict | datasets.Dataset", columns: Columns, origin: str) -> Place:
    """What the library `datasets` has loaded."""
    if not isinstance(data, dict):
        return Place(origin, lambda split: None, partial(SavedRows.of, data, columns, origin))

    def find(split: str) -> Open | None:
        return partial(SavedRows.of, data[split], columns, f"{split} of {origin}") if split in data else None

    return Place(origin, find, splits=tuple(data))


def on_hub(hub_id: str, columns: Columns, config: str | None = None, *, streaming: bool, by_file: bool) -> Place:
    """A data set of the Hub; `by_file`: its parquet files are read themselves, over the network if `streaming`."""
    import datasets

    named = () if config is None else (config,)
    try:
        if not by_file:
            return of_datasets(datasets.load_dataset(hub_id, *named), columns, hub_id)
        found = datasets.load_dataset_builder(hub_id, *named).config.data_files
    except ValueError as error:
        if configs := re.search(r"available configs: \[(.*?)\]", str(error)):
            listed = configs[1].replace("'", "")
            raise ValueError(f"{hub_id} has several configurations: name one of {listed} with --config") from error
        raise ValueError(f"cannot load {hub_id} ({one_line(error)}): check --dataset and --config") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise _unreachable(hub_id, error) from error
    files = {split: [str(file) for file in of_split] for split, of_split in found.items()}

    def open_files(split: str) -> ParquetFiles:
        if other := [file for file in files[split] if not file.endswith(".parquet")]:
            raise ValueError(f"{hub_id} has files such as {other[0]}, which are not parquet: leave --streaming out")
        try:
            with ThreadPoolExecutor(8) as pool:
                paths = files[split] if streaming else list(pool.map(_fetch, files[split]))
        except OSError as error:
            raise _unreachable(hub_id, error) from error
        return ParquetFiles.of(paths, columns.find)

    def find(split: str) -> Open | None:
        return partial(open_files, split) if split in files else None

    return Place(hub_id, find, splits=tuple(files))


def _unreachable(hub_id: str, error: Exception) -> FileNotFoundError:
    problem = one_line(error)
    if "gated" in problem or "401" in problem or "403" in problem:
        advice = (
            f"accept its terms at https://huggingface.co/datasets/{hub_id}, then log in with `hf auth login` or "
            "set HF_TOKEN to a token with read access"
        )
    else:
        advice = "check the network"
    return FileNotFoundError(
        f"cannot get {hub_id} from the Hugging Face Hub ({problem}): {advice}, or pass a local copy with --data FOLDER"
    )


def _fetch(address: str) -> str:
    """The local copy of a file on the Hub, which is downloaded the first time."""
    at = HfFileSystem().resolve_path(address)
    return hf_hub_download(at.repo_id, at.path_in_repo, repo_type=at.repo_type, revision=at.revision)


def _glob(path: Path, pattern: str) -> list[Path]:
    return [file for file in sorted(path.glob(pattern)) if all(map(is_data, file.relative_to(path).parts))]


def _split(path: Path, columns: Columns, split: str) -> Open | None:
    for pattern in (f"{split}.parquet", f"{split}-*.parquet", f"{split}/*.parquet", f"*/{split}-*.parquet"):
        if shards := _glob(path, pattern):
            return _parquet(path, shards, columns)
    for file in (path / f"{split}.csv", path / split / "metadata.csv"):
        if file.is_file():
            return partial(ImageFiles.of_csv, file, columns)
    if (folder := subfolder(path, (split,))) is not None and subfolders(folder):
        return partial(ImageFiles.of_folder, folder)
    return None


def _whole(path: Path, columns: Columns) -> Source | None:
    """What is not divided into splits, where no name is that of a split."""
    names = {child.name for child in path.iterdir()}
    if any(re.match(rf"({'|'.join(TRAIN_SPLITS + TEST_SPLITS)})\b", name, re.I) for name in names):
        return None
    if shards := _glob(path, "*.parquet") or _glob(path, "*/*.parquet"):
        return _parquet(path, shards, columns)()
    if tables := _glob(path, "*.csv"):
        if len(tables) > 1:
            names = ", ".join(table.name for table in tables)
            raise ValueError(f"{path} has several tables ({names}): keep one, or name them train.csv and test.csv")
        return ImageFiles.of_csv(tables[0], columns)
    return ImageFiles.of_folder(path) if subfolders(path) else None


def _parquet(path: Path, shards: list[Path], columns: Columns) -> Open:
    if len(folders := sorted({shard.parent.name for shard in shards})) > 1:
        raise ValueError(
            f"{path} has several configurations, in the folders {', '.join(folders)}: name one with --config"
        )
    expected = re.search(r"-of-(\d+)", shards[0].name)
    if expected and int(expected[1]) != len(shards):
        raise ValueError(
            f"found {len(shards)} of the {int(expected[1])} files of "
            f"{shards[0].parent / shards[0].name.split('-')[0]}-*.parquet: copy the missing ones"
        )
    return partial(ParquetFiles.of, [str(shard) for shard in shards], columns.find)
