"""What images of one's own look like: size, channels, mean and standard deviation, found out from some of them."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from empf.data.classes import Classes, check_classes
from empf.data.images import BROKEN, centre_crop, is_grey, open_image, stored_pixels
from empf.data.rows import Source, read_rows
from empf.data.sets import DataSpec, both, named

LOOKED_AT = 2048  # images, evenly spread; all of a smaller set


def own_spec(name: str, source: Source, classes: Classes, size: int | tuple[int, int] | None, origin: str) -> DataSpec:
    """The properties of a data set, from its training images.

    `size`: what the images become; None: they all have the same. Raises ValueError where they do not, or where there
    is one class only. Images that cannot be read do not count.
    """
    seen: Counter[tuple[int, int]] = Counter()  # height, width
    grey = True
    for image in _some(source):
        seen[image.size[::-1]] += 1
        grey = grey and is_grey(image, deep=True)
    if not seen:
        raise ValueError(f"no image of {origin} can be read: check the folder")
    check_classes(classes.names, () if source.names is None else map(classes.label, source.labels()), origin)
    if size is None and len(seen) > 1:
        shown = [f"{named(found)} ({count} images)" for found, count in seen.most_common(5)]
        more = f" and {len(seen) - 5} others" if len(seen) > 5 else ""
        raise ValueError(
            f"{origin} has images of several sizes, height x width {', '.join(shown)}{more}: pass --image-size with "
            "the side or HEIGHTxWIDTH that they shall have"
        )
    height, width = both(size) if size is not None else next(iter(seen))
    resized, channels = set(seen) != {(height, width)}, 1 if grey else 3
    mean, std = _statistics(source, (height, width), channels, resized)
    return DataSpec(
        name, None, channels, height if height == width else (height, width), len(classes.names), mean, std, flip=True,
        crop_padding=0 if resized else max(1, round(min(height, width) / 8)), resized=resized,
    )  # fmt: skip


def _some(source: Source) -> Iterator[Image.Image]:
    """Images that are evenly spread over the split, not yet decoded."""
    blocks = source.blocks()
    count = int(blocks[:, 3].sum())
    looked_at = min(count, LOOKED_AT)
    for _, row in read_rows(source, blocks, np.arange(looked_at) * count // looked_at):
        try:
            if row.problem is None:
                with open_image(row.image) as image:
                    yield image
        except BROKEN:
            continue


def _statistics(source: Source, size: tuple[int, int], channels: int, resized: bool) -> tuple[tuple[float, ...], ...]:
    """Mean and standard deviation per channel of the pixels in 0..1, as they are for testing."""
    sums, squares, pixels = np.zeros(channels), np.zeros(channels), 0
    for image in _some(source):
        try:
            shown = centre_crop(image, size, channels) if resized else stored_pixels(image, channels)
        except BROKEN:
            continue
        values = shown.reshape(channels, -1) / 255
        sums, squares, pixels = sums + values.sum(1), squares + (values**2).sum(1), pixels + values.shape[1]
    mean = sums / max(pixels, 1)
    std = np.sqrt(np.maximum(squares / max(pixels, 1) - mean**2, 0))
    return tuple(np.round(mean, 4).tolist()), tuple(np.maximum(np.round(std, 4), 1e-3).tolist())
