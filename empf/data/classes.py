"""Labels: what stands in the data, and the number of the class that it means."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


def plain(label: Any) -> Any:
    """Whole numbers that are stored as floating point are numbers; all else is what it is."""
    return int(label) if isinstance(label, float) and label.is_integer() else label


def is_missing(label: Any) -> bool:
    """Whether it says that there is no label: empty, or -1 as on the Hub."""
    return label is None or label == "" or isinstance(label, int) and label == -1 or label != label


@dataclass(frozen=True)
class Classes:
    """`names` by label, and which label a stored value means: `index`, or the value itself where that is None."""

    names: list[str]
    index: dict[Any, int] | None = None

    def label(self, stored: Any) -> int | None:
        """The label that a stored value means; None where it means none."""
        stored = plain(stored)
        if self.index is not None:
            try:
                return self.index.get(stored)
            except TypeError:  # a list or the like
                return None
        return stored if isinstance(stored, int) and 0 <= stored < len(self.names) else None

    def expected(self) -> str:
        """What may stand there, for people."""
        if self.index is None:
            return f"the labels 0..{len(self.names) - 1}"
        shown = ", ".join(map(repr, list(self.index)[:5]))
        return f"the labels {shown}{', ...' if len(self.index) > 5 else ''}"

    def of(self, names: Sequence[str] | None, origin: str) -> "Classes":
        """For data that call their classes `names` and mean the same classes; ValueError where one is not among them.

        None: the data give values without names, which mean what they mean here.
        """
        if names is None or list(names) == self.names:
            return self if names is None else Classes(self.names)
        if strange := [name for name in names if name not in self.names]:
            raise ValueError(
                f"train and {origin} name their classes differently: {strange[0]!r} is not in train; use the same "
                "classes in both"
            )
        return Classes(self.names, {at: self.names.index(name) for at, name in enumerate(names)})

    @classmethod
    def known(
        cls, names: Sequence[str], own: Sequence[str] | None, stored: Callable[[], Iterable[Any]], origin: str
    ) -> "Classes":
        """For data whose classes, called `own`, are among these names, or whose `stored` labels mean these.

        ValueError where the data have another class.
        """
        if own is not None:
            return cls(list(names)).of(own, origin)
        values = cls.found(stored(), origin).index
        meant = {value: names.index(str(value)) for value in values if str(value) in names}
        if not meant and all(isinstance(value, int) and 0 <= value < len(names) for value in values):
            return cls(list(names))
        if strange := [value for value in values if value not in meant]:
            raise ValueError(
                f"{origin} has the label {strange[0]!r}, which is no class that the network was trained on "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): use the classes it was trained on"
            )
        return cls(list(names), meant)

    @classmethod
    def found(cls, stored: Iterable[Any], origin: str) -> "Classes":
        """A class for each value that stands in the data, in order. ValueError where an image has none."""
        try:
            values = {plain(value) for value in stored}
        except TypeError as error:
            raise ValueError(
                f"{origin} has several labels for an image: name a column with one for each with --label-column"
            ) from error
        unlabelled = [value for value in values if is_missing(value)]
        if unlabelled and (values - {-1} != {1}):  # -1 and 1 are two classes
            raise ValueError(f"{origin} has images without a label ({unlabelled[0]!r}): remove them")
        order = sorted(values, key=lambda value: (type(value).__name__, value))
        return cls([str(value) for value in order], {value: label for label, value in enumerate(order)})


def check_classes(names: Sequence[str], labels: Iterable[int | None], origin: str) -> None:
    """Raise ValueError where there is a single class; warn of what looks like a mistake.

    That are names that differ in case or spaces alone, and classes that no training example has: `labels` are those of
    all of them, or nothing where they are known to have all classes.
    """
    if len(names) < 2:
        raise ValueError(
            f"{origin} has only the class {names[0]!r}: give the folder in which each class has a folder, or, of a "
            "table, the column of the labels with --label-column"
        )
    counts, seen = Counter(name.strip().lower() for name in names), set(labels)
    for which, said in (
        ([name for name in names if counts[name.strip().lower()] > 1], "which differ in case or spaces: are they one?"),
        ([name for label, name in enumerate(names) if seen and label not in seen], "of which there is no example"),
    ):
        if which:
            shown = ", ".join(map(repr, which[:4])) + (", ..." if len(which) > 4 else "")
            warnings.warn(f"{origin} has the classes {shown}, {said}", stacklevel=3)
