"""Every way to invert a picture: saved, edited, rendered alike; the seed and the picture alone decide."""

import shutil

import pytest
import torch

from mambastyle.api import load_inverter as load
from mambastyle.features import SmallFeatures, SmallFeaturesConfig, small


@pytest.mark.parametrize("method", ["optimise", "pti", "encoder+optimise", "mean-w"])
def test_every_method_gives_what_can_be_saved_edited_and_rendered(
    tiny_model_folder, faces, tmp_path, monkeypatch, method
):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    inverter = load(tiny_model_folder, device="cpu", batch_size=2)
    assert inverter.judge == ("L2", None)
    steps = None if method == "mean-w" else 4
    parts: list[float] = []
    inverted = inverter.invert(faces, method=method, steps=steps, seed=3, progress=parts.append)
    assert sum(parts) == pytest.approx(3)
    assert (inverted.tuned is not None) == (method == "pti")
    assert (inverted.feature is not None) == (method == "encoder+optimise")

    edited = inverter.edit(inverted, {"gender": 1.0})
    expected = inverter.render(edited, output="tensor")
    assert not torch.allclose(expected, inverter.render(inverted, output="tensor"), atol=1e-3)
    inverter.save_inversion(tmp_path / "many.safetensors", edited)
    again = inverter.render(inverter.load_inversion(tmp_path / "many.safetensors"), output="tensor")
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    torch.testing.assert_close(inverter.render(edited[2], output="tensor")[0], expected[2])

    alone = inverter.invert(faces[2], method=method, steps=steps, seed=3)
    torch.testing.assert_close(alone.ws, inverted.ws[2:], rtol=1e-3, atol=1e-4)
    for name, rows in (alone.tuned or {}).items():
        torch.testing.assert_close(rows, inverted.tuned[name][2:], rtol=1e-2, atol=1e-4)


def test_optimisation_gets_closer_than_the_average_and_than_the_encoder(
    tiny_model_folder, faces, monkeypatch
):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    inverter = load(tiny_model_folder, device="cpu")
    target = torch.stack([inverter.prepare(inverter.prepare(face), 16) for face in faces])

    def distance(method, steps=None):
        rendered = inverter.render(inverter.invert(faces, method=method, steps=steps), output="tensor")
        return float((rendered - target).square().mean())

    assert distance("optimise", 30) < 0.9 * distance("mean-w")
    assert distance("encoder+optimise", 30) < 0.9 * distance("encoder")


def test_a_method_that_is_not_there_and_steps_that_it_does_not_take(tiny_model_folder, faces):
    inverter = load(tiny_model_folder, device="cpu")
    with pytest.raises(ValueError, match="no method 'optimize': did you mean 'optimise'"):
        inverter.invert(faces[0], method="optimize")
    with pytest.raises(ValueError, match="the method 'encoder' takes no steps"):
        inverter.invert(faces[0], steps=3)
    with pytest.raises(ValueError, match="0 steps, expected 1 or more"):
        inverter.invert(faces[0], method="pti", steps=0)


def test_the_judge_is_squeezenet_or_the_models_own_network(tiny_model_folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    folder = shutil.copytree(tiny_model_folder, tmp_path / "copy")
    small.save(folder / "features.safetensors", SmallFeatures(SmallFeaturesConfig(16, (4, 6), (1, 1))))
    name, judge = load(folder, device="cpu").judge
    assert name == "L2 and features.safetensors"
    assert set(judge(torch.zeros(1, 3, 16, 16))) == {"stage1", "stage2"}
    monkeypatch.setenv("MAMBASTYLE_SQUEEZENET", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no SqueezeNet file at"):
        _ = load(folder, device="cpu").judge
