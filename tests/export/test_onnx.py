"""Exported graphs do in onnxruntime and torch.export what the models do in torch, at any size."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import mambastyle as ms
from mambastyle.models.mamba_st import MambaST, MambaSTConfig
from mambastyle.models.samam import SaMam, SaMamConfig
from mambastyle.ops import cross_paths, selective_scan, ss2d_scan, zigzag_paths

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from mambastyle.export import onnx  # noqa: E402

# Tracing goes through the annotations, whose symbols the checker would make numbers of.
pytestmark = [pytest.mark.no_shape_checks, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
DECODER = ((4,), (4, 4), (4,), (4, 3))


class Operators(nn.Module):
    """Each operator that has a function of ours, on maps whose size is free."""

    def forward(self, x, tokens, low, A, B, parameters):
        height, width = x.shape[2:]
        weight, D, bias = parameters[..., :3], parameters[..., 3], parameters[..., 4]
        cross, zigzag = (paths(height, width) for paths in (cross_paths, zigzag_paths))
        u = tokens.transpose(1, 2)
        rows = B.permute(0, 2, 3, 1)
        return torch.cat(
            [
                ss2d_scan(tokens, low, weight, A, B, B.flip(-1), D, bias, cross).flatten(),
                ss2d_scan(
                    tokens, low, weight, A.expand(len(tokens), -1, -1, -1), B, B, D, bias, zigzag
                ).flatten(),
                selective_scan(u, u.abs(), A[0], rows, rows, D[0], None, bias[0], True).flatten(),
                F.adaptive_avg_pool2d(x, (3, 5)).flatten(),
                F.interpolate(x, (width, height), mode="nearest-exact").flatten(),
                (torch.arange(height) % width).float(),
            ]
        )


def operator_inputs(batch: int, height: int, width: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"x": (batch, 3, height, width), "tokens": (batch, height * width, 20)}
    shapes |= {"low": (batch, height * width, 4, 3), "A": (4, 20, 5), "B": (batch, height * width, 4, 5)}
    shapes |= {"parameters": (4, 20, 5)}
    inputs = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return inputs | {"A": -inputs["A"].abs()}


def test_every_function_of_ours_equals_torch_at_other_sizes(tmp_path):
    height, width = Dim("height", min=4), Dim("width", min=4)
    length = {1: Dim.DYNAMIC}
    free = {
        "x": {2: height, 3: width},
        "tokens": length,
        "low": length,
        "A": {},
        "B": length,
        "parameters": {},
    }
    graph = onnx.Graph("operators", Operators(), operator_inputs(2, 6, 7), "found", free)
    path = onnx.save_onnx(graph, tmp_path / "operators.onnx", {"key": "value"})
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["key"] == "value"
    for size in ((5, 9), (8, 8), (4, 13)):
        inputs = operator_inputs(2, *size)
        expected = Operators()(*inputs.values()).numpy()
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def models(folder):
    torch.manual_seed(0)
    yield "edit", lambda: ms.load(folder, device="cpu")
    samam = SaMamConfig(
        dim=4, state=2, squeeze=2, style_dim=4, encoder_layers=1, groups=1, group_layers=1, decoder=DECODER
    )
    yield "samam", lambda: SaMam(samam).eval()
    mamba_st = MambaSTConfig(dim=4, state=2, encoder_layers=1, decoder_layers=2, decoder=DECODER)
    yield "mamba_st", lambda: MambaST(mamba_st).eval()


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["edit", "samam", "mamba_st"])
def test_a_model_in_onnxruntime_equals_the_model(name, tiny_model_folder, tmp_path):
    model = dict(models(tiny_model_folder))[name]()
    for graph in onnx.graphs(model, size=(75, 131)):
        path = onnx.save_onnx(graph, tmp_path / f"{graph.name}.onnx")
        worst = onnx.check(graph, path, sizes=((40, 97), (64, 64), (9, 203)))
        assert worst <= onnx.TOLERANCE
        operators = {node.op_type for node in load_nodes(path)}
        assert graph.name == "encode_style" or "Scan" in operators


@pytest.mark.thorough
def test_an_exported_program_takes_other_sizes(tmp_path):
    model = dict(models(None))["mamba_st"]()
    encode, _ = onnx.graphs(model, size=(75, 131))
    torch.export.save(onnx.export_program(encode), tmp_path / "encode.pt2")
    program = torch.export.load(tmp_path / "encode.pt2").module()
    for size in ((40, 97), (64, 64), (9, 203)):
        style = torch.rand(1, 3, *size) * 2 - 1
        with torch.no_grad():
            torch.testing.assert_close(program(style), model.encode_style(style))


def load_nodes(path):
    """All nodes of a model, those of its functions and bodies too."""
    import onnx as onnx_format

    model = onnx_format.load(path)
    waiting = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [inner for attribute in node.attribute for inner in attribute.g.node]


def test_a_graph_that_differs_is_refused(tmp_path):
    class Other(nn.Module):
        def forward(self, x):
            return x + 1e-3

    inputs = {"x": torch.rand(1, 3, 4, 4)}
    graph = onnx.Graph("edit", nn.Identity(), inputs, "y", {"x": {}})
    path = onnx.save_onnx(onnx.Graph("edit", Other(), inputs, "y", {"x": {}}), tmp_path / "other.onnx")
    with pytest.raises(onnx.ExportError, match=r"differs from the model by 1.0e-03 in onnxruntime"):
        onnx.check(graph, path)
