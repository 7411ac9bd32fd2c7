"""Decoding one picture: every colour format that the image files of a dataset have, and the crops of ImageNet.

Random resized crop: arXiv 1409.4842, sec. 6; the centre 7/8 of the shorter side for testing: 224 of 256.
"""

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from empf.data.sets import DATASETS, DataSpec, both, named

# What Pillow raises for damaged files, depending on where the damage lies.
BROKEN = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # naming them halves the time to decode a small image
_GREY = {"1", "L", "LA"}


def open_image(item: dict[str, Any] | None) -> Image.Image:
    """`{"bytes": ..., "path": ...}` with either of them set, turned as its EXIF says; raises one of `BROKEN`.

    Not yet decoded, unless it is turned. Of several pictures, as in a GIF, it is the first.
    """
    encoded, path = (item["bytes"], item["path"]) if item else (None, None)
    if encoded is None and path is None:
        raise ValueError("the image is empty")
    image = Image.open(path if encoded is None else io.BytesIO(encoded), formats=_FORMATS)
    if "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # Pillow turns TIFF itself
        return ImageOps.exif_transpose(image)
    return image


def is_grey(image: Image.Image, *, deep: bool = False) -> bool:
    """Whether it becomes 8-bit grey without loss; `deep`: or is grey of more bits."""
    return image.mode in _GREY or deep and image.mode.startswith("I")


def converted(image: Image.Image, channels: int) -> Image.Image:
    """Grey for one channel, RGB for three. 16-bit grey is scaled to 8 bits; transparency is dropped."""
    if image.mode == "F":  # in 0..1 or in 0..255, nobody knows
        raise ValueError("it has floating-point pixels: store it with 8 or 16 bits")
    if image.mode.startswith("I"):  # `convert` would clip instead of scale
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def mismatch(spec: DataSpec, image: Image.Image) -> str | None:
    """What keeps an image from being a stored image of a set whose images have one size; before it is decoded."""
    own = spec.name not in DATASETS
    if image.size != spec.size[::-1]:
        width, height = image.size
        resize = f"train with --image-size {named(spec.image_size)}, which crops and resizes"
        advice = resize if own else "check --dataset"
        return f"is {width}x{height} pixels, but {spec.name} has {'x'.join(map(str, spec.size[::-1]))}: {advice}"
    if spec.channels == 1 and not is_grey(image, deep=own):
        return f"has the pixel format {image.mode}, but {spec.name} needs 8-bit grey: convert it"
    return None


def random_crop(
    image: Image.Image,
    size: int | tuple[int, int],
    rng: np.random.Generator,
    *,
    crop: bool,
    flip: bool,
    channels: int = 3,
) -> np.ndarray:
    """For training: 8 % to 100 % of the area, distorted by up to 3/4 or 4/3, mirrored or not; uint8 [C, H, W].

    Without `crop` it is the part that `centre_crop` shows, without `flip` it is never mirrored; neither changes the
    random numbers of the other.
    """
    (width, height), size = image.size, both(size)
    mirrored = rng.random() < 0.5
    aspect = size[1] / size[0]
    box = _random_box(width, height, rng, aspect) if crop else _centre_box(width, height, aspect)
    # a JPEG decodes faster, and in less memory, to 1/2, 1/4 or 1/8 of its size
    shrink = max(size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1]))
    if shrink < 0.5:
        image.draft(image.mode, (int(width * shrink), int(height * shrink)))
        scale = (image.width / width, image.height / height) * 2
        box = tuple(at * factor for at, factor in zip(box, scale, strict=True))
    pixels = _resized(image, size, box, channels)
    return pixels[:, :, ::-1] if flip and mirrored else pixels


def centre_crop(image: Image.Image, size: int | tuple[int, int], channels: int = 3) -> np.ndarray:
    """For testing: as if it were resized to cover 8/7 of `size` and the centre cut out; uint8 [C, H, W] of `size`."""
    size = both(size)
    return _resized(image, size, _centre_box(*image.size, size[1] / size[0]), channels)


def stored_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """All of it: uint8 [C, H, W]."""
    pixels = np.asarray(converted(image, channels))  # H W (3)
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _random_box(width: int, height: int, rng: np.random.Generator, aspect: float = 1.0) -> tuple[float, ...]:
    """`aspect` of the result, which that of the box differs from by up to 3/4 or 4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        drawn = aspect * np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * drawn) ** 0.5), round((area / drawn) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(at) for at in rng.integers(0, (width - w + 1, height - h + 1)))
            return left, top, left + w, top + h
    # a very narrow picture: the largest part of an allowed aspect, from the centre
    w, h = min(width, height * aspect * 4 / 3), min(height, width / aspect * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _centre_box(width: int, height: int, aspect: float) -> tuple[float, ...]:
    y = min(width / aspect, height) * 7 / 16
    x = y * aspect
    return width / 2 - x, height / 2 - y, width / 2 + x, height / 2 + y


def _resized(image: Image.Image, size: tuple[int, int], box: tuple[float, ...], channels: int) -> np.ndarray:
    return stored_pixels(converted(image, channels).resize(size[::-1], Image.Resampling.BILINEAR, box=box), channels)
