"""Optimised latents reach what a generator can make, tuned generators what it cannot, each picture alone."""

import pytest
import torch

from mambastyle.features.small import SmallFeatures, SmallFeaturesConfig
from mambastyle.latents.optimise import (
    PivotalTuning,
    Projection,
    TunedSynthesis,
    optimise_latents,
    spread_of_w,
    tune_generator,
)
from mambastyle.losses import reconstruction
from mambastyle.models.mambastyle import Inversion
from mambastyle.models.stylegan2 import Generator

FEW = Projection(steps=20, learning_rate=0.2)


@pytest.fixture
def generator(tiny_generator_config) -> Generator:
    return Generator(tiny_generator_config).eval().requires_grad_(False)


@pytest.fixture
def judge() -> SmallFeatures:
    return SmallFeatures(SmallFeaturesConfig(16, (4, 6), (1, 1))).eval().requires_grad_(False)


def average(batch: int) -> Inversion:
    return Inversion(torch.zeros(batch, 6, 12), None)


def test_the_schedules_are_the_projectors():
    settings = Projection(steps=1000)
    rates = [settings.learning_rate_at(step) for step in (0, 25, 50, 500, 750, 875, 999)]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.1, 0.1, 0.05, 0], abs=1e-5)
    assert [settings.noise_at(step) for step in (0, 375, 750, 999)] == pytest.approx([0.05, 0.0125, 0, 0])


def test_the_spread_is_the_distance_of_samples_from_their_average(generator):
    spread = spread_of_w(generator)
    w = generator.mapping(torch.randn(4000, 12))[:, 0] - generator.mapping.w_avg
    assert spread.distance == pytest.approx(float(w.square().sum(1).mean().sqrt()), rel=0.05)
    assert spread.samples.shape == (10_000, 12)


@pytest.mark.parametrize("space", ["w", "w+"])
def test_latents_of_the_generators_own_pictures_are_found(generator, judge, space):
    shape = (2, 1, 12) if space == "w" else (2, 6, 12)
    true = torch.randn(shape) * 0.3 + generator.mapping.w_avg
    image = generator.synthesis(true.expand(2, 6, 12))
    steps = []
    settings = Projection(steps=40, learning_rate=0.2, space=space)
    found = optimise_latents(
        generator, image, average(2), settings, judge=judge, on_step=lambda: steps.append(1)
    )
    assert len(steps) == 40
    before = reconstruction.l2(generator.synthesis(generator.mapping.w_avg.expand(2, 6, 12)), image)
    after = reconstruction.l2(generator.synthesis(found.ws + generator.mapping.w_avg), image)
    assert after < 0.3 * before
    assert (found.ws == found.ws[:, :1]).all() == (space == "w")


def test_a_pictures_latents_depend_on_the_seed_and_not_on_its_neighbours(generator, judge):
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    settings = Projection(steps=5)
    both = optimise_latents(generator, image, average(2), settings, judge=judge)
    alone = optimise_latents(generator, image[1:], average(1), settings, judge=judge)
    torch.testing.assert_close(both.ws[1:], alone.ws, rtol=1e-4, atol=1e-5)
    other = optimise_latents(generator, image[1:], average(1), settings, judge=judge, seed=1)
    assert not torch.allclose(other.ws, alone.ws, atol=1e-4)


def test_a_feature_is_optimised_through_what_is_fused(generator):
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    start = Inversion(torch.randn(2, 6, 12) * 0.1, torch.randn(2, 10, 16, 16) * 0.1)
    settings = Projection(steps=20, learning_rate=0.1, noise=0.0)
    found = optimise_latents(generator, image, start, settings, judge=None, fuse=lambda h: 2 * h)

    def distance(inversion: Inversion) -> torch.Tensor:
        assert inversion.feature is not None
        rendered = generator.synthesis(inversion.ws + generator.mapping.w_avg, 2 * inversion.feature)
        return reconstruction.l2(rendered, image)

    assert distance(found) < 0.7 * distance(start)
    # Steps are in proportion to a picture's own feature: beside one a hundred times as large it is the same.
    beside = Inversion(start.ws[:1].repeat(2, 1, 1), torch.cat([start.feature[:1], 100 * start.feature[:1]]))
    single = Inversion(start.ws[:1], start.feature[:1])
    both, alone = (
        optimise_latents(generator, part, each, settings, judge=None)
        for part, each in ((image[:1].repeat(2, 1, 1, 1), beside), (image[:1], single))
    )
    torch.testing.assert_close(both.feature[:1], alone.feature, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="set the space to w"):
        optimise_latents(generator, image, start, Projection(space="w"), judge=None)


def test_tuning_brings_the_pivots_picture_closer_and_leaves_the_generator_alone(generator, judge):
    # Smooth, so that so few steps can show.
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 3, 3) * 2 - 1, (16, 16), mode="bilinear")
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    pivot = optimise_latents(generator, image, average(1), FEW, judge=judge)
    settings = PivotalTuning(steps=25, learning_rate=0.01)
    tuned = tune_generator(generator, image, pivot.ws, settings, judge=judge)
    ws = pivot.ws + generator.mapping.w_avg
    rendered = TunedSynthesis(generator.synthesis)(ws, tuned)
    assert reconstruction.l2(rendered, image) < 0.5 * reconstruction.l2(generator.synthesis(ws), image)
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_locality_keeps_the_neighbourhood(generator, judge):
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    pivot = torch.zeros(1, 6, 12)
    near = generator.mapping(torch.randn(8, 12))
    drift = []
    for weight in (0.0, 3.0):
        settings = PivotalTuning(steps=20, learning_rate=0.01, locality_weight=weight)
        tuned = tune_generator(generator, image, pivot, settings, judge=judge)
        rows = {name: value.expand(8, *value.shape[1:]) for name, value in tuned.items()}
        rendered = TunedSynthesis(generator.synthesis)(near, rows)
        drift.append(float(reconstruction.l2(rendered, generator.synthesis(near))))
    assert drift[1] < 0.7 * drift[0]


def test_each_picture_is_rendered_with_its_own_generator(generator):
    tuned = {
        name: torch.randn(2, *value.shape).half() * 0.1
        for name, value in generator.synthesis.named_parameters()
    }
    ws = torch.randn(2, 6, 12)
    render = TunedSynthesis(generator.synthesis)
    both = render(ws, tuned)
    for index in (1, 0):
        one = {name: value[index : index + 1] for name, value in tuned.items()}
        torch.testing.assert_close(render(ws[index : index + 1], one), both[index : index + 1])


def test_no_steps_is_an_error():
    with pytest.raises(ValueError, match="takes 1 step or more, got 0"):
        Projection(steps=0)
    with pytest.raises(ValueError, match="takes 1 step or more, got 0"):
        PivotalTuning(steps=0)
