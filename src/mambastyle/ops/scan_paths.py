"""Orders in which the positions of an image are walked, as tables for indexing.

Cross is VMamba's (section 4.3), zigzag that of SaMam. A path is a permutation of the row-major positions
`row * width + column`; `tokens[..., paths[k]]` puts tokens in the order of path k and
`sequence[..., inverse_paths(paths)[k]]` brings the sequence back to row-major order.

Tables are made in some ten microseconds and not cached: a cache would hand out whatever mode made its tensor
(fake, meta), and torch.compile folds the table into the graph anyway.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def cross_paths(
    height: int, width: int, *, device: torch.device | str | None = None
) -> Int[Tensor, "4 positions"]:
    """The four walks of VMamba's cross scan: rows, columns, rows backwards, columns backwards.

    Returns an int64 table of row-major positions (4, height * width); 2x3 gives `0 1 2 3 4 5`, `0 3 1 4 2 5`
    and the reverse of each.
    """
    positions = _positions(height, width, device)
    forward = torch.stack((positions.flatten(), positions.T.flatten()))
    return torch.cat((forward, forward.flip(-1)))


def zigzag_paths(
    height: int, width: int, *, device: torch.device | str | None = None
) -> Int[Tensor, "4 positions"]:
    """Four continuous walks: lines turn back where the last one ended, so every step is one pixel long.

    In order: from the top left along rows, from the bottom right along rows, from the top right along
    columns, from the bottom left along columns. 2x3 gives `0 1 2 5 4 3`, `5 4 3 0 1 2`, `2 5 4 1 0 3` and
    `3 0 1 4 5 2`: path 1 is the reverse of path 0 only when the height is odd, path 3 of path 2 only when the
    width is.

    Returns an int64 table of row-major positions (4, height * width).
    """
    positions = _positions(height, width, device)
    return torch.stack(
        (
            _alternating(positions),
            _alternating(positions.flip(0, 1)),
            _alternating(positions.flip(1).T),
            _alternating(positions.flip(0).T),
        )
    )


def inverse_paths(paths: Int[Tensor, "*paths positions"]) -> Int[Tensor, "*paths positions"]:
    """The table that undoes each path: `tokens[paths[k]][inverse_paths(paths)[k]]` is `tokens` again.

    Leading axes are kept. The last axis must hold permutations of `0 .. positions - 1`, which is not checked
    here because the check costs more than the result.
    """
    steps = torch.arange(paths.shape[-1], device=paths.device, dtype=paths.dtype)
    return torch.empty_like(paths).scatter_(-1, paths, steps.expand_as(paths))


def _positions(height: int, width: int, device: torch.device | str | None) -> Int[Tensor, "height width"]:
    if height < 1 or width < 1:
        raise ValueError(f"a scan path needs a grid of at least 1x1: got height {height}, width {width}")
    return torch.arange(height * width, device=device).view(height, width)


def _alternating(lines: Int[Tensor, "lines steps"]) -> Int[Tensor, " positions"]:
    """Joins the lines one after the other, every second one backwards."""
    joined = lines.clone()
    joined[1::2] = lines[1::2].flip(-1)
    return joined.flatten()
