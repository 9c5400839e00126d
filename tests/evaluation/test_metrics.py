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


def test_bootstrap_interval_covers_the_mean_with_the_width_of_theory():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    interval = metrics.bootstrap(values)
    assert interval.low < interval.mean < interval.high
    # 2 * 1.96 standard errors; the bootstrap's own error is a few percent.
    assert interval.high - interval.low == pytest.approx(3.92 * float(values.std()) / 20, rel=0.1)
    assert metrics.bootstrap(values) == interval
    with pytest.raises(ValueError, match="no values"):
        metrics.bootstrap(torch.empty(0))
