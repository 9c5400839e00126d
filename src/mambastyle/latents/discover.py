"""Finds directions: principal components of w (GANSpace) and boundaries between labels (InterFaceGAN).

Härkönen et al. 2020 (arXiv:2004.02546, section 2.1); Shen et al. 2020 (arXiv:2005.09635, sections 3.1 to
3.3). `pca_directions` and `boundary_direction` are tensors in, Direction out; `discover` draws the latents,
renders them and asks a classifier.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mambastyle.latents.directions import Direction, Directions

# InterFaceGAN takes the 2 % most confident of 500k on either side; we draw less and keep a larger part.
CONFIDENT = 0.2


class Boundary(NamedTuple):
    """A boundary's direction, and its balanced accuracy on samples that the fit did not see."""

    direction: Direction
    accuracy: float


def pca_directions(
    ws: Float[Tensor, "samples w_dim"], count: int, *, num_ws: int, layers: tuple[int, int] | None = None
) -> list[Direction]:
    """The first principal components of sampled w, `pc0` with the largest variance first.

    A strength of 1 is one standard deviation of w along the component. Exact eigenvectors of the covariance,
    in float64; the entry of largest magnitude is positive, so that the same latents give the same sign.
    """
    samples, w_dim = ws.shape
    if not 1 <= count <= min(w_dim, samples - 1):
        raise ValueError(
            f"expected 1 to {min(w_dim, samples - 1)} components of {samples} samples of {w_dim}, got {count}"
        )
    centred = ws.double() - ws.double().mean(0)
    variances, vectors = torch.linalg.eigh(centred.T @ centred / (samples - 1))
    total = float(variances.sum())
    found = []
    for i in range(count):
        variance, vector = float(variances[-1 - i]), vectors[:, -1 - i]
        vector = vector * vector[vector.abs().argmax()].sign()
        found.append(
            Direction.from_w(
                f"pc{i}",
                vector.float().cpu(),
                num_ws,
                layers=layers,
                scale=max(variance, 0.0) ** 0.5,
                description=f"principal component {i} of w, {variance / total:.1%} of its variance",
            )
        )
    return found


def boundary_direction(
    name: str,
    ws: Float[Tensor, "samples w_dim"],
    scores: Float[Tensor, " samples"],
    *,
    num_ws: int,
    confident: float = CONFIDENT,
    against: Sequence[Float[Tensor, " w_dim"]] = (),
    layers: tuple[int, int] | None = None,
    description: str = "",
    seed: int = 0,
) -> Boundary:
    """The normal of the hyperplane that separates w with positive scores from w with negative ones.

    scores: log odds of the attribute, such as a difference of logits. A linear support vector machine is
    fitted to the most confident samples, `confident` of all on either side at most and equally many on both;
    three quarters of them fit, a quarter measures `accuracy`. against: normals of other boundaries, whose
    span is projected out (conditional manipulation, eq. 5), so that moving along this direction leaves their
    distances as they were. A strength of 1 is the distance between the means of the two sides (of all
    samples) along the normal: it brings a typical picture without the attribute to a typical one with it.

    Raises ValueError when one side has less than ten samples, or when `against` spans the normal.
    """
    from sklearn.svm import LinearSVC  # 3.7 s to import, and an optional package

    if ws.ndim != 2 or scores.shape != ws.shape[:1]:
        raise ValueError(
            f"expected ws (samples, w_dim) and scores (samples,), got {tuple(ws.shape)} and"
            f" {tuple(scores.shape)}"
        )
    if not 0 < confident <= 0.5:
        raise ValueError(f"confident is a part of the samples on either side, 0 to 0.5, got {confident}")
    ws, scores = ws.double().cpu(), scores.double().cpu()
    positive, negative = scores > 0, scores < 0
    side = min(int(confident * len(ws)), int(positive.sum()), int(negative.sum()))
    if side < 10:
        raise ValueError(
            f"{name}: {int(positive.sum())} samples with and {int(negative.sum())} without the attribute"
            f" among {len(ws)}; expected 10 confident ones on either side: draw more samples"
        )
    order = scores.argsort()
    chosen = torch.cat([order[-side:], order[:side]])
    labels = torch.cat([torch.ones(side), torch.zeros(side)])
    shuffle = torch.randperm(2 * side, generator=torch.Generator().manual_seed(seed))
    chosen, labels = chosen[shuffle], labels[shuffle]
    fitted = (2 * side * 3) // 4
    centre = ws.mean(0)
    # One scale for all axes keeps the geometry of w and makes the machine's regularisation comparable.
    unit = (ws - centre).square().mean().sqrt()
    x = ((ws[chosen] - centre) / unit).numpy()
    machine = LinearSVC(C=1e-2, class_weight="balanced", dual="auto", max_iter=10_000, random_state=seed)
    machine.fit(x[:fitted], labels[:fitted].numpy())
    predicted = torch.from_numpy(machine.predict(x[fitted:]))
    right = (predicted == labels[fitted:]).double()
    recalls = [right[labels[fitted:] == value].mean() for value in labels[fitted:].unique()]
    normal = torch.from_numpy(machine.coef_[0]).double()
    normal = normal / normal.norm()
    if len(against):
        basis = torch.linalg.qr(torch.stack([other.double().cpu() for other in against], 1)).Q
        normal = normal - basis @ (basis.T @ normal)
        if normal.norm() < 1e-3:
            raise ValueError(f"{name}: the boundaries to keep span this one: keep fewer of them")
        normal = normal / normal.norm()
    distance = float((ws[positive] @ normal).mean() - (ws[negative] @ normal).mean())
    direction = Direction.from_w(
        name, normal.float(), num_ws, layers=layers, scale=abs(distance), description=description
    )
    return Boundary(direction, float(torch.stack(recalls).mean()))


def log_odds(logits: Float[Tensor, "samples labels"], label: int) -> Float[Tensor, " samples"]:
    """log p(label) - log(1 - p(label)) from logits: positive where the label beats all others together."""
    others = torch.cat([logits[:, :label], logits[:, label + 1 :]], 1)
    return logits[:, label] - others.logsumexp(1)


class Samples(NamedTuple):
    """Latents drawn from a generator, and what a classifier says of their pictures, by head."""

    ws: Float[Tensor, "samples w_dim"]
    logits: dict[str, Float[Tensor, "samples _"]]


@torch.no_grad()
def draw_samples(
    generator: Any,
    classifier: Any | None,
    heads: Sequence[str] = (),
    *,
    samples: int = 10_000,
    truncation_psi: float = 1.0,
    seed: int = 0,
    batch: int = 64,
    progress: bool = False,
) -> Samples:
    """Draw z, map it to w and, where there is a classifier, render and label.

    generator: models.stylegan2.Generator; classifier: anything with classify(image, heads) -> logits.
    """
    random = torch.Generator().manual_seed(seed)
    device = generator.mapping.w_avg.device
    ws, logits = [], {head: [] for head in heads}
    bar = tqdm(range(0, samples, batch), desc="label samples", disable=not progress)
    for start in bar:
        z = torch.randn(min(batch, samples - start), generator.config.z_dim, generator=random).to(device)
        latents = generator.mapping(z, truncation_psi=truncation_psi)
        ws.append(latents[:, 0].cpu())
        if classifier is None or not heads:
            continue
        image = generator.synthesis(latents).clamp(-1, 1)
        for head, values in classifier.classify(image, heads).items():
            logits[head].append(values.float().cpu())
    return Samples(torch.cat(ws), {head: torch.cat(values) for head, values in logits.items() if values})


def discover(
    generator: Any,
    classifier: Any | None = None,
    *,
    heads: Sequence[str] = ("gender", "status"),
    components: int = 10,
    samples: int = 10_000,
    truncation_psi: float = 1.0,
    conditional: Mapping[str, Iterable[str]] | None = None,
    seed: int = 0,
    batch: int = 64,
    progress: bool = False,
    generator_hash: str | None = None,
) -> Directions:
    """Boundaries of the classifier's heads (without a classifier none) and principal components, as one set.

    A head with two labels gives one direction with its name, towards the second label; one with more labels
    gives one per label, with the label's name, against all others. conditional: direction -> directions
    whose boundaries it must not cross (they are fitted first). components: how many principal components
    follow, 0 for none.

    Raises ValueError when the generator hardly ever shows a label (see `boundary_direction`), or for an
    unknown name in `conditional`.
    """
    heads = tuple(heads) if classifier is not None else ()
    drawn = draw_samples(
        generator,
        classifier,
        heads,
        samples=samples,
        truncation_psi=truncation_psi,
        seed=seed,
        batch=batch,
        progress=progress,
    )
    num_ws = generator.config.num_ws
    scores: dict[str, tuple[Tensor, str]] = {}
    for head, logits in drawn.logits.items():
        labels = classifier.labels(head) if classifier is not None else ()
        if len(labels) == 2:
            scores[head] = (log_odds(logits, 1), f"{labels[0]} to {labels[1]}")
        else:
            for i, label in enumerate(labels):
                scores[label] = (log_odds(logits, i), f"towards {label} ({head})")
    conditional = {name: tuple(others) for name, others in (conditional or {}).items()}
    for name, others in conditional.items():
        if unknown := [other for other in (name, *others) if other not in scores]:
            raise ValueError(f"no boundary named {unknown[0]!r} to keep or to condition: {list(scores)}")
    found: dict[str, Direction] = {}
    plain: dict[str, Tensor] = {}
    for name in sorted(scores, key=lambda name: name in conditional):
        values, description = scores[name]
        others = conditional.get(name, ())
        for other in others:
            if other not in plain:
                boundary = boundary_direction(other, drawn.ws, scores[other][0], num_ws=num_ws, seed=seed)
                plain[other] = boundary.direction.vector[0]
        boundary = boundary_direction(
            name, drawn.ws, values, num_ws=num_ws, against=[plain[other] for other in others], seed=seed
        )
        if not others:
            plain[name] = boundary.direction.vector[0]
        kept = f", keeping {', '.join(others)}" if others else ""
        text = f"{description}; boundary right for {boundary.accuracy:.0%} of held-out samples{kept}"
        vector = boundary.direction.vector[0]
        found[name] = Direction.from_w(name, vector, num_ws, scale=boundary.direction.scale, description=text)
    directions = [found[name] for name in scores]
    if components:
        directions += pca_directions(drawn.ws, components, num_ws=num_ws)
    return Directions(directions, generator=generator_hash)
