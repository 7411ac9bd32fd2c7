"""DVS128-Gesture: its tables and lists. How it is cut is tested in test_recordings.py."""

import pytest
from test_recordings import gestures

from empf.data.gesture import gesture_files


def test_another_data_set_has_no_tables(tmp_path):
    assert gesture_files(tmp_path) is None


def test_all_gestures_in_turn_with_their_times(tmp_path):
    clips, labels, is_test = gesture_files(gestures(tmp_path / "set", users=3))
    assert labels.tolist() == [0, 1, 10] * 3 and is_test.tolist() == [False] * 6 + [True] * 3
    assert [(clip.path.name, clip.start, clip.stop) for clip in clips[:3]] == [
        ("user0_led.aedat", 1000 * c, 1000 * c + 500) for c in (1, 2, 11)
    ]


@pytest.mark.parametrize(
    ("row", "problem"), [("12,1,2", "has the row .12, 1, 2.: it must hold class 1..11"), ("a,1,2", "cannot read .*csv")]
)
def test_damaged_tables_are_named(tmp_path, row, problem):
    table = gestures(tmp_path / "set") / "DvsGesture" / "user0_led_labels.csv"
    table.write_text(f"class,startTime_usec,endTime_usec\n{row}\n")
    with pytest.raises(ValueError, match=problem):
        gesture_files(tmp_path / "set")
