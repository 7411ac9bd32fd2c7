"""What stands as a label in the data, and the class that it means."""

import math

import pytest

from empf.data.classes import Classes, check_classes, is_missing, plain


@pytest.mark.parametrize(
    ("stored", "names", "labels"),
    [
        (["b", "a", "b"], ["a", "b"], [1, 0, 1]),
        ([3, 1, 3], ["1", "3"], [1, 0, 1]),
        ([2.0, 0.0, 2.0], ["0", "2"], [1, 0, 1]),
        ([True, False], ["False", "True"], [1, 0]),
        ([-1, 1, -1], ["-1", "1"], [0, 1, 0]),  # two classes, not images without a label
        ([2, 10, 2], ["2", "10"], [0, 1, 0]),  # in the order of the numbers, not of their names
    ],
)
def test_a_class_for_each_value_that_is_found(stored, names, labels):
    classes = Classes.found(stored, "train of x")
    assert classes.names == names
    assert [classes.label(value) for value in stored] == labels
    assert classes.label("nothing of it") is None and classes.label([1]) is None and classes.label(7) is None


@pytest.mark.parametrize("missing", [None, "", -1, -1.0, math.nan])
def test_images_without_a_label(missing):
    assert is_missing(plain(missing)) and not is_missing(0) and not is_missing(False) and not is_missing("a")
    with pytest.raises(ValueError, match="train of x has images without a label"):
        Classes.found([0, missing, 2], "train of x")


def test_several_labels_for_an_image():
    with pytest.raises(ValueError, match="train of x has several labels for an image: .* with --label-column"):
        Classes.found([[1, 2], [3]], "train of x")


def test_known_classes_are_their_numbers():
    classes = Classes(["cat", "dog"])
    assert [classes.label(value) for value in (0, 1, 1.0, 2, -1, None, "cat", 0.5)] == [0, 1, 1] + [None] * 5
    assert classes.expected() == "the labels 0..1"
    assert Classes.found(range(9), "x").expected() == "the labels 0, 1, 2, 3, 4, ..."


def test_other_orders_of_the_same_names_are_mapped_by_name():
    classes = Classes(["cat", "dog", "eel"])
    assert classes.of(None, "test of x") is classes
    assert classes.of(["cat", "dog", "eel"], "test of x") == classes
    other = classes.of(["eel", "cat"], "test of x")
    assert [other.label(value) for value in (0, 1, 2)] == [2, 0, None] and other.names == classes.names
    with pytest.raises(ValueError, match="train and test of x name their classes differently: 'fox' is not in train"):
        classes.of(["fox", "cat"], "test of x")


def test_what_looks_like_a_mistake_is_said(recwarn):
    check_classes(["cat", "Cats"], [0, 1, None], "train of x")
    check_classes(["cat", "dog"], (), "train of x")  # all classes are known to be there
    assert not recwarn
    check_classes(["dog", " cat", "Cat"], [0, 1, 1], "train of x")
    assert [str(w.message) for w in recwarn] == [
        "train of x has the classes ' cat', 'Cat', which differ in case or spaces: are they one?",
        "train of x has the classes 'Cat', of which there is no example",
    ]
    with pytest.raises(ValueError, match="train of x has only the class 'cat': give the folder in which each class"):
        check_classes(["cat"], (), "train of x")
