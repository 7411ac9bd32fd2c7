"""Decoding and cropping of one picture, and what becomes of damaged ones."""

import io

import numpy as np
import pytest
from make_data import encoded
from PIL import ExifTags, Image

from empf.data.images import BROKEN, centre_crop, converted, open_image, random_crop
from empf.data.images import _random_box as random_box


def ramp(width: int, height: int) -> Image.Image:
    """Red tells the column, green the row, in steps of 1/255 of the side."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.rint(255 * np.stack((x, y, 0 * x), axis=2)).astype(np.uint8))


def shown(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is seen of a ramp, as shares of its sides; from the inner half of the pixels."""
    side = pixels.shape[1]
    inner, places = slice(side // 4, side - side // 4), np.arange(side) + 0.5
    x, y = pixels[0].mean(0) / 255, pixels[1].mean(1) / 255
    (ax, bx), (ay, by) = (np.polyfit(places[inner], values[inner], 1) for values in (x, y))
    return bx, by, bx + ax * side, by + ay * side


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "RGB"])
def test_every_pixel_format_becomes_rgb(mode):
    if mode == "I;16":
        values = np.array([[0, 256, 257 * 100, 65535]], np.uint16)
        stored, expected = Image.fromarray(values), [[0, 1, 100, 255]] * 3
    else:
        rgb = Image.fromarray(np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]], np.uint8))
        stored = rgb.quantize(colors=4) if mode == "P" else rgb.convert(mode)
        grey = [[0, 255, 0, 0] if mode == "1" else [0, 255, 76, 29]] * 3
        expected = grey if mode in ("L", "1", "LA") else [[0, 255, 255, 0], [0, 255, 0, 0], [0, 255, 0, 255]]
    if mode == "CMYK":  # PNG has none
        got = converted(stored, 3)
    else:
        with open_image(encoded(stored)) as image:
            assert image.mode == mode
            got = converted(image, 3)
            got.load()
    assert got.mode == "RGB"
    assert np.asarray(got)[0].T.tolist() == expected
    assert converted(stored, 1).mode == "L"


def test_centre_crop_is_resize_to_256_and_cut():
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    for size in ((400, 300), (300, 401), (224, 224)):
        picture = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        shorter = min(size)
        scaled = picture.resize((round(size[0] * 256 / shorter), round(size[1] * 256 / shorter)), 2)
        left, top = ((side - 224) // 2 for side in scaled.size)
        expected = np.asarray(scaled.crop((left, top, left + 224, top + 224))).transpose(2, 0, 1)
        got = centre_crop(picture, 224)
        assert got.shape == (3, 224, 224) and got.dtype == np.uint8
        assert np.abs(got.astype(int) - expected).mean() < 2  # half a pixel apart, where the sides are odd
        assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > 0.998


@pytest.mark.parametrize("size", [(120, 90), (60, 200)])
def test_random_crop_shows_the_box_that_was_drawn(size):
    picture, flips = ramp(*size), 0
    for seed in range(40):
        crop = random_crop(picture, 32, np.random.default_rng(seed), crop=True, flip=True)
        rng = np.random.default_rng(seed)
        mirrored = rng.random() < 0.5
        flips += mirrored
        left, top, right, bottom = random_box(*size, rng)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
        plain = random_crop(picture, 32, np.random.default_rng(seed), crop=True, flip=False)
        np.testing.assert_array_equal(crop, plain[:, :, ::-1] if mirrored else plain)
        expected = (left / size[0], top / size[1], right / size[0], bottom / size[1])
        np.testing.assert_allclose(shown(plain), expected, atol=0.03)
        centred = random_crop(picture, 32, np.random.default_rng(seed), crop=False, flip=True)
        whole = centre_crop(picture, 32)
        np.testing.assert_array_equal(centred, whole[:, :, ::-1] if mirrored else whole)
    assert 8 <= flips <= 32


def test_boxes_have_the_areas_and_aspects_of_inception():
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(500, 375, rng) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, aspect = width * height / (500 * 375), width / height
    assert 0.079 < area.min() < 0.1 and 0.95 < area.max() <= 1
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.35
    assert boxes[:, 0].min() == boxes[:, 1].min() == 0 and boxes[:, 2].max() == 500 and boxes[:, 3].max() == 375
    # a strip has no such box: the largest of an allowed aspect, from the centre
    assert random_box(1000, 10, rng) == pytest.approx((500 - 20 / 3, 0, 500 + 20 / 3, 10))
    assert random_box(10, 1000, rng) == pytest.approx((0, 500 - 20 / 3, 10, 500 + 20 / 3))
    assert random_box(1, 1, rng) == (0, 0, 1, 1)


def test_large_jpegs_are_decoded_smaller():
    for seed in range(4):
        item = encoded(ramp(1600, 1200), "JPEG")
        with open_image(item) as image:
            got = random_crop(image, 32, np.random.default_rng(seed), crop=True, flip=False)
            assert image.width < 1600
        whole = Image.open(io.BytesIO(item["bytes"]))
        whole.load()  # what is decoded already cannot be made smaller
        expected = random_crop(whole, 32, np.random.default_rng(seed), crop=True, flip=False)
        assert np.abs(got.astype(int) - expected).max() <= 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(kind, orientation):
    """Red is the column and green the row of the picture as it is to be seen."""
    seen = ramp(48, 32)
    back = {  # as the camera stored it
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = seen.transpose(back[orientation]) if orientation > 1 else seen
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with open_image(encoded(stored, kind, exif=exif, lossless=True, quality=100, subsampling=0)) as image:
        assert image.size == (48, 32)
        assert np.abs(np.asarray(converted(image, 3)).astype(int) - np.asarray(seen)).max() <= 6


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_the_first_picture_of_several(kind):
    first, second = (Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    with open_image(encoded(first, kind, save_all=True, append_images=[second])) as image:
        assert np.asarray(converted(image, 3)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 63


def test_floating_point_pixels_are_refused():
    """Pillow would cut those of 0..1 to black."""
    picture = Image.fromarray(np.full((4, 4), 0.5, np.float32))
    for channels in (1, 3):
        with pytest.raises(ValueError, match="it has floating-point pixels: store it with 8 or 16 bits"):
            converted(picture, channels)


@pytest.mark.filterwarnings("ignore:::PIL")
def test_damaged_files_raise_what_is_caught():
    rng, seen = np.random.default_rng(0), set()
    picture = Image.fromarray(np.kron(rng.integers(0, 256, (6, 8, 3)), np.ones((8, 8, 1))).astype(np.uint8))
    files = [encoded(picture, kind)["bytes"] for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    files += [encoded(picture.convert("CMYK"), "JPEG")["bytes"], encoded(picture.quantize())["bytes"]]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    files += [encoded(picture, kind, exif=exif)["bytes"] for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")]
    for file in files * 50:
        damaged = bytearray(file)
        for _ in range(rng.integers(1, 12)):
            damaged[int(len(damaged) * rng.random() ** 3)] = rng.integers(256)
        damaged = damaged[: rng.integers(1, 2 * len(damaged))]
        try:
            with open_image({"bytes": bytes(damaged), "path": None}) as image:
                random_crop(image, 24, rng, crop=True, flip=True)
        except BROKEN as error:
            seen.add(type(error))
    assert len(seen) >= 3
    for item in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="the image is empty"):
            open_image(item)
