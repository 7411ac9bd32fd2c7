"""What a packed network says of a picture: how it is read, and its most probable classes."""

import numpy as np
import pytest
import torch
from deploy_tools import logits, trained
from PIL import Image

from empf.data.images import centre_crop
from empf.deploy.origin import Origin
from empf.deploy.pack import PackedModel, pack
from empf.deploy.predict import read_picture, top_classes


def picture_network() -> PackedModel:
    packed = pack(trained()[0])
    packed.origin = Origin("digits", tuple("abcdefghij"), (0.3,), (0.4,))
    return packed


def test_top_classes_of_a_picture(tmp_path):
    packed = picture_network()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    found = top_classes(packed, tmp_path / "cat.png")
    x = (torch.from_numpy(pixels)[None, None] / 255 - 0.3) / 0.4
    wanted = logits(packed, x).mean(0).softmax(-1)[0]
    assert [name for name, _ in found] == ["abcdefghij"[i] for i in wanted.argsort(descending=True)[:5]]
    assert [p for _, p in found] == pytest.approx(wanted.sort(descending=True).values[:5].tolist())
    assert packed.net.t == 0


def test_pictures_are_cut_to_their_middle_and_resized(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    found = read_picture(tmp_path / "wide.png", 3, 8)
    assert found.shape == (3, 8, 8)
    assert torch.equal(found[:, 4, 4], torch.tensor([200, 100, 50], dtype=torch.uint8))
    assert read_picture(tmp_path / "wide.png", 1, 8).shape == (1, 8, 8)


def test_every_colour_format_shows_the_same_picture(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    opaque = np.dstack([grey] * 3 + [np.full_like(grey, 128)])
    for i, pixels in enumerate((grey, grey.astype(np.uint16) * 257, opaque[:, :, :3], opaque)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        for channels in (1, 3):
            found = read_picture(tmp_path / f"{i}.png", channels, 8)
            assert torch.equal(found, torch.from_numpy(grey).expand(channels, 8, 8))


def test_pictures_for_imagenet_are_cut_as_in_its_test(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cat.png")
    wanted = centre_crop(Image.fromarray(pixels), 16)
    assert np.array_equal(read_picture(tmp_path / "cat.png", 3, 16, cropped=True).numpy(), wanted)
    assert not np.array_equal(read_picture(tmp_path / "cat.png", 3, 16).numpy(), wanted)


def test_pictures_that_cannot_be_classified(tmp_path):
    packed = picture_network()
    with pytest.raises(FileNotFoundError, match="no image"):
        top_classes(packed, tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match="as an image"):
        top_classes(packed, tmp_path / "text.png")
    packed.origin = Origin()
    with pytest.raises(ValueError, match="pack it from a run folder"):
        top_classes(packed, tmp_path / "text.png")
    with pytest.raises(ValueError, match="trained on events .* --stream"):
        top_classes(pack(trained("vgg_snn")[0]), tmp_path / "text.png")
