"""Whole models as graphs for ONNX and torch.export: an inverter's edit, the halves of a style network.

| graph | inputs | output |
|---|---|---|
| edit | image (batch 3 side side), direction (batch num_ws w_dim) | picture (batch 3 resolution resolution) |
| encode_style | style (1 3 height width) | code |
| stylize | content (1 3 height width), code, for Mamba-ST orders (1 layers positions) | stylized |

Pictures are float32 in [-1, 1]. Height and width are free where they are named so, and so is the batch of
`edit`; a style network takes one picture at a time, since SaMam's kernels are the picture's own.
"""

import contextlib
import dataclasses
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mambastyle.api import Inverter
from mambastyle.files import write_whole
from mambastyle.models.mamba_st import MambaST
from mambastyle.models.samam import SaMam
from mambastyle.ops import unavailable_reason

OPSET = 18
TOLERANCE = 1e-4
"""How far a picture of onnxruntime may be from torch's, on [-1, 1]."""
# The longest side that the graphs declare; they compute with any.
_LONGEST = 16384


class ExportError(ValueError):
    """A model that cannot be exported here, or a graph that does not do what the model does."""


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph to export: the module, example inputs by name, and which of their axes are free."""

    name: str
    module: nn.Module
    inputs: Mapping[str, Tensor]
    output: str
    free: Mapping[str, Mapping[int, Any]]


class _Edit(nn.Module):
    """Encode, edit, fuse and synthesise, as `Inverter.render` does."""

    def __init__(self, inverter: Inverter) -> None:
        super().__init__()
        self.model, self.generator = inverter.model, inverter.generator

    def forward(
        self, image: Float[Tensor, "batch 3 _ _"], direction: Float[Tensor, "batch num_ws w_dim"]
    ) -> Float[Tensor, "batch 3 _ _"]:
        edited = self.model(image, direction)
        ws = edited.ws + self.generator.mapping.w_avg
        return self.generator.synthesis(ws, feature=edited.feature).clamp(-1, 1)


class _EncodeStyle(nn.Module):
    def __init__(self, model: SaMam | MambaST) -> None:
        super().__init__()
        self.model = model

    def forward(self, style: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "1 ..."]:
        return self.model.encode_style(style)


class _Stylize(nn.Module):
    def __init__(self, model: SaMam) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, content: Float[Tensor, "1 3 height width"], code: Float[Tensor, "1 ..."]
    ) -> Float[Tensor, "1 3 height width"]:
        return self.model.stylize(content, code).clamp(-1, 1)


class _StylizeInOrder(nn.Module):
    def __init__(self, model: MambaST) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        content: Float[Tensor, "1 3 height width"],
        code: Float[Tensor, "1 rows columns dim"],
        orders: Int[Tensor, "1 layers positions"],
    ) -> Float[Tensor, "1 3 height width"]:
        return self.model.stylize(content, code, orders=orders).clamp(-1, 1)


def graphs(model: Inverter | SaMam | MambaST, size: tuple[int, int] = (200, 296)) -> list[Graph]:
    """The graphs of a model on the CPU; `size` is the (height, width) that style networks are traced with."""
    if isinstance(model, Inverter):
        side, config = model.model.config.image_size, model.generator.config
        image = torch.rand(2, 3, side, side, generator=_random()) * 2 - 1
        direction = torch.randn(2, config.num_ws, config.w_dim, generator=_random())
        batch = Dim("batch", min=1, max=1024)
        inputs = {"image": image, "direction": direction}
        return [Graph("edit", _Edit(model), inputs, "picture", {name: {0: batch} for name in inputs})]
    height, width = Dim("height", min=2, max=_LONGEST), Dim("width", min=2, max=_LONGEST)
    picture = torch.rand(1, 3, *size, generator=_random()) * 2 - 1
    with torch.no_grad():
        code = model.encode_style(picture.transpose(2, 3))
    encode = Graph(
        "encode_style", _EncodeStyle(model), {"style": picture}, "code", {"style": {2: height, 3: width}}
    )
    inputs, free = {"content": picture, "code": code}, {"content": {2: height, 3: width}, "code": {}}
    if isinstance(model, SaMam):
        return [encode, Graph("stylize", _Stylize(model), inputs, "stylized", free)]
    grid = model.embedding(picture).shape[2:]
    inputs["orders"] = model.draw_orders(grid.numel())
    rows, columns = Dim("rows", min=2, max=_LONGEST), Dim("columns", min=2, max=_LONGEST)
    free |= {"code": {1: rows, 2: columns}, "orders": {2: Dim.DYNAMIC}}
    return [encode, Graph("stylize", _StylizeInOrder(model), inputs, "stylized", free)]


def export_program(graph: Graph) -> ExportedProgram:
    """The graph as torch.export has it: loads with `torch.export.load`, needs mambastyle for its scans."""
    reason = unavailable_reason("numba")
    if reason is not None:
        raise ExportError(f"a graph is traced with the numba backend, which cannot run: {reason}")
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of its own deprecations.
        warnings.simplefilter("ignore")
        program = torch.export.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            dynamic_shapes=tuple(graph.free[name] for name in graph.inputs),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    # What the tracer noted of the example's size ("the map is not 1 high") would refuse other sizes, though
    # no operator in the graph depends on it; `check` runs other sizes than the example's.
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_scalar.default:
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def save_program(graph: Graph, path: str | os.PathLike[str]) -> Path:
    """Write what `export_program` gives as a .pt2 file, whole or not at all."""
    buffer = io.BytesIO()
    torch.export.save(export_program(graph), buffer)
    return write_whole(path, buffer.getbuffer())


def save_onnx(graph: Graph, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> Path:
    """Write the graph as one ONNX file of opset 18, whole or not at all.

    Raises ModuleNotFoundError without the extra "onnx", and ExportError where the model cannot be traced.
    """
    from mambastyle.export.onnx_functions import translations

    program = export_program(graph)
    with _quiet():
        converted = torch.onnx.export(
            program,
            dynamo=True,
            custom_translation_table=dict(translations()),
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=[graph.output],
            verbose=False,
        )
    assert converted is not None  # only the old exporter returns nothing
    proto = converted.model_proto
    for key, value in (metadata or {}).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return write_whole(path, proto.SerializeToString())


def check(
    graph: Graph, path: str | os.PathLike[str], sizes: tuple[tuple[int, int], ...] = ((93, 130),)
) -> float:
    """The largest difference between onnxruntime's and torch's output, for the example and for other sizes.

    Raises ExportError when it is above TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for inputs in (graph.inputs, *(_of_size(graph, *size) for size in sizes)):
        with torch.inference_mode():
            expected = graph.module(*inputs.values()).numpy()
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        worst = max(worst, float(np.abs(found - expected).max()))
    if not worst <= TOLERANCE:
        raise ExportError(
            f"{path} differs from the model by {worst:.1e} in onnxruntime, expected {TOLERANCE:.0e} at most: "
            "report it with the versions that `mambastyle doctor` shows"
        )
    return worst


def save_directions(inverter: Inverter, path: str | os.PathLike[str]) -> Path:
    """Write what a strength of 1 of each direction adds to ws, as an .npz of (num_ws, w_dim) arrays."""
    buffer = io.BytesIO()
    arrays = {name: d.offset(1.0).numpy() for name, d in inverter.directions.items()}
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return write_whole(path, buffer.getbuffer())


def _of_size(graph: Graph, height: int, width: int) -> dict[str, Tensor]:
    """Other inputs for a graph: a picture of this size, or another batch where the size is the model's."""
    inputs = dict(graph.inputs)
    if graph.name == "edit":
        return {name: tensor[:1].flip(-1) for name, tensor in inputs.items()}
    picture = "style" if graph.name == "encode_style" else "content"
    inputs[picture] = torch.rand(1, 3, height, width, generator=_random()) * 2 - 1
    if "orders" in inputs:
        model = graph.module.model
        assert isinstance(model, MambaST)
        with torch.no_grad():
            inputs["orders"] = model.draw_orders(model.embedding(inputs[picture]).shape[2:].numel())
    return inputs


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks of its progress and of torchvision, which nothing here needs."""
    import logging

    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
