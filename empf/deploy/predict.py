"""What a network says of one input: the classes of a picture, and of a recording of events frame after frame."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from empf.data.event_frames import event_frames_of_file
from empf.data.images import BROKEN, centre_crop, converted, stored_pixels
from empf.data.rows import one_line
from empf.data.sets import both
from empf.deploy.origin import Origin
from empf.deploy.pack import PackedModel
from empf.models import SpikingNetwork
from empf.online import reset


def top_classes(packed: PackedModel, picture: str | Path, k: int = 5) -> list[tuple[str, float]]:
    """The k most probable (class name, probability) of an image file: softmax of the mean logits, highest first.

    The picture is cut to its centre and resized to the input of the network, as the test images were. Raises
    FileNotFoundError or ValueError with one sentence where it cannot be read, or where the network was not trained on
    images.

    >>> packed = empf.pack(empf.resnet18(num_classes=2, in_channels=1, image_size=8, width=0.0625).eval())
    >>> packed.origin = Origin("drawn", classes=("cat", "dog"), mean=(0.5,), std=(0.25,))
    >>> Image.new("L", (40, 30)).save("picture.png")
    >>> sorted(name for name, probability in top_classes(packed, "picture.png"))
    ['cat', 'dog']
    """
    c, origin = packed.config, packed.origin
    if c.in_channels == 2:
        raise ValueError("the network was trained on events and takes no pictures: give it a recording with --stream")
    if c.in_channels not in (1, 3) or len(origin.mean) != c.in_channels or len(origin.classes) != c.num_classes:
        raise ValueError(
            "the network does not say how images are normalised and what its classes are called: pack it from a run "
            "folder that was trained on images"
        )
    pixels = read_picture(picture, c.in_channels, c.image_size, origin.spec(c).resized)  # C H W
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (origin.mean, origin.std))
    image = ((pixels / 255 - mean) / std).unsqueeze(0).to(next(packed.buffers()).device)
    packed.reset()
    found = packed(image).mean(0).softmax(-1)[0].topk(min(k, c.num_classes))  # classes
    packed.reset()
    return [(origin.classes[i], p) for i, p in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def follow_recording(net: PackedModel | SpikingNetwork, recording: str | Path) -> Iterator[tuple[str, float, float]]:
    """After each frame of an event recording (or frames [T, 2, H, W] as .npy, .npz): (class, its share, seconds).

    Frames are made as they were for training, where that is known. The class has the largest sum of logits so far, its
    share is that of the softmax of their mean. Raises FileNotFoundError or ValueError with one sentence where the file
    cannot be read, or the network takes no events.
    """
    c = net.config
    if c.in_channels != 2:
        raise ValueError(f"a stream needs a network for events of 2 polarities, this one has {c.in_channels} channels")
    origin = net.origin if isinstance(net, PackedModel) else Origin.of(net)
    names = origin.classes if len(origin.classes) == c.num_classes else [f"class {i}" for i in range(c.num_classes)]
    frames = event_frames_of_file(recording, c.T, c.image_size, **origin.frames()).to(next(net.buffers()).device)
    reset(net)
    total = torch.zeros((), device=frames.device)
    for t, frame in enumerate(frames, 1):
        start = time.perf_counter()
        with torch.no_grad():
            total = total + net(frame.unsqueeze(0), steps=1)[0, 0]  # classes
        share, best = (total / t).softmax(-1).max(-1)
        yield names[int(best)], share.item(), time.perf_counter() - start
    reset(net)


def read_picture(path: str | Path, channels: int, size: int | tuple[int, int], cropped: bool = False) -> Tensor:
    """The centre of an image file as uint8 (channels, height, width).

    `cropped`: as images are in testing where they have several sizes; else the largest centre of the aspect.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}: check the path")
    try:
        with Image.open(path) as image:
            image = converted(ImageOps.exif_transpose(image), channels)
            fitted = None if cropped else ImageOps.fit(image, both(size)[::-1], Image.Resampling.BICUBIC)
            pixels = centre_crop(image, size, channels) if cropped else stored_pixels(fitted, channels)
    except BROKEN as error:
        raise ValueError(f"cannot read {path} as an image ({one_line(error)}): convert it to PNG") from error
    return torch.from_numpy(pixels.copy())
