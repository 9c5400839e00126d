"""Metrics against closed forms, torchmetrics, scipy and the golden Frechet case."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mambastyle.evaluation import metrics

GOLDEN = Path(__file__).parents[1] / "golden"


def pair(height: int = 64, width: int = 64, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, height // 8, width // 8, generator=generator) * 2 - 1
    x = torch.nn.functional.interpolate(x, (height, width), mode="bilinear")
    y = x + noise * torch.randn(x.shape, generator=generator)
    return x, y.clamp(-1, 1)


def test_l2_and_psnr_of_a_known_difference():
    x = torch.zeros(2, 3, 4, 6)
    y = torch.stack([torch.full((3, 4, 6), 0.2), torch.full((3, 4, 6), 2.0)])
    torch.testing.assert_close(metrics.l2(x, y), torch.tensor([0.04, 4.0]))
    torch.testing.assert_close(metrics.psnr(x, y), torch.tensor([20.0, 0.0]))
    assert metrics.psnr(x, x).isinf().all()


def test_ssim_and_ms_ssim_of_equal_pictures_are_one_and_fall_with_noise():
    x, y = pair()
    for measure in (metrics.ssim, metrics.ms_ssim):
        torch.testing.assert_close(measure(x, x), torch.ones(2), rtol=0, atol=1e-5)
        assert (measure(x, y) < 0.99).all()
        assert (measure(x, pair(noise=0.4)[1]) < measure(x, y)).all()


def test_ms_ssim_with_five_scales_is_that_of_torchmetrics():
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    x, y = pair(192, 176)
    expected = multiscale_structural_similarity_index_measure(
        x, y, data_range=2.0, normalize="relu", reduction="none"
    )
    # Theirs pads before it crops, and keeps a border that ours never computes.
    torch.testing.assert_close(metrics.ms_ssim(x, y), expected, rtol=0, atol=3e-3)


def test_number_of_scales_follows_size_and_window():
    assert metrics.ms_ssim_scales(64, 64) == 3
    assert metrics.ms_ssim_scales(256, 176) == 5
    assert metrics.ms_ssim_scales(64, 64, kernel_size=3) == 5
    with pytest.raises(ValueError, match="at least 11 px, got 10 x 64"):
        metrics.ms_ssim_scales(10, 64)


def test_pair_metrics_of_a_batch_are_those_of_its_pictures():
    x, y = pair(48, 64)
    for measure in (metrics.l2, metrics.psnr, metrics.ssim, metrics.ms_ssim):
        alone = torch.cat([measure(x[i : i + 1], y[i : i + 1]) for i in range(2)])
        torch.testing.assert_close(measure(x, y), alone, rtol=1e-5, atol=1e-6)


def test_perceptual_distance_is_scale_free_per_position():
    def features(image, layers):
        return {name: image[:, :2] for name in layers}

    x, y = torch.zeros(1, 3, 2, 3), torch.zeros(1, 3, 2, 3)
    x[:, 0], y[:, 1] = 5.0, 0.3  # orthogonal unit vectors: squared distance 2
    assert metrics.perceptual(features, x, y, ["a", "b"]).item() == pytest.approx(2.0)
    assert metrics.perceptual(features, x, 2 * x, ["a"]).item() == pytest.approx(0.0)


def test_frechet_distance_meets_the_golden_case():
    generator = np.random.RandomState(504)
    a = generator.standard_normal((500, 64))
    b = 1.1 * generator.standard_normal((400, 64)) + 0.2
    expected = float(np.load(GOLDEN / "frechet.npz")["fd"])
    measured = metrics.frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert measured == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_with_fewer_pictures_than_features_is_finite_and_symmetric():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(10, 64, generator=generator), torch.randn(12, 64, generator=generator) + 1
    forth, back = metrics.frechet_distance(a, b), metrics.frechet_distance(b, a)
    assert math.isfinite(forth)
    assert forth == pytest.approx(back, rel=1e-6)
    assert metrics.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-5)


def test_frechet_distance_refuses_what_is_no_set_of_features():
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.frechet_distance(torch.full((3, 2), math.nan), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="count >= 2"):
        metrics.frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2))


def test_kernel_distance_is_that_of_torchmetrics_and_seeded():
    from torchmetrics.image.kid import poly_mmd

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 8, generator=generator), torch.randn(40, 8, generator=generator) + 0.5
    # One subset of everything leaves no chance.
    mean, deviation = metrics.kernel_distance(a, b, subsets=1, subset_size=1000)
    expected = poly_mmd(a.double(), b.double())
    assert mean == pytest.approx(float(expected), rel=1e-6)
    assert deviation == 0
    few = {"subsets": 5, "subset_size": 10}
    assert metrics.kernel_distance(a, b, **few, seed=1) == metrics.kernel_distance(a, b, **few, seed=1)
    assert metrics.kernel_distance(a, b, **few, seed=1) != metrics.kernel_distance(a, b, **few, seed=2)


def test_normalised_kernel_distance_does_not_know_the_features_unit():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(60, 8, generator=generator), torch.rand(60, 8, generator=generator) + 0.5
    plain = metrics.kernel_distance(a, b, normalise=True)
    assert metrics.kernel_distance(300 * a, 300 * b, normalise=True) == pytest.approx(plain, rel=1e-6)
    scale = float(a.square().mean().sqrt())
    assert plain == pytest.approx(metrics.kernel_distance(a / scale, b / scale), rel=1e-6)
    assert metrics.kernel_distance(300 * a, 300 * b)[0] > 1e6 * plain[0]
    with pytest.raises(ValueError, match="all 0"):
        metrics.kernel_distance(torch.zeros(4, 2), b[:, :2], normalise=True)


def test_precision_and_recall_of_sets_on_a_line():
    # Balls of the reals: each reaches its nearest neighbour, 1 away; likewise of the fakes.
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    fake = torch.tensor([[0.5], [1.5], [10.0], [11.0]])
    assert metrics.precision_recall(real, fake, neighbours=1) == (0.5, 0.75)
    assert metrics.precision_recall(real, real) == (1.0, 1.0)
    with pytest.raises(ValueError, match="more than 4 features in each set, got 4, 4"):
        metrics.precision_recall(real, fake, neighbours=4)


def test_identity_is_the_cosine_of_what_a_network_makes_of_both():
    x = torch.zeros(3, 3, 2, 2)
    x[:, 0] = 1
    y = torch.zeros(3, 3, 2, 2)
    y[0, 0], y[1, 1], y[2, 0] = 5.0, 1.0, -2.0
    found = metrics.identity(lambda image: image.mean((2, 3)), x, y)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, -1.0]))


def test_bootstrap_interval_covers_the_mean_with_the_width_of_theory():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    interval = metrics.bootstrap(values)
    assert interval.low < interval.mean < interval.high
    # 2 * 1.96 standard errors; the bootstrap's own error is a few percent.
    assert interval.high - interval.low == pytest.approx(3.92 * float(values.std()) / 20, rel=0.1)
    assert metrics.bootstrap(values) == interval
    with pytest.raises(ValueError, match="no values"):
        metrics.bootstrap(torch.empty(0))


def test_structure_distance_is_kl_of_softmaxed_cosines_and_blind_to_scale():
    x, y = torch.randn(5, 3, 4), torch.randn(5, 3, 4)

    def rows(features: torch.Tensor) -> torch.Tensor:
        unit = torch.nn.functional.normalize(features.flatten(1), dim=0)
        return (unit.T @ unit).softmax(1)

    p, q = rows(x).double(), rows(y).double()
    expected = float((p * (p / q).log()).sum(1).mean())
    assert metrics.structure_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert metrics.structure_distance(x, 3 * x) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="maps of one size"):
        metrics.structure_distance(x, y[:, 1:])


def test_histogram_distance_of_colours():
    red = torch.tensor([1.0, -0.5, -0.5])[:, None, None].expand(3, 20, 30)
    blue = red.flip(0)
    grey = torch.zeros(3, 9, 7)
    of_red, of_blue = metrics.colour_histogram(red), metrics.colour_histogram(blue)
    assert float(of_red.sum()) == pytest.approx(1.0, abs=1e-5)
    assert metrics.histogram_distance(of_red, metrics.colour_histogram(red[:, :5])) < 1e-3
    assert metrics.histogram_distance(of_red, of_blue) > 0.7
    # All channels equal: every plane peaks in the middle, at log-ratios 0.
    middle = metrics.colour_histogram(grey)[0]
    assert middle.argmax() in (31 * 64 + 31, 31 * 64 + 32, 32 * 64 + 31, 32 * 64 + 32)
    # Hellinger's bound: nothing in common.
    a, b = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    a[0, 0, 0] = b[0, 1, 1] = 1
    assert metrics.histogram_distance(a, b) == pytest.approx(1.0)


def test_hatching_is_the_power_of_fine_diagonal_detail():
    real = torch.randn(8, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    assert metrics.hatching(real, real) == pytest.approx(1.0)
    assert metrics.hatching(2 * real, real) == pytest.approx(4.0)
    rows, columns = torch.arange(48)[:, None], torch.arange(32)
    # A sine of 0.4 cycles a pixel both ways is in the corner; along one side alone, or coarser, it is not.
    diagonal = torch.sin(0.8 * torch.pi * (rows + columns)).expand_as(real)
    for outside in (
        torch.sin(0.8 * torch.pi * rows + 0 * columns),
        torch.sin(0.4 * torch.pi * (rows + columns)),
    ):
        assert metrics.hatching(real + outside, real) == pytest.approx(1.0, abs=0.01)
    assert metrics.hatching(real + diagonal, real) > 2
    with pytest.raises(ValueError, match="two sets of pictures of one size"):
        metrics.hatching(real, real[:, :, :16])


def test_seam_ratio_of_steps_on_and_off_the_grid():
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 24, 32)
    flat = torch.zeros(1, 3, 16, 16)
    blocks = torch.arange(3.0)[:, None].repeat_interleave(8, 0).expand(1, 3, 24, 32).clone()
    off = torch.roll(blocks, 3, 2)
    assert metrics.seam_ratio(ramp, 8).item() == pytest.approx(1.0, rel=1e-4)
    assert metrics.seam_ratio(flat, 8).item() == pytest.approx(1.0)
    assert metrics.seam_ratio(blocks, 8).item() > 1e6
    assert metrics.seam_ratio(off, 8).item() < 1e-6
    noise = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(metrics.seam_ratio(noise, 8), torch.ones(2), rtol=0, atol=0.03)
    # Beside noise of 1, whose steps have the energy 2, steps of 2 along one axis: (2 + 4 + 2) / (2 + 2).
    lifted = noise + 2 * (torch.arange(256) // 8 % 2)[:, None]
    torch.testing.assert_close(metrics.seam_ratio(lifted, 8), torch.full((2,), 2.0), rtol=0, atol=0.06)
    with pytest.raises(ValueError, match="patches of 2 px or more"):
        metrics.seam_ratio(flat, 16)
