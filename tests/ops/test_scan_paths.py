"""Scan paths: the published orders on a small grid, and what must hold on any grid."""

import pytest
import torch

from mambastyle.ops import cross_paths, inverse_paths, zigzag_paths

GRIDS = [(1, 1), (1, 5), (4, 1), (2, 3), (3, 2), (5, 7), (8, 8)]


def test_cross_paths_of_two_by_three():
    assert cross_paths(2, 3).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


def test_zigzag_paths_of_two_by_three():
    assert zigzag_paths(2, 3).tolist() == [
        [0, 1, 2, 5, 4, 3],
        [5, 4, 3, 0, 1, 2],
        [2, 5, 4, 1, 0, 3],
        [3, 0, 1, 4, 5, 2],
    ]


@pytest.mark.parametrize("make", [cross_paths, zigzag_paths])
@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_path_visits_every_position_and_its_inverse_restores_the_image(make, height, width):
    paths = make(height, width)
    tokens = torch.randn(2, height * width)
    inverses = inverse_paths(paths)
    assert paths.dtype == torch.int64
    for path, inverse in zip(paths, inverses, strict=True):
        assert path.sort().values.tolist() == list(range(height * width))
        assert torch.equal(tokens[:, path][:, inverse], tokens)
    assert torch.equal(inverse_paths(inverses), paths)


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_zigzag_steps_are_one_pixel_long(height, width):
    paths = zigzag_paths(height, width)
    rows, columns = paths // width, paths % width
    distance = rows.diff(dim=-1).abs() + columns.diff(dim=-1).abs()
    assert (distance == 1).all()


@pytest.mark.parametrize(("height", "reverse"), [(3, True), (4, False)])
def test_second_zigzag_reverses_the_first_only_on_odd_heights(height, reverse):
    paths = zigzag_paths(height, 5)
    assert torch.equal(paths[0].flip(-1), paths[1]) is reverse


def test_paths_can_be_made_inside_a_compiled_function():
    def walk(x):
        return x.flatten(1)[:, zigzag_paths(x.shape[1], x.shape[2])]

    x = torch.randn(2, 3, 4)
    assert torch.equal(torch.compile(walk, backend="eager", fullgraph=True)(x), walk(x))


@pytest.mark.parametrize("make", [cross_paths, zigzag_paths])
def test_empty_grid_is_refused(make):
    with pytest.raises(ValueError, match=r"at least 1x1: got height 0, width 3"):
        make(0, 3)
