"""DVS128-Gesture: recordings that tables cut into gestures, and lists of the recordings to train and to test on.

user01_fluorescent.aedat           AEDAT 3.1
user01_fluorescent_labels.csv      class, startTime_usec, endTime_usec; classes count from 1
trials_to_train.txt                names of recordings, one a line; trials_to_test.txt
"""

import csv
from pathlib import Path

import numpy as np

from empf.data.event_frames import Clip
from empf.data.folders import files_below

GESTURES = (
    "hand_clapping", "right_hand_wave", "left_hand_wave", "right_arm_clockwise", "right_arm_counter_clockwise",
    "left_arm_clockwise", "left_arm_counter_clockwise", "arm_roll", "air_drums", "air_guitar", "other_gestures",
)  # fmt: skip
LABELS = "_labels.csv"


def gesture_files(folder: Path) -> tuple[list[Clip], np.ndarray, np.ndarray] | None:
    """The gestures in a folder, their labels [N] and which are for testing [N]; None where it is another data set.

    Raises ValueError or FileNotFoundError that names what is missing or damaged.
    """
    tables = [folder / name for name in files_below(folder, (".csv",)) if name.endswith(LABELS)]
    if not tables:
        return None
    clips, labels, is_test = [], [], []
    of_split = {name: _listed(folder, f"trials_to_{name}.txt") for name in ("train", "test")}
    for table in tables:
        recording = table.with_name(table.name.removesuffix(LABELS) + ".aedat")
        splits = [name for name, listed in of_split.items() if recording.name in listed]
        if not splits:
            continue
        if not recording.is_file():
            raise FileNotFoundError(f"no recording {recording}, which {table.name} cuts: copy it")
        for label, start, stop in _rows(table):
            clips.append(Clip(recording, start, stop))
            labels.append(label - 1)
            is_test.append(splits[0] == "test")
    turns = [labels[:at].count(label) for at, label in enumerate(labels)]
    turn = np.argsort(turns, kind="stable")  # all classes in turn
    return [clips[at] for at in turn], np.array(labels, np.int64)[turn], np.array(is_test, bool)[turn]


def _listed(folder: Path, name: str) -> set[str]:
    lists = [folder / found for found in files_below(folder, (".txt",)) if Path(found).name == name]
    if not lists:
        raise FileNotFoundError(f"no {name} in {folder}: copy it from DVS128-Gesture")
    return {line.strip() for line in lists[0].read_text().splitlines()}


def _rows(table: Path) -> list[tuple[int, int, int]]:
    try:
        rows = [tuple(map(int, row[:3])) for row in list(csv.reader(table.open()))[1:] if row]
    except ValueError as error:
        raise ValueError(f"cannot read {table} ({error}): copy it again") from error
    if wrong := [row for row in rows if len(row) < 3 or not 1 <= row[0] <= len(GESTURES)]:
        raise ValueError(f"{table} has the row {wrong[0]}: it must hold class 1..{len(GESTURES)}, start and end")
    return rows
