"""What a model costs: parameters, multiply-accumulates by two counters, state updates, memory.

The networks run once on tensors without memory, so the full sizes are counted in seconds.

| counter | counts |
|---|---|
| the paper's | convolutions and linear layers |
| all | also einsums, products of two activations, StyleGAN2's filters, the projection of the scan's steps |

A state update is one entry of one state moved one step, `h = exp(d A) h + d B u`: they stand apart, because
what one costs depends on the kernel.
"""

import dataclasses
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from mambastyle import checkpoints
from mambastyle.models.mamba_st import MambaST, MambaSTConfig
from mambastyle.models.mambastyle import CONFIGS, MambaStyle, MambaStyleConfig, variant_of
from mambastyle.models.samam import SAMAM_PATCH4, SaMam, SaMamConfig
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.nn.s6 import S6
from mambastyle.nn.ss2d import SS2D
from mambastyle.nn.vss_block import VSSBlock
from mambastyle.ops.selective_scan.cpu_numba import scan_op as selective_scan_op
from mambastyle.ops.ss2d_scan.cpu_numba import scan_op as ss2d_scan_op
from mambastyle.presets import PRESETS

GENERATORS: Mapping[str, StyleGAN2Config] = {
    "faces1024": StyleGAN2Config(),
    "faces256": StyleGAN2Config(resolution=256),
    "cars512": StyleGAN2Config(resolution=512),
}
"""The published generator of each named size; that of a preset is read from its file."""

STYLE_TRANSFER: Mapping[str, MambaSTConfig | SaMamConfig] = {
    "mamba-st": MambaSTConfig(),
    "samam": SaMamConfig(),
    "samam-patch4": SAMAM_PATCH4,
}
NAMES = (*CONFIGS, *STYLE_TRANSFER)

# Tensors of the published Mamba-ST that nothing reads, and its positional code, computed and thrown away.
_MAMBA_ST_DEAD = 3_412_992
_MAMBA_ST_POSITION_CODE = 18 * 18 * 512 * 512
_STYLE_TRANSFER_SIZE = 256


@dataclasses.dataclass
class Cost:
    """The cost of a module for one picture; sums of these are the cost of a whole."""

    parameters: int = 0
    dead: int = 0
    """Parameters that the published module holds besides, and nothing reads."""
    paper_macs: int = 0
    macs: int = 0
    state_updates: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        fields = [field.name for field in dataclasses.fields(self)]
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in fields})


@dataclasses.dataclass(frozen=True)
class Report:
    """The cost of one model, module by module; inference of one picture in float32."""

    config: str
    variant: str
    picture: tuple[int, int]
    """Height and width of what goes in."""
    modules: dict[str, Cost]
    weight_bytes: int
    activation_bytes: int
    """The most that tensors hold at one time, less weights and the working memory of convolutions."""

    @property
    def total(self) -> Cost:
        return sum(self.modules.values(), Cost())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"total": dataclasses.asdict(self.total)}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the paper's table, ours beside it."""

    variant: str
    paper_millions: float
    paper_gmacs: float
    why: str


TABLE: Mapping[str, Row] = {
    row.variant: row
    for row in (
        Row("final", 104.56, 157.82, "equal; 2.63 M of it are dead tensors of the published blocks"),
        Row("no-fuser", 87.12, 110.17, "equal to 0.02 %: H goes straight into G"),
        Row("base", 89.47, 136.33, "GMACs equal, so the blocks are: the paper's parameters look misprinted"),
        Row("vit", 108.99, 179.35, "the block is not given; ours is pre-norm with an MLP of 4x, 0.1 % less"),
        Row("no-ss2d", 101.13, 153.30, "not defined in the paper; ours: the scan becomes the identity"),
        Row("no-le", 104.56, 157.82, "the network is Final's; trained without the edit loss"),
    )
}
"""Tables 1 and 3 of MambaStyle (faces, 1024 px), and in a line how ours compare."""


def cost(name: str, variant: str = "final") -> Report:
    """What the model of a name in `NAMES` costs, in a row of the ablation (MambaStyle alone has those).

    Raises ValueError for an unknown name or variant.
    """
    if name not in NAMES:
        near = checkpoints.nearest(name, NAMES)
        hint = f"did you mean {near!r}?" if near else f"choose among {', '.join(NAMES)}"
        raise ValueError(f"no config {name!r}: {hint}")
    if name in CONFIGS:
        return _mambastyle(name, variant)
    if variant != "final":
        raise ValueError(f"{name} has no variant {variant!r}: variants are rows of MambaStyle's ablation")
    return _style_transfer(name)


class Whole(nn.Module):
    """Encoder, fuser and generator, as they run for one edit."""

    def __init__(self, config: MambaStyleConfig, generator: StyleGAN2Config) -> None:
        super().__init__()
        model = MambaStyle(config)
        self.encoder, self.fuser = model.encoder, model.fuser
        self.generator = Generator(generator)

    def forward(self, image: Tensor, direction: Tensor) -> Tensor:
        encoded = self.encoder(image)
        feature = encoded.feature
        if self.fuser is not None and feature is not None:
            feature = self.fuser(feature, direction)
        return self.generator.synthesis(encoded.ws + direction, feature)


def _mambastyle(name: str, variant: str) -> Report:
    config = variant_of(CONFIGS[name], variant)
    return cost_of(config, _generator(name, config), name, variant)


def cost_of(
    config: MambaStyleConfig, generator: StyleGAN2Config, name: str = "", variant: str = ""
) -> Report:
    """What a model of any sizes costs together with its generator."""
    size = config.image_size
    # The device without memory.
    with torch.device("meta"):
        whole = Whole(config, generator).eval().requires_grad_(False)
        inputs = torch.empty(1, 3, size, size), torch.empty(1, config.num_ws, config.w_dim)
    modules, activations = _count(whole, inputs)
    return Report(name, variant, (size, size), modules, _weight_bytes(whole), activations)


def _generator(name: str, config: MambaStyleConfig) -> StyleGAN2Config:
    if name in GENERATORS:
        return GENERATORS[name]
    header = checkpoints.read_header(PRESETS[name].folder / "generator.safetensors")
    found = checkpoints.config_from_dict(StyleGAN2Config, header.config)
    return dataclasses.replace(found, feature_layer=config.feature_layer)


def _style_transfer(name: str) -> Report:
    config, size = STYLE_TRANSFER[name], _STYLE_TRANSFER_SIZE
    with torch.device("meta"):
        network = MambaST(config) if isinstance(config, MambaSTConfig) else SaMam(config)
        network.eval().requires_grad_(False)
        picture = torch.empty(1, 3, size, size)
    modules, activations = _count(network, (picture, picture))
    for module in modules.values():
        # These papers' counters see every product but not the scan's recurrence.
        module.paper_macs, module.dead = module.macs, 0
    if isinstance(config, MambaSTConfig):
        modules["(unused, as published)"] = Cost(dead=_MAMBA_ST_DEAD, paper_macs=_MAMBA_ST_POSITION_CODE)
    return Report(name, "final", (size, size), modules, _weight_bytes(network), activations)


def _weight_bytes(network: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in network.state_dict().values())


# ---- Counting


@torch.no_grad()
def _count(network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[dict[str, Cost], int]:
    """The cost of each module two levels down, in the order in which they run, and the activations' peak."""
    names = {module: name for name, module in network.named_modules()}
    costs: dict[str, Cost] = defaultdict(Cost)
    for module, name in names.items():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        costs[_row(name)].parameters += own
        if isinstance(module, VSSBlock):
            costs[_row(name)].dead += _dead(module)
    counter = _Counter(costs)
    handles = [
        module.register_forward_hook(_linear_hook(costs[_row(name)], rule))
        for module, name in names.items()
        if (rule := _linear_rule(module, name, network)) is not None
    ]
    try:
        with counter:
            network(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value for name, value in costs.items() if value != Cost()}, counter.peak


def _row(name: str) -> str:
    """The row of the table that a module's path belongs to: at most two levels, a list's entries as one."""
    return ".".join(part for part in name.split(".")[:2] if not part.isdigit()) or "(itself)"


def _dead(block: VSSBlock) -> int:
    """`in_style_proj` (dim -> 2 dim) and `skip_scale2` (dim) of a published block."""
    dim = block.ss2d.config.dim
    return 2 * dim * dim + dim


_Rule = Callable[[Tensor], int]


def _linear_rule(module: nn.Module, name: str, network: nn.Module) -> _Rule | None:
    """Products of a linear layer as the paper's counter sees them, from its output; None for the others."""
    if isinstance(module, SS2D):
        # Its in_proj is not called as a layer, its x_proj and dt_proj are einsums over there.
        dim, inner = module.config.dim, module.config.inner
        return lambda grid: grid[..., 0].numel() * 2 * dim * inner
    if isinstance(module, nn.Linear):
        if name.endswith(".in_proj") and isinstance(network.get_submodule(name.rpartition(".")[0]), S6):
            # mamba-ssm multiplies by this weight without calling the layer.
            return None
        return lambda out: out.numel() * module.in_features
    if isinstance(module, S6):
        # Its x_proj is a layer over there, and not called as one here; the steps' projection is not.
        inner, width = module.config.inner, module.config.dt_rank + 2 * module.config.state
        return lambda tokens: tokens[..., 0].numel() * inner * width
    return None


def _linear_hook(into: Cost, rule: _Rule) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        into.paper_macs += rule(output)

    return hook


class _Counter(TorchDispatchMode):
    """Sees every operation: its products, the module it belongs to, and the memory of its result."""

    def __init__(self, costs: dict[str, Cost]) -> None:
        super().__init__()
        self.costs, self.tracker = costs, ModuleTracker()
        self.held, self.peak = 0, 0
        self.seen: set[int] = set()

    def __enter__(self) -> "_Counter":
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self.tracker.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        # "Global" and the name of the whole's class stand before the path.
        path = max(self.tracker.parents, key=lambda name: name.count(".")).partition(".")[2]
        self._add(self.costs[_row(path)], func._overloadpacket, args, kwargs or {}, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._hold(tensor)
        return out

    def _add(self, into: Cost, packet: Any, args: tuple[Any, ...], kwargs: Any, out: Any) -> None:
        if packet in _SCANS:
            updates, projection = _SCANS[packet](*args)
            into.state_updates += updates
            into.macs += projection
        elif packet in flop_registry:
            macs = flop_registry[packet](*args, **kwargs, out_val=out) // 2
            into.macs += macs
            if packet is torch.ops.aten.convolution and not _resamples(args[1]):
                into.paper_macs += macs

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.held -= size


def _resamples(weight: Tensor) -> bool:
    """Whether a convolution is StyleGAN2's filter (4 x 4, channel by channel), a kernel of its own there."""
    return tuple(weight.shape[1:]) == (1, 4, 4)


def _ss2d(u: Tensor, dt: Tensor, B: Tensor, *_: Any) -> tuple[int, int]:
    """State updates of a scan of tokens, and the products that make its steps from `dt`."""
    walked = u.numel() * dt.shape[2]
    return walked * B.shape[3], walked * dt.shape[3]


def _selective(u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> tuple[int, int]:
    return u.numel() * A.shape[-1], 0


_SCANS: Mapping[Any, Callable[..., tuple[int, int]]] = {
    ss2d_scan_op.overloadpacket: _ss2d,
    selective_scan_op.overloadpacket: _selective,
}
