"""The file of a packed network: safetensors with a checksum; nothing in it is ever executed or unpickled.

metadata       format     "empf-packed"
               version    of this layout
               about      JSON: what is needed to rebuild and to use the network
               sha256     of the whole file with these 64 digits set to 0, so no bit of it can change unnoticed
NAME.bits      (N, ceil(K/8)) uint8, binary:  bit j of byte q = weight 8q + j, 1 -> minus
               (N, ceil(K/5)) uint8, ternary: sum of d[j] * 3^j for weights 5q + j, d = 0 | 1 | 2 for 0 | plus | minus
parameters     uint8: every fp32 number of the network in the order of its state dict, cut into four planes (all lowest
               bytes first), each byte order little-endian, and compressed without loss by zlib

Five ternary weights in a byte are 1.6 bits each, of log2(3) = 1.58 needed. The planes of sign and exponent hold few
different bytes: compressing them saves about a sixth of the fp32 numbers, which are a seventh of a binary ResNet-18.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from torch import Tensor

from empf.files import parse_json
from empf.kernels.pack import weights_per_word
from empf.terminal import shown

FORMAT, VERSION = "empf-packed", 2
UNSIGNED = "0" * 64  # stands in place of the checksum while it is computed
MAX_HEADER = 2**24  # bytes; the header of a ResNet-34 has 5,000 and those of the names of its classes
MAX_NUMBERS = 2**28  # fp32 parameters: a file must not ask for all memory
MOST_INFLATED = 64  # times the compressed size, beyond the first megabyte: zlib makes a thousand bytes of one
PARAMETERS = "parameters"
_TERNARY_DIGIT = np.array([0, 1, 0, 2], np.uint8)  # of a 2-bit code; minus zero (code 2) is zero
_POWERS = 3 ** np.arange(5)
_TERNARY_CODES = np.array([0, 1, 3], np.uint8)[np.arange(243)[:, None] // _POWERS % 3]  # 243 5: codes of a byte


def encode(state: Mapping[str, Tensor], weights: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    """The arrays of the file: packed `bits` named in `weights` (dense shape, kind), all else fp32 parameters.

    Raises ValueError for more parameters than `decode` reads, and for numbers that are not finite.
    """
    arrays = {name: _encode_bits(state[name], *weights[name]) for name in weights}
    floats = [_as_floats(name, tensor) for name, tensor in state.items() if name not in weights]
    _check_size(sum(map(len, floats)))
    planes = np.concatenate(floats).astype("<f4").view(np.uint8).reshape(-1, 4).T.tobytes()
    small = zlib.compress(planes, 9)
    small = small if _may_inflate(len(small), len(planes)) else zlib.compress(planes, 0)
    arrays[PARAMETERS] = np.frombuffer(small, np.uint8)
    return arrays


def _as_floats(name: str, tensor: Tensor) -> np.ndarray:
    numbers = tensor.detach().float().cpu()
    _check_finite(name, numbers)
    if not tensor.is_floating_point() and not torch.equal(numbers.to(tensor.dtype), tensor.cpu()):
        raise ValueError(f"{name} holds numbers of type {tensor.dtype} that a packed file, of float32, cannot store")
    return numbers.numpy().ravel()


def _check_finite(name: str, numbers: Tensor) -> None:
    if not torch.isfinite(numbers).all():
        raise ValueError(f"{name} holds numbers that are not finite")


def _may_inflate(compressed: int, size: int) -> bool:
    return size <= 2**20 + MOST_INFLATED * compressed


def decode(
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, Tensor],
    weights: Mapping[str, tuple[tuple[int, ...], str]],
) -> dict[str, Tensor]:
    """The state dict whose names and shapes are those of `wanted` (tensors on any device, also meta).

    Raises ValueError where the arrays do not fit, or hold a number that is not finite.
    """
    if set(arrays) != {*weights, PARAMETERS} or any(a.dtype != np.uint8 for a in arrays.values()):
        raise ValueError("its tensors are not those of the network it describes")
    state = {name: _decode_bits(arrays[name], *weights[name]) for name in weights}
    shapes = {name: tensor.shape for name, tensor in wanted.items() if name not in weights}
    size = 4 * sum(shape.numel() for shape in shapes.values())
    _check_size(size // 4)
    if not _may_inflate(arrays[PARAMETERS].size, size):
        raise ValueError(f"{arrays[PARAMETERS].size:,} bytes would become {size:,} bytes of parameters")
    unzip = zlib.decompressobj()
    try:
        planes = unzip.decompress(arrays[PARAMETERS].tobytes(), size)  # never more than the network needs
    except zlib.error as error:
        raise ValueError(f"its parameters cannot be decompressed ({error})") from error
    if len(planes) != size or not unzip.eof or unzip.unused_data:
        raise ValueError("its parameters are not as many as those of the network it describes")
    numbers = np.frombuffer(planes, np.uint8).reshape(4, -1).T.ravel().view("<f4").astype(np.float32)
    parts = torch.from_numpy(numbers).split([shape.numel() for shape in shapes.values()])
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        _check_finite(name, part)
        state[name] = part.view(shape).to(wanted[name].dtype, copy=True)
    return state


def _check_size(numbers: int) -> None:
    if numbers > MAX_NUMBERS:
        raise ValueError(f"the network has {numbers:,} full-precision parameters, a packed file holds {MAX_NUMBERS:,}")


def to_bytes(arrays: Mapping[str, np.ndarray], about: dict) -> bytes:
    """The file as bytes, with its checksum. Raises ValueError where `about` is longer than `read` accepts."""
    metadata = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about), "sha256": UNSIGNED}
    header, end = {"__metadata__": metadata}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "U8", "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        end += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"the header would take {len(text):,} bytes, of {MAX_HEADER:,}: give the classes shorter names"
        )
    # not by safetensors, which orders the metadata anew in each process: equal networks give equal files
    data = b"".join([len(text).to_bytes(8, "little"), text, *(array.tobytes() for array in arrays.values())])
    at = _checksum_place(data)
    return data[:at] + _checksum(data).encode() + data[at + 64 :]


def read(path: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(about, arrays) of a file. Raises FileNotFoundError, or ValueError with one sentence for any other file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: give a file that empf.pack(model).save(...) wrote")
    with open(path, "rb") as file:
        metadata = _metadata(path, file)
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path} has version {shown(metadata.get('version'), 20)!r} of the packed format and this version of "
                f"empf reads {VERSION}: update empf, or pack the network again"
            )
        file.seek(0)
        data = file.read()
    if metadata.get("sha256") != _checksum(data):
        raise ValueError(f"{path} is damaged, its checksum is wrong: copy the file again")
    try:
        return parse_json(metadata["about"]), load_arrays(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a packed network ({shown(error, 100)}): pack it again") from error


def is_packed(path: Path) -> bool:
    """Whether a file says that it is a packed network, of any version; it may be damaged all the same."""
    try:
        with open(path, "rb") as file:
            _metadata(path, file)
    except ValueError:
        return False
    return True


def _metadata(path: Path, file) -> dict:
    """The metadata, without reading what may be a large foreign file."""
    size = int.from_bytes(file.read(8), "little")
    foreign = f"{path} is not a packed network, or it is damaged: give a file that empf.pack(model).save(...) wrote"
    if not 2 <= size <= MAX_HEADER:
        raise ValueError(foreign)
    try:
        header = json.loads(file.read(size))
    except (ValueError, RecursionError) as error:
        raise ValueError(foreign) from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ValueError(foreign)
    return metadata


def _checksum_place(data: bytes) -> int:
    """Where the digits of the checksum begin; these quotes cannot stand inside another string of the header."""
    return data.find(b'"sha256":"') + len('"sha256":"')


def _checksum(data: bytes) -> str:
    at = _checksum_place(data)
    return hashlib.sha256(data[:at] + UNSIGNED.encode() + data[at + 64 :]).hexdigest()


def _encode_bits(words: Tensor, shape: tuple[int, ...], kind: str) -> np.ndarray:
    k = int(np.prod(shape[1:]))
    octets = words.cpu().numpy().astype("<i4").view(np.uint8).reshape(len(words), -1)
    if kind == "binary":
        return octets[:, : -(-k // 8)]
    codes = (octets[:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3
    digits = _TERNARY_DIGIT[codes.reshape(len(words), -1)[:, :k]]
    digits = np.pad(digits, ((0, 0), (0, -k % 5))).reshape(len(words), -1, 5)
    return (digits @ _POWERS.astype(np.uint8)).astype(np.uint8)


def _decode_bits(array: np.ndarray, shape: tuple[int, ...], kind: str) -> Tensor:
    n, k = shape[0], int(np.prod(shape[1:]))
    if array.shape != (n, -(-k // (8 if kind == "binary" else 5))):
        raise ValueError(f"{kind} weights of shape {tuple(shape)} cannot be stored as {array.shape}")
    if kind == "ternary":
        if array.max() > 242:
            raise ValueError(f"a byte of its ternary weights is {array.max()}, more than five digits of base 3")
        codes = _TERNARY_CODES[array].reshape(n, -1)[:, :k]
        codes = np.pad(codes, ((0, 0), (0, -k % 4))).reshape(n, -1, 4)
        array = codes[:, :, 0] | codes[:, :, 1] << 2 | codes[:, :, 2] << 4 | codes[:, :, 3] << 6
    octets = np.zeros((n, 4 * -(-k // weights_per_word(kind))), np.uint8)
    octets[:, : array.shape[1]] = array
    return torch.from_numpy(octets.view("<i4").astype(np.int32))
