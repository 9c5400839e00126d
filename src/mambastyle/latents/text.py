"""Directions from a text, by what CLIP sees in the generator's pictures (StyleCLIP, Patashnik et al. 2021).

`optimise` moves d itself until the pictures change as the text does; `relevance` measures, for each style
channel, what CLIP sees change with it, which makes a direction of any text at once (section 6). CLIP comes as
a function: no network is in here.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mambastyle.latents.directions import Direction
from mambastyle.models.stylegan2 import EqualLinear, Generator, SynthesisBlock

Look = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch dim"]]
"""A picture's embedding, of unit length, with gradients."""
Read = Callable[[Iterable[str]], Float[Tensor, "texts dim"]]

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a good photo of {}",
    "a close-up photo of {}",
    "a cropped photo of {}",
    "a rendering of {}",
    "a painting of {}",
)
"""What a text is put into; the mean of all is less moved by wording (StyleCLIP takes eighty of these)."""


def text_offset(read: Read, text: str, neutral: str) -> Float[Tensor, " dim"]:
    """Where a text lies from a neutral one, of unit length. ValueError where both are the same."""
    sides = [
        F.normalize(read([t.format(words) for t in TEMPLATES]).mean(0), dim=0) for words in (text, neutral)
    ]
    offset = sides[0] - sides[1]
    if offset.norm() < 1e-4:
        raise ValueError(
            f"CLIP sees no difference between {text!r} and {neutral!r}: name another neutral text"
        )
    return F.normalize(offset, dim=0)


def optimise(
    name: str,
    offset: Float[Tensor, " dim"],
    generator: Generator,
    look: Look,
    *,
    steps: int = 100,
    batch: int = 2,
    learning_rate: float = 0.02,
    keep: float = 0.5,
    truncation_psi: float = 0.7,
    seed: int = 0,
    progress: bool = False,
) -> Direction:
    """The d in W+ along which pictures change as the text does, for any picture.

        loss = 1 - cos(CLIP(G(w + d)) - CLIP(G(w)), offset) + keep |d|^2 / |spread of w|^2

    Every step draws `batch` new w, so that d fits no picture in particular. A strength of 1 is the d found.
    """
    config = generator.config
    device = generator.mapping.w_avg.device
    random = torch.Generator().manual_seed(seed)
    spread = _mapped(generator, 1000, 1.0, random)[:, 0].std(0).square().mean()
    d = torch.zeros(config.num_ws, config.w_dim, device=device, requires_grad=True)
    # d = 0 moves nothing, and the angle of nothing has no gradient.
    with torch.no_grad():
        d.add_(1e-2 * spread.sqrt() * torch.randn(d.shape, generator=random).to(device))
    optimizer = torch.optim.Adam([d], learning_rate)
    for _ in tqdm(range(steps), desc=name, unit="step", disable=not progress):
        ws = _mapped(generator, batch, truncation_psi, random)
        with torch.no_grad():
            before = look(generator.synthesis(ws))
        moved = look(generator.synthesis(ws + d)) - before
        angle = 1 - F.cosine_similarity(moved, offset[None]).mean()
        loss = angle + keep * d.square().mean() / spread
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Direction(name, d.detach().float().cpu(), space="w+", description="CLIP-guided optimisation")


@torch.no_grad()
def relevance(
    generator: Generator,
    look: Look,
    *,
    samples: int = 100,
    batch: int = 8,
    strength: float = 5.0,
    truncation_psi: float = 0.7,
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, "channels dim"]:
    """StyleCLIP's table of a generator: the mean change of CLIP's embedding with each style channel.

    Each channel of each convolution is moved by `strength` of its standard deviations both ways in `samples`
    pictures; a row is the mean difference, of unit length. Costs 2 samples pictures per channel, of which the
    published generators have thousands: theirs are published (`fs3.npy`).
    """
    random = torch.Generator().manual_seed(seed)
    affines = style_affines(generator)
    w = _mapped(generator, 1000, 1.0, random)[:, 0]
    spreads = [affine(w).std(0) for affine in affines]
    ws = _mapped(generator, samples, truncation_psi, random)
    rows = []
    channels = [(layer, channel) for layer, s in enumerate(spreads) for channel in range(len(s))]
    for layer, channel in tqdm(channels, desc="channels", disable=not progress):
        by = float(strength * spreads[layer][channel])
        total = torch.zeros(())
        for part in ws.split(batch):
            plus, minus = (
                look(_moved(generator, affines[layer], channel, sign * by, part)) for sign in (1, -1)
            )
            total = total + (plus - minus).sum(0)
        rows.append(total)
    return F.normalize(torch.stack(rows), dim=1)


def style_affines(generator: Generator) -> list[EqualLinear]:
    """What makes the styles of each convolution from w, in order; to_rgb has none here."""
    return [
        layer.affine
        for block in generator.synthesis.blocks
        if isinstance(block, SynthesisBlock)
        for layer in (block.conv0, block.conv1)
        if layer is not None
    ]


def _moved(generator: Generator, affine: EqualLinear, channel: int, by: float, ws: Tensor) -> Tensor:
    """Pictures with one style channel moved."""

    def move(module: object, inputs: object, styles: Tensor) -> Tensor:
        styles = styles.clone()
        styles[:, channel] += by
        return styles

    handle = affine.register_forward_hook(move)
    try:
        return generator.synthesis(ws)
    finally:
        handle.remove()


@torch.no_grad()
def _mapped(
    generator: Generator, count: int, psi: float, random: torch.Generator
) -> Float[Tensor, "count num_ws w_dim"]:
    z = torch.randn(count, generator.config.z_dim, generator=random)
    return generator.mapping(z.to(generator.mapping.w_avg.device), truncation_psi=psi)
