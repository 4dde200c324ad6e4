"""Convolutions of 3×3 taps by minimal filtering: a fourth of the multiplications.

Of each tile of 4 × 4 pixels the definition takes 144 products for a pair of channels; here they
are 36, between tiles and filters that were transformed beforehand, in one batched matrix product.
The transforms are products with small constant matrices, so all of it runs in the library's own
kernels. Errors are about ten times those of the plain way, 1e-5 of the largest value in float32;
bfloat16 has too few digits for it.

Paper: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308,
section 4, F(4×4, 3×3); the matrices are theirs.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 4  # pixels of output, each direction
SEEN = TILE + 2  # pixels of input that they see
PIECE_BYTES = 16 * 2**20  # of transformed tiles at a time: what a large cache holds

_OF_TILE = torch.tensor(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=torch.float64,
)
_OF_FILTER = (
    torch.tensor(
        [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
        dtype=torch.float64,
    )
    / 24
)
_OF_RESULT = torch.tensor(
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]],
    dtype=torch.float64,
)


def convolve(x: Tensor, weight: Tensor) -> Tensor:
    """Computes a convolution of stride 1 and padding 1.

    Args:
        x: (N, c_in, H, W), float32 or float64, channels_last; at least one image.
        weight: (c_out, c_in, 3, 3), of the dtype of `x`.

    Returns:
        (N, c_out, H, W), channels_last, of the dtype of `x`.
    """
    n, _, h, w = x.shape
    filters = _transform(_OF_FILTER, weight.permute(2, 3, 0, 1))  # (36, c_out, c_in)
    # No view: who calls this may change it in place.
    result = torch.empty((n, len(weight), h, w), dtype=x.dtype, memory_format=torch.channels_last)
    for images, places in _pieces(x, result):
        products = torch.bmm(_tiles(images), filters.mT)  # (36, tiles, c_out)
        rows, columns = _tile_counts(x)
        tiles = _transform(_OF_RESULT, products.view(SEEN, SEEN, -1, len(weight)))
        whole = tiles.view(TILE, TILE, len(images), rows, columns, -1).permute(2, 3, 0, 4, 1, 5)
        whole = whole.reshape(len(images), rows * TILE, columns * TILE, -1)
        places.copy_(whole[:, :h, :w].permute(0, 3, 1, 2))
    return result


def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """Computes the input gradient of `convolve`: a convolution with the filters turned by half.

    Args:
        gradient: of the output (N, c_out, H, W), channels_last.
        weight: (c_out, c_in, 3, 3).

    Returns:
        (N, c_in, H, W), channels_last, of the dtype of `gradient`.
    """
    return convolve(gradient, weight.transpose(0, 1).flip(2, 3))


def weight_gradient(x: Tensor, gradient: Tensor) -> Tensor:
    """Computes the weight gradient of `convolve`, in the transformed tiles.

    Args:
        x: the input (N, c_in, H, W), channels_last.
        gradient: of the output (N, c_out, H, W), channels_last.

    Returns:
        (c_out, c_in, 3, 3), of the dtype of `x`.
    """
    c_out, c_in = gradient.shape[1], x.shape[1]
    total: Tensor | None = None
    rows, columns = _tile_counts(x)
    rest = rows * TILE - x.shape[2], columns * TILE - x.shape[3]
    for images, of_images in _pieces(x, gradient):
        whole = F.pad(of_images.permute(0, 2, 3, 1), (0, 0, 0, rest[1], 0, rest[0]))
        whole = whole.reshape(len(images), rows, TILE, columns, TILE, c_out)
        tiles = whole.permute(2, 4, 0, 1, 3, 5).reshape(TILE, TILE, -1, c_out)
        pair = _transform(_OF_RESULT.T, tiles).mT, _tiles(images)
        total = torch.bmm(*pair) if total is None else total.baddbmm_(*pair)
    assert total is not None
    taps = _transform(_OF_FILTER.T, total.view(SEEN, SEEN, c_out, c_in))
    return taps.view(3, 3, c_out, c_in).permute(2, 3, 0, 1)


def _tile_counts(x: Tensor) -> tuple[int, int]:
    """Tiles in a column and in a row of maps; the last may hang over."""
    return -(-x.shape[2] // TILE), -(-x.shape[3] // TILE)


def _pieces(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and what belongs to them, so many at a time that their tiles stay in the cache."""
    rows, columns = _tile_counts(x)
    channels = max(x.shape[1], y.shape[1])
    bytes_an_image = rows * columns * SEEN**2 * channels * x.element_size()
    count = -(-len(x) * bytes_an_image // PIECE_BYTES)
    size = -(-len(x) // count)
    for start in range(0, len(x), size):
        yield x[start : start + size], y[start : start + size]


def _tiles(x: Tensor) -> Tensor:
    """The transformed tiles of some images: (36, tiles, channels)."""
    (n, c, h, w), (rows, columns) = x.shape, _tile_counts(x)
    height, width = rows * TILE + 2, columns * TILE + 2
    borders = (0, 0, 1, width - 1 - w, 1, height - 1 - h)
    padded = F.pad(x.permute(0, 2, 3, 1), borders).contiguous()
    row = width * c
    seen = padded.as_strided(
        (SEEN, SEEN, n, rows, columns, c),
        (row, c, height * row, TILE * row, TILE * c, 1),
    )
    return _transform(_OF_TILE, seen.reshape(SEEN, SEEN, -1, c))


def _transform(matrix: Tensor, values: Tensor) -> Tensor:
    """Multiplies a matrix to both first dimensions, one after the other: (rows², …)."""
    matrix, (first, second, *rest) = matrix.to(values.dtype), values.shape
    columns = matrix @ values.reshape(first, -1)
    both = matrix @ columns.view(len(matrix), second, -1)
    return both.view(-1, *rest)
