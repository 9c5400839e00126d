"""How well pictures are stylized: contents by styles, as in ArtFID and Mamba-ST, with two rows to compare.

What keeps the content and what takes the style pull against each other, so a method stands between the row
that does nothing (the content itself) and the row that keeps nothing (the style itself). Distances carry the
name of the network that they were made with: LPIPS, FID and ArtFID are printed for published weights alone.
"""

import csv
import io
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mambastyle import images, published
from mambastyle.api import Stylizer, load_stylizer
from mambastyle.data.packs import from_bytes, reader_of, to_bytes
from mambastyle.evaluation import metrics
from mambastyle.evaluation.judges import Judges
from mambastyle.evaluation.memory import peak_memory
from mambastyle.evaluation.table import Table
from mambastyle.features.inception import FIDInception
from mambastyle.features.lpips import LPIPS
from mambastyle.features.vgg import VGG19

COLUMNS = {
    "method": "method",
    "perceptual_squeeze": "perceptual to the content (SqueezeNet)",
    "fd_squeeze": "fd_squeeze to the styles",
    "product_squeeze": "(1 + perceptual)(1 + fd_squeeze)",
    "fd_small": "fd_small to the styles",
    "product_small": "(1 + perceptual)(1 + fd_small)",
    "lpips": "LPIPS",
    "art_fid": "FID to the styles (art)",
    "artfid": "ArtFID",
    "cfsd_squeeze": "CFSD (SqueezeNet)",
    "cfsd_vgg19": "CFSD (VGG-19)",
    "histogram": "colour histogram distance to the style",
    "seam": "patch-seam ratio",
    "milliseconds": "ms per picture",
    "peak_megabytes": "peak MB",
}
# The map of the self-similarities: fire3 has the stride of relu3_1 in VGG-19. Their cost grows with the
# fourth power of the side.
_STRUCTURE, _STRUCTURE_VGG, STRUCTURE_SIZE = "fire3", "relu3_1", 256
_PATCH = 8
BORDER = 4
"""Pixels that are cut at each side of the pairs' pictures before they are scaled: half a block of JPEG."""
NOTHING, EVERYTHING = "the content, not stylized", "the style itself"


@dataclass(frozen=True)
class Pairs:
    """Contents and styles in [-1, 1], all of one size, and which content goes with which style."""

    contents: Float[Tensor, "contents 3 size size"]
    styles: Float[Tensor, "styles 3 size size"]
    pairs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class PublishedJudges:
    """Networks with published weights, where the user has the files; what is absent is left out."""

    lpips: LPIPS | None = None
    art_inception: FIDInception | None = None
    vgg19: VGG19 | None = None

    @classmethod
    def load(
        cls, lpips: str | Path | None, art_inception: str | Path | None, vgg19: str | Path | None
    ) -> "PublishedJudges":
        """From the files: LPIPS (of the package `lpips`, whole), ArtFID's Inception, torchvision's VGG-19."""

        def read(path: str | Path | None, kind: str, network: type) -> Any:
            if path is None:
                return None
            found = published.load(path, kind=kind)
            if not isinstance(found, network):
                raise published.PublishedError(f"{path} is not of the kind {kind}")
            return found

        return cls(
            read(lpips, "lpips-alex", LPIPS),
            read(art_inception, "fid-inception", FIDInception),
            read(vgg19, "vgg19", VGG19),
        )


def load_pairs(path: str | Path, *, size: int = 512, count: int | None = None, seed: int = 0) -> Pairs:
    """A zip or folder with pairs.csv (content, style). `count`: so many pairs, drawn once by `seed`.

    Pictures are cropped to their middle square, less BORDER pixels a side, and resized. The pairs are JPEG
    files, whose blocks of 8 px would count as seams of the patches (ratio 1.25 and 1.27 over the contents and
    styles of Mamba-ST's pairs); one block less over the whole side, and their borders fall everywhere alike.
    """
    path = Path(path)
    if not (path.is_dir() or (path.is_file() and zipfile.is_zipfile(path))):
        raise ValueError(f"no pairs at {path}: expected a zip or a folder with pairs.csv")
    with reader_of(path) as read:
        return _load_pairs(path, read, size, count, seed)


def _load_pairs(path: Path, read: Callable[[str], bytes], size: int, count: int | None, seed: int) -> Pairs:
    rows = list(csv.DictReader(io.StringIO(read("pairs.csv").decode())))
    if not rows or not {"content", "style"} <= rows[0].keys():
        raise ValueError(f"{path}: pairs.csv has no rows with the columns content and style")
    if count is not None and count < len(rows):
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
        rows = [rows[i] for i in sorted(chosen.tolist())]
    loaded, numbers = [], []
    for column in ("content", "style"):
        names = list(dict.fromkeys(row[column] for row in rows))
        squares = [_without_border(images.center_crop_square(images.read(read(name)))) for name in names]
        loaded.append(torch.stack([images.resize(square, size, size) for square in squares]))
        numbers.append({name: number for number, name in enumerate(names)})
    pairs = tuple((numbers[0][row["content"]], numbers[1][row["style"]]) for row in rows)
    return Pairs(loaded[0], loaded[1], pairs)


def compare(
    methods: Mapping[str, Stylizer],
    pairs: Pairs,
    judges: Judges,
    extra: PublishedJudges | None = None,
    *,
    data: str = "pairs",
    progress: Callable[[], Any] = lambda: None,
) -> Table:
    """The style-transfer table: the content itself, the style itself, then a row per method.

    progress is called after every picture that was measured.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} pairs: expected two or more, a Frechet distance needs a set")
    judged = _Judged(pairs, judges, extra or PublishedJudges())
    table = Table(
        f"Style transfer: {len(pairs)} {data} of {len(pairs.contents)} contents and {len(pairs.styles)} "
        f"styles, {pairs.contents.shape[-1]} px",
        COLUMNS,
        notes=_NOTES,
    )
    unchanged = (judged.contents[content] for content, _ in pairs.pairs)
    table.rows.append({"method": NOTHING} | judged.row(unchanged, progress))
    replaced = (judged.styles[style] for _, style in pairs.pairs)
    table.rows.append({"method": EVERYTHING} | judged.row(replaced, progress))
    for name, stylizer in methods.items():
        made = _Timed(stylizer, pairs)
        stylized = (judged.facts(picture) for picture in made)
        row = judged.row(stylized, progress, patch=stylizer.network.config.patch)
        table.rows.append({"method": name} | row | made.cost())
    found = {key for row in table.rows for key in row}
    table.columns = {key: heading for key, heading in COLUMNS.items() if key in found}
    return table


def run(
    models: Mapping[str, str | Path],
    pack: str | Path,
    *,
    size: int = 512,
    count: int | None = None,
    judges: Judges | None = None,
    extra: PublishedJudges | None = None,
    device: Any = None,
    progress: Callable[[int], Callable[[], Any]] | None = None,
) -> Table:
    """The style-transfer table for models on disk (name -> preset, checkpoint or folder).

    progress, given the number of pictures to come, makes what is called after each.
    """
    methods = {name: load_stylizer(model, device=device) for name, model in models.items()}
    pairs = load_pairs(pack, size=size, count=count)
    judges = Judges.found() if judges is None else judges
    advance = progress(len(pairs) * (len(methods) + 2)) if progress else lambda: None
    return compare(methods, pairs, judges, extra, data=f"pairs of {Path(pack).stem}", progress=advance)


class _Timed:
    """The stylized pictures of all pairs in order, 8 bits deep as a PNG holds them, and what they cost."""

    def __init__(self, stylizer: Stylizer, pairs: Pairs) -> None:
        self.stylizer, self.pairs = stylizer, pairs
        self.seconds, self.peak = 0.0, 0

    def __iter__(self) -> Any:
        # Compiling and allocating cost once, and so does a style.
        self.stylizer.stylize(self.pairs.contents[0], self.pairs.styles[0])
        # All pictures have one size. Measured apart from the times: for it the process returns freed memory.
        with peak_memory(self.stylizer.device) as peak:
            self.stylizer.stylize(self.pairs.contents[0], self.pairs.styles[0])
        self.peak = peak.bytes or 0
        for content, style in self.pairs.pairs:
            photo, painting = self.pairs.contents[content], self.pairs.styles[style]
            self.stylizer.style_code(painting)
            started = time.perf_counter()
            picture = self.stylizer.stylize(photo, painting, output="tensor")
            self.seconds += time.perf_counter() - started
            yield from_bytes(to_bytes(picture))

    def cost(self) -> dict[str, float]:
        """Of one picture; nothing where memory cannot be measured."""
        found = {"milliseconds": 1000 * self.seconds / len(self.pairs)}
        return found | ({"peak_megabytes": self.peak / 1e6} if self.peak else {})


@dataclass(frozen=True, eq=False)
class _Facts:
    """What the judges need to know of one picture."""

    picture: Float[Tensor, "3 size size"]
    histogram: Tensor
    structures: dict[str, Tensor]
    pooled: dict[str, Tensor]


class _Judged:
    """What the judges say of the contents and styles, kept, and of a method's pictures, one by one."""

    def __init__(self, pairs: Pairs, judges: Judges, extra: PublishedJudges) -> None:
        self.pairs, self.judges, self.extra = pairs, judges, extra
        self.contents = [self.facts(content) for content in pairs.contents]
        self.styles = [self.facts(style) for style in pairs.styles]
        # Pairs come content by content, and the maps of all would take gigabytes.
        self._maps_of: tuple[int, list[Tensor]] = (-1, [])
        self._unchanged = [self._content_kept(facts, number) for number, facts in enumerate(self.contents)]

    @torch.inference_mode()
    def facts(self, picture: Float[Tensor, "3 size size"]) -> _Facts:
        histogram = metrics.colour_histogram(picture)
        return _Facts(picture, histogram, self._structures(picture), self._set_features(picture[None]))

    @torch.inference_mode()
    def row(
        self, stylized: Iterable[_Facts], progress: Callable[[], Any], patch: int = _PATCH
    ) -> dict[str, Any]:
        """Means over the pairs, Frechet distances of the sets; `stylized` in the order of the pairs."""
        values: dict[str, list[float]] = {}
        features: dict[str, list[Tensor]] = {}
        for (content, style), facts in zip(self.pairs.pairs, stylized, strict=True):
            found = {
                "histogram": metrics.histogram_distance(facts.histogram, self.styles[style].histogram),
                "seam": float(metrics.seam_ratio(facts.picture[None], patch)),
            }
            unchanged = facts is self.contents[content]
            found |= self._unchanged[content] if unchanged else self._content_kept(facts, content)
            for name, value in found.items():
                values.setdefault(name, []).append(value)
            for name, pooled in facts.pooled.items():
                features.setdefault(name, []).append(pooled)
            progress()
        row: dict[str, Any] = {name: sum(all_) / len(all_) for name, all_ in values.items()}
        for name in ("perceptual_squeeze", "cfsd_squeeze", "histogram", "seam", "lpips", "cfsd_vgg19"):
            if name in values:
                interval = metrics.bootstrap(torch.tensor(values[name]))
                row[f"{name}_interval"] = [interval.low, interval.high]
        for name, pooled in features.items():
            theirs = torch.cat([self.styles[style].pooled[name] for _, style in self.pairs.pairs])
            row[name] = metrics.frechet_distance(theirs, torch.cat(pooled))
        for product, near, far in (
            ("product_squeeze", "perceptual_squeeze", "fd_squeeze"),
            ("product_small", "perceptual_squeeze", "fd_small"),
            ("artfid", "lpips", "art_fid"),
        ):
            if near in row and far in row:
                row[product] = (1 + row[near]) * (1 + row[far])
        return row

    @torch.inference_mode()
    def _content_kept(self, facts: _Facts, content: int) -> dict[str, float]:
        """How far a picture is from a content."""
        original, picture = self.contents[content], facts.picture[None]
        values = {
            name: metrics.structure_distance(original.structures[name], structure)
            for name, structure in facts.structures.items()
        }
        if (squeeze := self.judges.squeeze) is not None:
            if self._maps_of[0] != content:
                self._maps_of = content, metrics.unit_maps(squeeze, original.picture[None])
            distance = metrics.perceptual_of_maps(metrics.unit_maps(squeeze, picture), self._maps_of[1])
            values["perceptual_squeeze"] = float(distance)
        if self.extra.lpips is not None:
            values["lpips"] = float(self.extra.lpips(picture, original.picture[None]))
        return values

    @torch.inference_mode()
    def _set_features(self, pictures: Tensor) -> dict[str, Tensor]:
        features = {f"fd_{name}": pooled for name, pooled in self.judges.pooled(pictures).items()}
        if self.extra.art_inception is not None:
            inception = self.extra.art_inception
            features["art_fid"] = torch.cat([inception(part, resize=False) for part in pictures.split(8)])
        return features

    @torch.inference_mode()
    def _structures(self, picture: Tensor) -> dict[str, Tensor]:
        """The maps whose self-similarities are compared, of the picture at STRUCTURE_SIZE."""
        small = images.resize(picture, STRUCTURE_SIZE, STRUCTURE_SIZE)[None]
        maps = {}
        if self.judges.squeeze is not None:
            maps["cfsd_squeeze"] = self.judges.squeeze(small, (_STRUCTURE,))[_STRUCTURE][0]
        if self.extra.vgg19 is not None:
            maps["cfsd_vgg19"] = self.extra.vgg19(small, (_STRUCTURE_VGG,))[_STRUCTURE_VGG][0]
        return maps


def _without_border(square: Tensor) -> Tensor:
    return square[:, BORDER:-BORDER, BORDER:-BORDER] if square.shape[1] >= 64 else square


_NOTES: Sequence[str] = (
    "perceptual, fd_squeeze, CFSD (SqueezeNet): SqueezeNet 1.0 (ImageNet), neither LPIPS nor FID; fd_small:"
    " our own network; the products have ArtFID's form with these networks, and are no ArtFID.",
    f"CFSD: mean over positions, pictures scaled to {STRUCTURE_SIZE} px.",
    "colour histogram distance: Hellinger distance of HistoGAN's RGB-uv histograms.",
    f"patch-seam ratio: on the grid of the model's patches ({_PATCH} px in the first two rows); 1 is none.",
    "ms and peak MB per picture: without the style's own part, which is computed once for each style.",
    f"the pairs' pictures lose {BORDER} px a side and are scaled back, which spreads JPEG's blocks over all"
    " positions; stylized ones are compared with 8 bits, uncompressed.",
)
