"""How well pictures are inverted: the protocol of the paper's table 1, left half, for any set and method.

A method is a model with one of its ways to invert (api.METHODS): encoder, W+ latents alone, optimisation,
pivotal tuning, the average. Perceptual and Frechet distances carry the name of the network that made them.
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mambastyle import checkpoints, images
from mambastyle.api import Inverted, Inverter, load_inverter
from mambastyle.api.methods import MethodName, optimises
from mambastyle.compute import Precision
from mambastyle.data.packs import from_bytes, open_pack
from mambastyle.evaluation import metrics
from mambastyle.evaluation.cost import Cost, cost_of
from mambastyle.evaluation.judges import HEADINGS, Judges
from mambastyle.evaluation.table import Table
from mambastyle.losses.reconstruction import at_size

COLUMNS = {
    "method": "method",
    "count": "N",
    "lpips": HEADINGS["lpips"],
    "perceptual_squeeze": HEADINGS["perceptual_squeeze"],
    "l2": "L2",
    "fd_inception": HEADINGS["fd_inception"],
    "fd_squeeze": HEADINGS["fd_squeeze"],
    "kd_squeeze": HEADINGS["kd_squeeze"],
    "fd_small": HEADINGS["fd_small"],
    "ms_ssim": "MS-SSIM",
    "ms_ssim_256": "MS-SSIM at 256",
    "identity": HEADINGS["identity"],
    "parameters": "M parameters",
    "gmacs": "GMACs",
    "milliseconds": "ms per picture",
}
"""The paper's order: LPIPS, L2, FID, MS-SSIM, then what it costs."""
CASES = ("best", "median", "worst")


@dataclasses.dataclass
class Method:
    """A model and a way to invert with it, on pictures in [-1, 1] of the generator's size.

    use_feature: False renders an encoder's latents alone. count: only the first so many pictures of a set,
    for methods that take seconds a picture. keep_in: a folder for what such methods find, a file a picture,
    so that an interrupted evaluation goes on where it was.
    """

    name: str
    inverter: Inverter
    how: MethodName = "encoder"
    steps: int | None = None
    seed: int = 0
    use_feature: bool = True
    count: int | None = None
    keep_in: Path | None = None

    @property
    def optimises(self) -> bool:
        """Whether it takes seconds a picture, and not one pass."""
        return optimises(self.how)

    def invert(
        self,
        pictures: Float[Tensor, "batch 3 height width"],
        progress: Callable[[float], object] | None = None,
    ) -> Inverted:
        """The latents of a batch, and what else its rendering takes; progress: as of `Inverter.invert`."""
        found = self.inverter.invert(
            pictures, method=self.how, steps=self.steps, seed=self.seed, progress=progress
        )
        return found if self.use_feature else dataclasses.replace(found, feature=None)

    def render(
        self, inverted: Inverted, offset: Float[Tensor, "num_ws w_dim"] | None = None
    ) -> Float[Tensor, "batch 3 height width"]:
        """The pictures of an inversion, all moved by `offset` in W+; clamped to [-1, 1], on the CPU."""
        if offset is not None:
            inverted = dataclasses.replace(inverted, offset=inverted.offset + offset.cpu())
        return self.inverter.render(inverted, output="tensor")

    def cost(self) -> Cost:
        """Parameters with the generator, and multiply-accumulates by the paper's rule.

        As the paper counts: a method without an encoder has the generator's, one pass of it.
        """
        modules = cost_of(self.inverter.model.config, self.inverter.generator.config).modules
        alone = self.how not in ("encoder", "encoder+optimise")
        chosen = (cost for name, cost in modules.items() if not alone or name.startswith("generator"))
        return sum(chosen, Cost())


class Found(NamedTuple):
    """A set inverted by a method: batches of inversions, the pictures they give, and the seconds it took."""

    inverted: list[Inverted]
    rendered: Float[Tensor, "count 3 height width"]
    seconds: float


def invert_all(
    method: Method,
    pictures: Float[Tensor, "count 3 height width"],
    batch: int = 32,
    *,
    keep: bool = True,
    progress: bool = False,
) -> Found:
    """Invert and render a set, or its first `method.count` pictures, batch by batch, after a warm-up.

    The warm-up (compiling, allocating) is one picture for an encoder; an optimiser runs long enough to need
    none, and its seconds count those of pictures that an earlier run found (`Method.keep_in`). keep: False
    lets the inversions go, which for tuned generators are megabytes each.
    """
    pictures = pictures[: method.count]
    if method.how == "encoder":
        method.render(method.invert(pictures[:1]))
    found, rendered, earlier = [], [], 0.0
    # Parts of pictures count: one that is optimised takes seconds.
    shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]"
    bar = tqdm(total=len(pictures), desc=method.name, disable=not progress, leave=False, bar_format=shown)
    _synchronise(pictures)
    started = time.perf_counter()
    with bar:
        for part in pictures.split(batch):
            if method.keep_in is not None and method.optimises:
                inversions, seconds = _kept(method, method.keep_in, part, bar.update)
                earlier += seconds
            else:
                inversions = [method.invert(part, bar.update)]
            rendered += [method.render(inverted) for inverted in inversions]
            found += inversions if keep else []
    _synchronise(pictures)
    return Found(found, torch.cat(rendered), earlier + time.perf_counter() - started)


def _kept(
    method: Method,
    folder: Path,
    pictures: Float[Tensor, "batch 3 height width"],
    progress: Callable[[float], object],
) -> tuple[list[Inverted], float]:
    """Each picture's inversion, read or else found and written, and the seconds that those read had taken."""
    judge, _ = method.inverter.judge
    how = f"{method.inverter.model_hash} {method.how} {method.steps} {method.seed} {judge} ".encode()
    paths = [
        folder / f"{hashlib.sha256(how + picture.cpu().numpy().tobytes()).hexdigest()[:32]}.safetensors"
        for picture in pictures
    ]
    missing = [index for index, path in enumerate(paths) if not path.exists()]
    earlier = sum(
        checkpoints.read_header(path).card["seconds"]
        for index, path in enumerate(paths)
        if index not in missing
    )
    progress(len(paths) - len(missing))
    if missing:
        started = time.perf_counter()
        inverted = method.invert(pictures[missing], progress)
        _synchronise(pictures)
        card = {
            "method": method.how,
            "steps": method.steps,
            "seed": method.seed,
            "judge": judge,
            "seconds": (time.perf_counter() - started) / len(missing),
        }
        for one, index in zip(inverted, missing, strict=True):
            method.inverter.save_inversion(paths[index], one, card=card)
    return [method.inverter.load_inversion(path) for path in paths], earlier


@torch.no_grad()
def pair_values(
    originals: Float[Tensor, "count 3 height width"],
    rendered: Float[Tensor, "count 3 height width"],
    judges: Judges,
    batch: int = 64,
) -> dict[str, Float[Tensor, " count"]]:
    """Every pair metric, a value per picture."""
    parts = []
    for a, b in zip(originals.split(batch), rendered.split(batch), strict=True):
        found = {"l2": metrics.l2(a, b), "psnr": metrics.psnr(a, b)}
        smallest = min(a.shape[-2:])
        if smallest >= 11:
            found |= {"ssim": metrics.ssim(a, b), "ms_ssim": metrics.ms_ssim(a, b)}
        if smallest > 256:
            found["ms_ssim_256"] = metrics.ms_ssim(at_size(a, 256), at_size(b, 256))
        parts.append(found | judges.pair_distances(a, b))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summary(values: Mapping[str, Float[Tensor, " count"]]) -> dict[str, Any]:
    """Means with their 95 % bootstrap intervals."""
    row: dict[str, Any] = {}
    for name, value in values.items():
        interval = metrics.bootstrap(value)
        row |= {name: interval.mean, f"{name}_interval": [interval.low, interval.high]}
    return row


def distances(
    originals: Float[Tensor, "count 3 height width"],
    rendered: Float[Tensor, "count 3 height width"],
    judges: Judges,
) -> dict[str, Any]:
    """Means of the pair metrics with their intervals, Frechet and kernel distances."""
    row = summary(pair_values(originals, rendered, judges))
    if len(originals) > 1:
        row |= judges.set_distances(judges.pooled(originals), judges.pooled(rendered))
    return row


def compare(
    originals: Float[Tensor, "count 3 height width"],
    methods: Sequence[Method],
    judges: Judges,
    *,
    data: str = "held-out pictures",
    batch: int = 32,
    names: Sequence[str] | None = None,
    found: Mapping[str, Found] | None = None,
    progress: bool = False,
) -> Table:
    """The inversion table: one row per method, all on the same pictures in [-1, 1].

    names: one per picture, for the figure of the best, median and worst cases of the first method. found:
    what `invert_all` gave already, by a method's name.
    """
    count, _, height, width = originals.shape
    table = Table(
        f"Inversion of {count} {data}, {height} x {width} px",
        {key: heading for key, heading in COLUMNS.items() if judges.measures(key)},
        notes=_notes(height, width, methods),
    )
    if height <= 256:
        del table.columns["ms_ssim_256"]
    shown: dict[str, Tensor] = {}
    ranking: Tensor | None = None
    for method in methods:
        part = originals[: method.count]
        done = (found or {}).get(method.name)
        if done is None:
            done = invert_all(method, part, batch, keep=False, progress=progress)
        rendered, seconds = done.rendered, done.seconds
        values = pair_values(part, rendered, judges)
        if ranking is None:
            ranked_by = next(key for key in ("lpips", "perceptual_squeeze", "l2") if key in values)
            ranking = values[ranked_by]
        cost = method.cost()
        row = {"method": method.name, "count": len(part), "seed": method.seed, **summary(values)}
        if len(part) > 1:
            row |= judges.set_distances(judges.pooled(part), judges.pooled(rendered))
        row |= {"parameters": cost.parameters / 1e6, "gmacs": cost.paper_macs / 1e9}
        table.rows.append(row | {"milliseconds": 1000 * seconds / len(part)})
        if len(part) == count:
            shown[method.name] = rendered
    if shown and ranking is not None:
        table.figures["cases"] = cases(originals, shown, ranking, names)
    return table


def cases(
    originals: Float[Tensor, "count 3 height width"],
    rendered: Mapping[str, Float[Tensor, "count 3 height width"]],
    ranking: Float[Tensor, " count"],
    names: Sequence[str] | None = None,
    each: int = 2,
) -> Float[Tensor, "3 sheet_height sheet_width"]:
    """The best, median and worst pictures by a distance (smallest first): a row each, a column per method."""
    order = ranking[: len(originals)].argsort().tolist()
    each = min(each, max(1, len(order) // 3))
    middle = (len(order) - each) // 2
    starts = {"best": 0, "median": middle, "worst": len(order) - each}
    chosen = [(case, index) for case in CASES for index in order[starts[case] : starts[case] + each]]
    tiles = [picture[index] for _, index in chosen for picture in (originals, *rendered.values())]
    labels = [
        f"{case} {float(ranking[index]):.3g}" + ("" if names is None else f" {names[index]}")
        for case, index in chosen
    ]
    columns = ["original", *rendered]
    scale = max(1, 128 // originals.shape[-1])
    return images.grid(tiles, len(columns), column_labels=columns, row_labels=labels, scale=scale)


def evaluate(inverter: Inverter, pictures: Sequence[Any], judges: Judges | None = None) -> dict[str, float]:
    """Numbers of one model on any pictures: what `mambastyle evaluate inversion` prints.

    pictures: anything `Inverter.invert` takes, in a list; they are compared at the size that is rendered
    (cropped to their middle square, resized). Keys: those of `distances` without the intervals,
    `milliseconds`, `count`. Metrics whose network is absent are left out: without MAMBASTYLE_SQUEEZENET
    those named squeeze.
    """
    judges = Judges.found() if judges is None else judges
    side = inverter.resolution
    squares = [images.center_crop_square(images.read(picture, at_least=side)) for picture in pictures]
    originals = torch.stack([images.resize(square, side, side) for square in squares])
    inverter.render(inverter.invert(squares[:1]), output="tensor")
    started = time.perf_counter()
    rendered = inverter.render(inverter.invert(squares), output="tensor")
    seconds = time.perf_counter() - started
    values = distances(originals, rendered, judges)
    numbers = {name: value for name, value in values.items() if isinstance(value, float)}
    return numbers | {"milliseconds": 1000 * seconds / len(originals), "count": float(len(originals))}


def load_faces(
    pack: str | Path, resolution: int, select: Mapping[str, str] | None = None
) -> tuple[Float[Tensor, "count 3 resolution resolution"], list[dict[str, str]]]:
    """The pictures of a pack in [-1, 1] with their rows; by default its test split."""
    chosen = open_pack(pack).select(**({"split": "test"} if select is None else select))
    return from_bytes(chosen.load(resolution, progress=False)), list(chosen.rows)


def load_methods(
    models: Mapping[str, str | Path],
    *,
    w_plus_only: Iterable[str] = (),
    others: Iterable[tuple[MethodName, int | None]] = (),
    others_count: int | None = None,
    keep_in: str | Path | None = None,
    seed: int = 0,
    device: Any = None,
    precision: Precision = "fp32",
) -> list[Method]:
    """The encoders of models on disk, and other ways to invert with the first of them.

    models: name -> preset or folder. w_plus_only: names whose feature is not rendered. others: ways and
    their steps (None for each one's own number), on the first `others_count` pictures. keep_in: a folder for
    what they find, which a later run takes from there. precision: of what does not optimise.
    """
    alone = set(w_plus_only)
    methods = [
        Method(name, load_inverter(model, device=device, precision=precision), use_feature=name not in alone)
        for name, model in models.items()
    ]
    for how, steps in others:
        name = TITLES[how] + ("" if steps is None else f", {steps} steps")
        count = None if how == "mean-w" else others_count
        kept = None if keep_in is None else Path(keep_in)
        methods.append(Method(name, methods[0].inverter, how, steps, seed, count=count, keep_in=kept))
    return methods


TITLES: Mapping[MethodName, str] = {
    "encoder": "encoder",
    "optimise": "W+ optimisation",
    "pti": "PTI",
    "encoder+optimise": "encoder + optimisation",
    "mean-w": "mean w",
}
"""What the ways to invert are called in tables."""


def run(
    models: Mapping[str, str | Path],
    pack: str | Path,
    *,
    w_plus_only: Iterable[str] = (),
    others: Iterable[tuple[MethodName, int | None]] = (),
    others_count: int | None = None,
    keep_in: str | Path | None = None,
    seed: int = 0,
    count: int | None = None,
    batch: int = 32,
    judges: Judges | None = None,
    device: Any = None,
    precision: Precision = "fp32",
    progress: bool = False,
) -> Table:
    """The inversion table for models on disk (see `load_methods`) on the test split of a pack.

    count: the first so many pictures, all by default.
    """
    methods = load_methods(
        models,
        w_plus_only=w_plus_only,
        others=others,
        others_count=others_count,
        keep_in=keep_in,
        seed=seed,
        device=device,
        precision=precision,
    )
    inverter = methods[0].inverter
    judges = (Judges.found() if judges is None else judges).to(inverter.device)
    faces, rows = load_faces(pack, inverter.resolution)
    names = [Path(row["file"]).stem for row in rows[:count]]
    data = f"test pictures of {Path(pack).stem}"
    return compare(faces[:count], methods, judges, data=data, batch=batch, names=names, progress=progress)


def _notes(height: int, width: int, methods: Sequence[Method]) -> list[str]:
    notes = [
        "L2: mean squared difference on [-1, 1] (on [0, 1] it is a quarter). In brackets: 95 % intervals of"
        " the mean, bootstrap over the pictures."
    ]
    if min(height, width) >= 11:
        scales = metrics.ms_ssim_scales(height, width)
        notes.append(f"MS-SSIM: RGB, Gaussian window 11, {scales} scales (more do not fit), at this size.")
    notes += [
        "perceptual, fd_squeeze: SqueezeNet 1.0 (ImageNet), neither LPIPS nor FID; fd_small: our own"
        " network.",
        "fd falls with N, so compare rows of one N; kd does not. kd's features are divided by their root mean"
        " square.",
        "M parameters, GMACs (the paper's rule): for one picture, with the generator; for methods without an"
        " encoder one pass of the generator alone.",
        "ms per picture: inverting and rendering, after a warm-up, on the machine of the run.",
    ]
    if methods[0].inverter.precision != "fp32":
        notes.append("Products and convolutions in bfloat16, but for methods that optimise.")
    optimising = [method for method in methods if method.optimises]
    if optimising:
        judge, _ = optimising[0].inverter.judge
        notes.append(
            f"Methods that optimise do so on {judge}: they are measured by what they were trained on."
        )
    return notes


def _synchronise(pictures: Tensor) -> None:
    if pictures.device.type != "cpu":
        torch.accelerator.synchronize(pictures.device)
