"""Randomness of a step: reproducible, and the same whatever the number of shards."""

import pytest
import torch

from mambastyle.training.random import StepRandom


def test_shards_see_together_what_one_process_sees():
    whole = StepRandom(1, 7, batch=6)
    parts = [StepRandom(1, 7, batch=6, shard=shard, shards=3) for shard in range(3)]
    for draw in (
        lambda random: random.normal("z", 4),
        lambda random: random.uniform("u"),
        lambda random: random.integers("i", 10),
        lambda random: random.epoch_indices(11),
    ):
        assert torch.equal(torch.cat([draw(part) for part in parts]), draw(whole))


def test_names_steps_and_seeds_are_independent():
    draws = [
        StepRandom(seed, step, batch=4).normal(name, 3)
        for seed in (0, 1)
        for step in (0, 1)
        for name in ("a", "b")
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 8


def test_an_epoch_shows_every_picture_once():
    seen = torch.cat([StepRandom(3, step, batch=5).epoch_indices(20) for step in range(8)])
    assert sorted(seen[:20].tolist()) == list(range(20))
    assert sorted(seen[20:].tolist()) == list(range(20))
    assert not torch.equal(seen[:20], seen[20:])


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch 5 does not divide over 2"):
        StepRandom(0, 0, batch=5, shards=2)


def test_a_share_that_comes_to_no_picture_is_refused():
    assert StepRandom(0, 0, 16).part(0.5, 16, "real_share") == 8
    assert StepRandom(0, 0, 16).part(0.0, 16, "real_share") == 0
    assert StepRandom(0, 0, 16).part(0.5, 0, "edit_share") == 0
    with pytest.raises(ValueError, match=r"edit_share 0.5 is less than one of 1 pictures, in each of 8 proc"):
        StepRandom(0, 0, 16, 3, 8).part(0.5, 1, "edit_share")
