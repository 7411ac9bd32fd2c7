"""Decoding one picture: every colour format that the image files of a dataset have, and the crops of ImageNet.

Random resized crop: arXiv 1409.4842, sec. 6; the centre 7/8 of the shorter side for testing: 224 of 256.
"""

import io
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

# What Pillow raises for damaged files, depending on where the damage lies.
BROKEN = (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # naming them halves the time to decode a small image
_GREY = {"1", "L", "LA"}


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


def is_grey(image: Image.Image) -> bool:
    """Whether it becomes 8-bit grey without loss."""
    return image.mode in _GREY


def converted(image: Image.Image, channels: int) -> Image.Image:
    """Grey for one channel, RGB for three. 16-bit grey is scaled to 8 bits; transparency is dropped."""
    if image.mode.startswith("I"):  # `convert` would clip instead of scale
        image = Image.fromarray(np.rint(np.asarray(image).clip(0, 65535) / 257).astype(np.uint8))
    mode = "L" if channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def random_crop(image: Image.Image, side: int, rng: np.random.Generator, *, crop: bool, flip: bool) -> np.ndarray:
    """For training: 8 % to 100 % of the area with an aspect of 3/4 to 4/3, mirrored or not; uint8 [3, side, side].

    Without `crop` it is the part that `centre_crop` shows, without `flip` it is never mirrored; neither changes the
    random numbers of the other.
    """
    width, height = image.size
    mirrored = rng.random() < 0.5
    box = _random_box(width, height, rng) if crop else _centre_box(width, height)
    # a JPEG decodes faster, and in less memory, to 1/2, 1/4 or 1/8 of its size
    shrink = side / min(box[2] - box[0], box[3] - box[1])
    if shrink < 0.5:
        image.draft(image.mode, (int(width * shrink), int(height * shrink)))
        scale = (image.width / width, image.height / height) * 2
        box = tuple(at * factor for at, factor in zip(box, scale, strict=True))
    pixels = _resized(image, side, box)
    return pixels[:, :, ::-1] if flip and mirrored else pixels


def centre_crop(image: Image.Image, side: int) -> np.ndarray:
    """For testing: as if the shorter side were resized to 8/7 `side` and the centre cut out; uint8 [3, side, side]."""
    return _resized(image, side, _centre_box(*image.size))


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = (int(at) for at in rng.integers(0, (width - w + 1, height - h + 1)))
            return left, top, left + w, top + h
    # a very narrow picture: the largest part of an allowed aspect, from the centre
    w, h = min(width, height * 4 / 3), min(height, width * 4 / 3)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def _centre_box(width: int, height: int) -> tuple[float, float, float, float]:
    half = min(width, height) * 7 / 16
    return width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half


def _resized(image: Image.Image, side: int, box: tuple[float, ...]) -> np.ndarray:
    shown = converted(image, 3).resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(shown).transpose(2, 0, 1)
