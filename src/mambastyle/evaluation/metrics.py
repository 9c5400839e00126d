"""Metrics as pure functions of picture pairs or of feature sets.

Pairs are (batch 3 height width) in [-1, 1], and every pair metric gives one value per picture (batch,), so
that means and intervals are the caller's. Sets are (count, features), their distances computed in float64.
`fd_squeeze`, `fd_small` and the like are a distance here plus the name of a network: never FID, never LPIPS.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.features.squeezenet import PERCEPTUAL_LAYERS

# Scale weights of Wang et al. 2003, finest first.
_MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class Interval(NamedTuple):
    """A mean and the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def l2(
    image: Float[Tensor, "batch 3 height width"], other: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """Mean squared difference on [-1, 1] per picture; a quarter of it is the L2 on [0, 1]."""
    return (image.float() - other.float()).square().mean((1, 2, 3))


def psnr(
    image: Float[Tensor, "batch 3 height width"], other: Float[Tensor, "batch 3 height width"]
) -> Float[Tensor, " batch"]:
    """10 log10(4 / L2) in decibels: the peak of [-1, 1] is 2. Infinite for equal pictures."""
    return 10 * (4 / l2(image, other)).log10()


def ssim(
    image: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    kernel_size: int = 11,
) -> Float[Tensor, " batch"]:
    """Structural similarity (Wang et al. 2004) per picture, by torchmetrics: Gaussian window, on RGB."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    result = structural_similarity_index_measure(
        image.float(),
        other.float(),
        data_range=(-1.0, 1.0),
        kernel_size=kernel_size,
        sigma=1.5 if kernel_size == 11 else kernel_size / 11 * 1.5,
        gaussian_kernel=True,
        reduction="none",
    )
    if not isinstance(result, Tensor):
        raise AssertionError("one tensor was asked for")
    return result


def ms_ssim_scales(height: int, width: int, kernel_size: int = 11) -> int:
    """Scales that `ms_ssim` uses: five, or as many as leave the coarsest picture as large as the window."""
    scales = 0
    while scales < len(_MS_SSIM_WEIGHTS) and min(height, width) // 2**scales >= kernel_size:
        scales += 1
    if not scales:
        raise ValueError(
            f"MS-SSIM with a window of {kernel_size} takes pictures of at least {kernel_size} px,"
            f" got {height} x {width}"
        )
    return scales


def ms_ssim(
    image: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    kernel_size: int = 11,
) -> Float[Tensor, " batch"]:
    """Multi-scale structural similarity (Wang et al. 2003, eq. 7) per picture, on RGB.

    Convention: Gaussian window of `kernel_size` (sigma in proportion, 1.5 at 11), borders left out, 2x
    average pooling between scales, negative values to 0. Five scales where the picture carries them; a
    smaller one has `ms_ssim_scales` (3 at 64 px), whose weights are made to sum to 1 again. With five scales
    it agrees with torchmetrics (normalize="relu") to 3e-3. Say the size and the window with the number.
    """
    if image.shape != other.shape:
        raise ValueError(f"expected two pictures of one size, got {tuple(image.shape)}, {tuple(other.shape)}")
    scales = ms_ssim_scales(image.shape[-2], image.shape[-1], kernel_size)
    window = _gaussian(kernel_size, 1.5 * kernel_size / 11).to(image.device)
    weights = torch.tensor(_MS_SSIM_WEIGHTS[:scales])
    weights = weights / weights.sum() if scales < len(_MS_SSIM_WEIGHTS) else weights
    x, y = image.float(), other.float()
    result = torch.ones(len(x), device=x.device)
    for scale, weight in enumerate(weights.tolist()):
        luminance, contrast = _ssim_maps(x, y, window)
        value = contrast * luminance if scale == scales - 1 else contrast
        result = result * value.mean((1, 2, 3)).clamp(min=0) ** weight
        x, y = nn.functional.avg_pool2d(x, 2), nn.functional.avg_pool2d(y, 2)
    return result


def perceptual(
    features: Callable[..., Mapping[str, Tensor]],
    image: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
    layers: Iterable[str] = PERCEPTUAL_LAYERS,
) -> Float[Tensor, " batch"]:
    """Distance of maps with unit channel vectors, summed over channels and layers, mean over positions.

    LPIPS (Zhang et al. 2018, eq. 1) with all its learned weights 1 and SqueezeNet 1.0 instead of 1.1, divided
    by the number of layers: between 0 and 2. `features(image, layers)` gives the maps.
    """
    layers = tuple(layers)
    return perceptual_of_maps(unit_maps(features, image, layers), unit_maps(features, other, layers))


def unit_maps(
    features: Callable[..., Mapping[str, Tensor]],
    image: Float[Tensor, "batch 3 height width"],
    layers: Iterable[str] = PERCEPTUAL_LAYERS,
) -> list[Float[Tensor, "batch channels _ _"]]:
    """What `perceptual` compares of a picture, for one that is compared with many."""
    layers = tuple(layers)
    maps = features(image, layers)
    return [_unit(maps[name]) for name in layers]


def perceptual_of_maps(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Float[Tensor, " batch"]:
    """`perceptual` of two pictures from their `unit_maps`."""
    distances = [(a - b).square().sum(1).mean((1, 2)) for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(distances).mean(0)


def frechet_distance(a: Float[Tensor, "count features"], b: Float[Tensor, "count2 features"]) -> float:
    """Frechet distance of two feature sets as Gaussians (Heusel et al. 2017, eq. 6), in float64.

    |m_a - m_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2)), the last term from the eigenvalues of the
    symmetric C_a^(1/2) C_b C_a^(1/2), which stay real where a covariance is singular (fewer pictures than
    features).
    """
    mean_a, covariance_a = _moments(a)
    mean_b, covariance_b = _moments(b)
    values, vectors = torch.linalg.eigh(covariance_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(
    a: Float[Tensor, "count features"],
    b: Float[Tensor, "count2 features"],
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    normalise: bool = False,
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel (x.y / features + 1)^3: mean, deviation over subsets.

    The unbiased estimate of KID (Binkowski et al. 2018, section 4), so it can be slightly below zero. Where a
    set is smaller than `subset_size`, subsets have the size of the smaller set. normalise: divide both sets
    by the root mean square of all entries of `a`, the set compared with. Inception's features are about of
    that size; SqueezeNet's are hundreds of times larger, and the cube of their product tells nothing.
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"expected sets with the same features, got {a.shape[1]} and {b.shape[1]}")
    if normalise:
        scale = a.square().mean().sqrt()
        if not scale:
            raise ValueError("the features of the first set are all 0: they have no size to divide by")
        a, b = a / scale, b / scale
    size = min(subset_size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    in_a, in_b = a.new_zeros(subsets, len(a)), b.new_zeros(subsets, len(b))
    for row_a, row_b in zip(in_a, in_b, strict=True):
        row_a[torch.randperm(len(a), generator=generator)[:size].to(a.device)] = 1
        row_b[torch.randperm(len(b), generator=generator)[:size].to(b.device)] = 1
    within = [
        _subset_sums(x, x, chosen, chosen) - chosen @ (x.square().sum(1) / x.shape[1] + 1) ** 3
        for x, chosen in ((a, in_a), (b, in_b))
    ]
    values = (within[0] + within[1]) / (size * (size - 1)) - 2 * _subset_sums(a, b, in_a, in_b) / size**2
    return float(values.mean()), float(values.std(correction=0))


def structure_distance(
    content: Float[Tensor, "channels height width"], stylized: Float[Tensor, "channels height width"]
) -> float:
    """CFSD (Chung et al. 2024, StyleID, section 4.2) of two maps: does what was alike stay alike?

    Each position of a map is compared with all others by the cosine of their channels, softmax makes a
    distribution of a position's row; the distance is KL(content's row || stylized's row), mean over rows
    (published: their sum, which grows with the size). A number holds for one network, map and size.
    """
    if content.shape != stylized.shape:
        raise ValueError(f"expected maps of one size, got {tuple(content.shape)}, {tuple(stylized.shape)}")
    ours, theirs = (_unit(x[None])[0].flatten(1) for x in (stylized, content))
    total = 0.0
    # A picture of 512 px has rows enough for a matrix of a gigabyte: some rows at a time.
    for some, same in zip(ours.split(1024, 1), theirs.split(1024, 1), strict=True):
        log_ours, log_theirs = (some.T @ ours).log_softmax(1), (same.T @ theirs).log_softmax(1)
        total += float((log_theirs.exp() * (log_theirs - log_ours)).sum())
    return total / ours.shape[1]


def colour_histogram(
    image: Float[Tensor, "3 height width"], bins: int = 64, side: int = 150
) -> Float[Tensor, "3 bins bins"]:
    """The RGB-uv histogram of HistoGAN (Afifi et al. 2021, section 3.1), which sums to 1.

    For each channel, log-ratios to the other two from -3 to 3, each pixel spread by an inverse quadratic
    (0.02) and weighted by its intensity; pictures larger than `side` are sampled at nearest pixels.
    """
    height, width = image.shape[1:]
    if max(height, width) > side:
        image = nn.functional.interpolate(image[None], (min(height, side), min(width, side)))[0]
    colours = ((image.float() + 1) / 2).flatten(1)  # (3, pixels)
    intensity = colours.square().sum(0).add(1e-6).sqrt()
    logs = colours.add(1e-6).log()
    centres = torch.linspace(-3, 3, bins, device=image.device)
    planes = []
    for channel, (first, second) in enumerate(((1, 2), (0, 2), (0, 1))):
        u, v = (
            1 / (1 + ((logs[channel] - logs[other])[:, None] - centres).square() / 0.02**2)
            for other in (first, second)
        )
        planes.append((intensity[:, None] * u).T @ v)
    histogram = torch.stack(planes)
    return histogram / histogram.sum()


def histogram_distance(a: Float[Tensor, "3 bins bins"], b: Float[Tensor, "3 bins bins"]) -> float:
    """Hellinger distance of two histograms, from 0 (equal) to 1 (nothing in common)."""
    return float((a.sqrt() - b.sqrt()).square().sum().sqrt()) / 2**0.5


def seam_ratio(image: Float[Tensor, "batch 3 height width"], patch: int) -> Float[Tensor, " batch"]:
    """Squared steps from pixel to pixel across the borders of patches, over those everywhere else.

    1 is a picture without seams; above it the grid of patches shows. A picture of one flat colour has 1.
    """
    if patch < 2 or min(image.shape[2:]) <= patch:
        raise ValueError(f"expected patches of 2 px or more, two a side, got {patch} in {tuple(image.shape)}")
    on, off = image.new_full((len(image),), 1e-12), image.new_full((len(image),), 1e-12)
    for axis in (2, 3):
        energy = image.float().diff(dim=axis).square().mean((1, 5 - axis))  # (batch, steps)
        border = torch.arange(1, energy.shape[1] + 1, device=image.device) % patch == 0
        on, off = on + energy[:, border].mean(1), off + energy[:, ~border].mean(1)
    return on / off


def hatching(
    fake: Float[Tensor, "count 3 height width"], real: Float[Tensor, "count2 3 height width"]
) -> float:
    """The power of the finest diagonal detail, over that of real pictures of the same size.

    That is the corner of the Fourier plane where both frequencies are above 0.3 cycles a pixel, each picture
    under a Hann window. 1 is natural; above it there is a hatching or a checkerboard of two to three pixels,
    which convolutions leave and Frechet distances hardly see (Durall et al. 2020, section 3). Sides of 16 px
    or more.
    """
    height, width = fake.shape[2:]
    if min(height, width) < 16 or real.shape[2:] != fake.shape[2:]:
        raise ValueError(
            "expected two sets of pictures of one size, 16 px or more a side, "
            f"got {tuple(fake.shape)} and {tuple(real.shape)}"
        )
    frequencies = torch.fft.fftfreq(height).abs()[:, None], torch.fft.rfftfreq(width)
    corner = (torch.minimum(*torch.broadcast_tensors(*frequencies)) > 0.3).to(fake.device)
    window = torch.outer(torch.hann_window(height), torch.hann_window(width)).to(fake.device)

    def power(pictures: Tensor) -> float:
        parts = [torch.fft.rfft2(part.float() * window).abs().square() for part in pictures.split(256)]
        return sum(float(part[..., corner].double().sum()) for part in parts) / len(pictures)

    return power(fake) / power(real)


def precision_recall(
    real: Float[Tensor, "count features"], fake: Float[Tensor, "count2 features"], neighbours: int = 3
) -> tuple[float, float]:
    """Share of fakes within the manifold of the reals, and of reals within that of the fakes.

    Kynkäänniemi et al. 2019 (arXiv:1904.06991, equation 1): a set's manifold is the union of balls around its
    members that reach to each one's k-th nearest neighbour in the set.
    """
    real, fake = _checked(real), _checked(fake)
    if min(len(real), len(fake)) <= neighbours:
        raise ValueError(
            f"expected more than {neighbours} features in each set, got {len(real)}, {len(fake)}"
        )
    distances = torch.cdist(real, fake)

    def radii(features: Tensor) -> Tensor:
        # The nearest is the point itself.
        return torch.cdist(features, features).kthvalue(neighbours + 1, dim=1).values

    precision = (distances <= radii(real)[:, None]).any(0)
    recall = (distances <= radii(fake)[None]).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def identity(
    embed: Callable[[Tensor], Tensor],
    image: Float[Tensor, "batch 3 height width"],
    other: Float[Tensor, "batch 3 height width"],
) -> Float[Tensor, " batch"]:
    """Cosine of the angle between what a network makes of both: with ArcFace, 1 is the same face."""
    return nn.functional.cosine_similarity(embed(image).float(), embed(other).float(), dim=1)


def bootstrap(
    values: Float[Tensor, " count"], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of per-picture values with its percentile bootstrap interval (Efron 1979)."""
    values = values.detach().double().cpu().flatten()
    if not len(values):
        raise ValueError("no values to take the mean of")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[drawn].mean(1).sort().values
    tail = (1 - level) / 2
    low, high = (means[min(resamples - 1, int(q * resamples))] for q in (tail, 1 - tail))
    return Interval(float(values.mean()), float(low), float(high))


@torch.no_grad()
def pooled_features(
    network: nn.Module, images: Float[Tensor, "count 3 height width"], batch: int = 128
) -> Float[Tensor, "count features"]:
    """`network.pooled` of many pictures, a batch at a time."""
    pooled = network.pooled
    if not callable(pooled):
        raise TypeError(f"expected a network with pooled(image), got {type(network).__name__}")
    return torch.cat([pooled(part.contiguous()) for part in images.split(batch)])


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    features = _checked(features)
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _checked(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"expected features (count >= 2, features), got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("the features hold NaN or infinity: look at the pictures they were made from")
    return features.double()


def _subset_sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """For each subset (a row of zeros and ones over x, and over y) the sum of the kernel over its pairs.

    Every product of features is made once for all subsets, a thousand rows at a time.
    """
    sums = x.new_zeros(len(in_x))
    for rows, chosen in zip(x.split(1024), in_x.split(1024, dim=1), strict=True):
        kernel = (rows @ y.T / x.shape[1] + 1) ** 3
        sums += ((chosen @ kernel) * in_y).sum(1)
    return sums


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _gaussian(size: int, sigma: float) -> Tensor:
    offsets = torch.arange(size) - (size - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    return weights / weights.sum()


def _ssim_maps(x: Tensor, y: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance and contrast-structure maps of SSIM, the borders left out; the dynamic range is 2."""

    def blur(image: Tensor) -> Tensor:
        channels = image.shape[1]
        down = window.view(1, 1, -1, 1).expand(channels, -1, -1, -1)
        across = window.view(1, 1, 1, -1).expand(channels, -1, -1, -1)
        image = nn.functional.conv2d(image, down, groups=channels)
        return nn.functional.conv2d(image, across, groups=channels)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_x, mean_y = blur(x), blur(y)
    variance_x = (blur(x * x) - mean_x**2).clamp(min=0)
    variance_y = (blur(y * y) - mean_y**2).clamp(min=0)
    covariance = blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance, (2 * covariance + c2) / (variance_x + variance_y + c2)
