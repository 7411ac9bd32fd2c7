"""How activations are cut into tiles: limits of a grid and of int32, at sizes of which nothing need be computed."""

import pytest
import torch

from empf.kernels import dense, steps
from empf.kernels.dispatch import tl, triton
from empf.kernels.pack import pack, signs


def channels(c, positions=2, last=False):
    x = torch.empty((1, 1, c, positions), device="meta")
    return x.movedim(2, -1).contiguous().movedim(-1, 2) if last else x


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("positions", [2, 4096])
@pytest.mark.parametrize("c", [1, 64, 65_535, 65_536, 200_000, 8_000_000])
def test_programs_along_an_axis(c, positions, last):
    """CUDA allows 65,535 along axis 1; the tiles still cover all channels and hold as many numbers."""
    view, tile, tiles = steps.tiling(channels(c, positions, last), True, 128)
    blocks = steps.channel_blocks(view, tile)
    assert blocks <= 65_535 and tile["X"] * tile["Y"] <= 128
    of_channels, of_positions = ("Y", "X") if tile["CHANNELS_LAST"] else ("X", "Y")
    assert blocks * tile[of_channels] >= c and tiles * tile[of_positions] >= positions


def test_more_channels_than_a_grid_has():
    with pytest.raises(ValueError, match="up to 8388480 channels here, got 9000000"):
        steps.tiling(channels(9_000_000), True, 128)


@triton.jit
def _tile_kernel(out_ptr, i, B, Y: tl.constexpr):
    offsets, mask, _ = steps._tile(i, 1, 1, B, 1, Y, False)
    tl.store(out_ptr + tl.arange(0, Y)[None, :], tl.where(mask, offsets, -1))


@pytest.mark.kernel
def test_a_step_of_nearly_2_to_the_31_numbers(device, kernels_on):
    """Its size and a tile are together more than int32 holds: the last tiles still lie where they should."""
    out = torch.empty(512, dtype=torch.int64, device=device)
    for size in (2**31 - 2, 2**31 - 511, 2**31 + 5):
        last = -(-size // 512) - 1
        _tile_kernel[(1,)](out, last, size, 512)
        want = torch.arange(512 * last, 512 * last + 512)
        assert torch.equal(out.cpu(), want.where(want < size, -1))


@pytest.mark.kernel
def test_unpacking_many_blocks_of_k(device, kernels_on):
    """K beyond 65,535 blocks of 128, which axis 1 of a grid does not have."""
    k = 8_388_480 + 130
    packed = pack(torch.randn(1, k, generator=torch.Generator().manual_seed(0))).to(device)
    grids = []

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    kernel, dense._unpack_kernel = dense._unpack_kernel, Recorded()
    try:
        dense.unpack_dense(packed.operand("pair"), None, 1, k, False, torch.float32)
    finally:
        dense._unpack_kernel = kernel
    assert all(size <= 65_535 for size in grids[0][1:]) and grids[0][0] == -(-k // 128)
    small = pack(torch.randn(70, 300, generator=torch.Generator().manual_seed(1))).to(device)
    w = dense.unpack_dense(small.operand("pair"), None, 70, 300, False, torch.float32)
    assert torch.equal(w, signs(small).float())
