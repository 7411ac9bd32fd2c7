"""Packed files of which something was altered: each is refused in one sentence or is the same network, nothing else.

    python tests/fuzz_packed.py 20000 [SEED]

A case changes bytes, the description, tensors or parameters of a small file. Then nothing is repaired, or the checksum
is computed anew, or the fingerprint of the network as well, as somebody would do who means harm: only such a file may
be another network, which must be sound, and must not ask for more memory or time than a file of its kind.
"""

import json
import random
import sys
import zlib
from functools import cache
from pathlib import Path
from unittest import mock

import numpy as np
import safetensors.numpy
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from fuzz_tools import by_hand, refusal, some_bytes, some_value
from test_deploy_layers import Convolutional, settled

import empf
from empf import models
from empf.deploy import file as packed_file
from empf.deploy.pack import PackedModel, load_packed, numbers_of_a_step, pack

SHALLOW = {"resnet18": ([1, 1], [64, 128], None), "resnet19": ([1, 1], [128, 256], 256)}
FLOATS = [float("nan"), float("inf"), -float("inf"), 1e38, -1.0, 0.0]


@cache
def examples() -> list[tuple[bytes, torch.Tensor, torch.Tensor, type | None]]:
    """(file, input, logits, class that `load_packed` needs) of three small networks."""
    made, x = [], torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for settings in (dict(neuron="mem_bn"), dict(weights="ternary", spike_bits=4, seca=2, parallel=0.5)):
        torch.manual_seed(0)
        net = empf.resnet18(num_classes=4, in_channels=1, image_size=8, width=0.0625, T=2, **settings)
        made.append((net.eval(), x, None))
    made.append((*settled(Convolutional), Convolutional))
    return [(pack(net).to_bytes(), x, pack(net)(x), kind) for net, x, kind in made]


def some_tensors(arrays: dict[str, np.ndarray], r: random.Random) -> None:
    a, b = r.choice(list(arrays)), r.choice(list(arrays))
    how = r.randrange(8)
    if how == 0:
        arrays[a], arrays[b] = arrays[b], arrays[a]
    elif how == 1:
        del arrays[a]
    elif how == 2:
        arrays[r.choice(["more", "x.bits", "\x1b[2J", "n" * 5000])] = arrays[a]
    elif how == 3:
        arrays[a] = arrays[a][: r.randrange(len(arrays[a]) + 1)]
    elif how == 4:
        arrays[a] = arrays[a].reshape(r.choice([(-1,), (1, *arrays[a].shape), arrays[a].shape[::-1]]))
    elif how == 5:
        arrays[a] = arrays[a].astype(r.choice([np.int32, np.float32, np.int8, np.uint8]))
    elif how == 6:
        arrays[a] = np.frombuffer(r.randbytes(arrays[a].size), np.uint8).reshape(arrays[a].shape)
    else:
        rows = r.choice([0, 1, 10**6 if arrays[a].size < 10**5 else 2])  # once is enough: turned round, it has columns
        arrays[a] = np.zeros((rows, *arrays[a].shape[1:]), np.uint8)


def some_parameters(arrays: dict[str, np.ndarray], r: random.Random) -> None:
    planes = zlib.decompress(arrays[packed_file.PARAMETERS].tobytes())
    numbers = np.frombuffer(planes, np.uint8).reshape(4, -1).T.copy().view("<f4").ravel()
    how = r.randrange(6)
    if how < 3:
        numbers[r.randrange(len(numbers))] = r.choice(FLOATS)
    elif how == 3:
        numbers = numbers[: r.randrange(len(numbers))]
    elif how == 4:
        numbers = np.concatenate([numbers, np.zeros(r.choice([1, 10**6, 10**7]), "<f4")])
    data = zlib.compress(numbers.astype("<f4").view(np.uint8).reshape(-1, 4).T.tobytes(), r.choice([0, 1, 9]))
    arrays[packed_file.PARAMETERS] = np.frombuffer(r.randbytes(len(data)) if how == 5 else data, np.uint8)


def altered(data: bytes, r: random.Random) -> tuple[bytes, int]:
    """(file, 0: nothing was repaired | 1: the checksum was | 2: the fingerprint too)."""
    if r.random() < 0.3:
        return some_bytes(data, r, 8 + int.from_bytes(data[:8], "little")), 0
    sealed = r.choice((1, 2, 2))
    arrays = dict(sorted(safetensors.numpy.load(data).items()))  # else their order is another one in each process
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header["__metadata__"]["about"])
    for _ in range(r.choice((1, 1, 2, 5))):
        how = r.random()
        if how < 0.5 and isinstance(about, dict):
            about = some_value(about, r)
        elif how < 0.8 or packed_file.PARAMETERS not in arrays:
            if arrays:
                some_tensors(arrays, r)
        else:
            try:
                some_parameters(arrays, r)
            except (zlib.error, ValueError):  # an earlier step has taken them
                continue
    if sealed == 2 and isinstance(about, dict):
        about["fingerprint"] = "sealed"
    return packed_file.to_bytes(arrays, about), sealed


def outcome(path: Path, case: tuple, sealed: int) -> str:
    """What becomes of the file; raises AssertionError or any error where it is not what it should be."""
    _, x, wanted, kind = case
    seal = mock.patch.object(PackedModel, "fingerprint", lambda self: "sealed")
    with seal if sealed == 2 else mock.patch.object(PackedModel, "__doc__", ""):
        try:
            packed = load_packed(path, net=None if kind is None else kind())
        except ValueError as error:
            return refusal(error, path)
    c = packed.config
    if c is not None and (c.in_channels, c.image_size, c.T) != (1, 8, 2):
        x = torch.zeros(1, c.in_channels, c.image_size, c.image_size)
        if c.T * numbers_of_a_step(packed.net) > 2**20:  # within the limit, but not for a test
            assert sealed == 2
            return "another network"
    found = packed(x)
    if found.shape == wanted.shape and torch.equal(found, wanted):
        return "the same network"
    assert sealed == 2 and (c is None or found.shape == (c.T, len(x), c.num_classes))
    return "another network"


def one(r: random.Random, folder: Path) -> str:
    """What becomes of an altered file."""
    path = folder / "altered.safetensors"
    with mock.patch.dict(models.RESNETS, SHALLOW):
        case = r.choice(examples())
        data, sealed = altered(case[0], r)
        path.write_bytes(data)
        return outcome(path, case, sealed)


if __name__ == "__main__":
    by_hand(one)
