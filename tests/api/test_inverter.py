"""The facade: any kind of picture in, the same picture out for one and for many, edits that add up."""

import dataclasses
import io
import shutil
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image

import mambastyle as ms
from mambastyle import checkpoints, images
from mambastyle.checkpoints import CheckpointError


@pytest.fixture(scope="module")
def inverter(tiny_model_folder):
    return ms.load(tiny_model_folder, device="cpu", batch_size=2)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_every_kind_of_picture_gives_the_same_latents(inverter, faces):
    picture = Image.open(faces[0])
    sources = [faces[0], str(faces[0]), picture, np.array(picture), images.read(faces[0])]
    sources += [faces[0].read_bytes()]
    expected = inverter.invert(faces[0])
    for source in sources:
        inverted = inverter.invert(source)
        assert inverted.single
        close(inverted.ws, expected.ws)
        close(inverted.feature, expected.feature)
        assert not inverted.offset.any()


def test_a_batch_equals_its_pictures_one_by_one(inverter, faces):
    many = inverter.invert(faces)
    assert len(many) == 3
    assert many.names == ("face0", "face1", "face2")
    ws, feature = many.inversion
    assert ws.shape == (3, 6, 12)
    assert feature.shape == (3, 10, 16, 16)
    rendered = inverter.render(many, output="tensor")
    for index, path in enumerate(faces):
        alone = inverter.invert(path)
        close(alone.ws, ws[index : index + 1])
        close(inverter.render(alone, output="tensor")[0], rendered[index])
        close(inverter.render(many[index], output="tensor")[0], rendered[index])


def test_render_gives_one_for_one_and_many_for_many(inverter, faces):
    one, many = inverter.invert(faces[0]), inverter.invert(faces[:2])
    picture = inverter.render(one)
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 16)
    assert [type(picture) for picture in inverter.render(many)] == [Image.Image] * 2
    assert inverter.render(one, output="numpy").shape == (16, 16, 3)
    assert inverter.render(many, output="numpy").dtype == np.uint8
    tensor = inverter.render(one, output="tensor")
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.abs().max() <= 1


def test_the_rendering_is_the_papers_formula(inverter, faces):
    inverted = inverter.edit(inverter.invert(faces[:2]), {"gender": 1.5})
    direction = inverter.directions["gender"].offset(1.5).expand(2, -1, -1)
    batch = torch.stack([inverter.prepare(face) for face in faces[:2]])
    with torch.inference_mode():
        ws, feature = inverter.model.encoder(batch)
        fused = inverter.model.fuser(feature, direction)
        w_avg = inverter.generator.mapping.w_avg
        expected = inverter.generator.synthesis(w_avg + ws + direction, feature=fused).clamp(-1, 1)
    close(inverter.render(inverted, output="tensor"), expected)


def test_edits_add_up_and_undo(inverter, faces):
    inverted = inverter.invert(faces[0])
    together = inverter.edit(inverted, {"gender": 1.0, "noble": -2.0})
    one_by_one = inverter.edit(inverter.edit(inverted, [("gender", 1.0)]), [("noble", -2.0)])
    close(inverter.render(together, output="tensor"), inverter.render(one_by_one, output="tensor"))
    undone = inverter.edit(together, {"gender": -1.0, "noble": 2.0})
    close(inverter.render(undone, output="tensor"), inverter.render(inverted, output="tensor"))
    moved = inverter.render(together, output="tensor") - inverter.render(inverted, output="tensor")
    assert moved.abs().max() > 0.01


def test_a_direction_on_some_layers_moves_these_alone(inverter, faces):
    edited = inverter.edit(faces[0], [(inverter.directions["gender"].on_layers(0, 2), 1.0)])
    assert edited.offset[:, :2].any()
    assert not edited.offset[:, 2:].any()


def test_the_direction_branch_runs_once_per_direction(tiny_model_folder, faces, monkeypatch):
    inverter = ms.load(tiny_model_folder, device="cpu")
    calls = []
    original = inverter.model.fuser.direction_feature

    def counted(direction, size=None):
        calls.append(len(direction))
        return original(direction, size)

    monkeypatch.setattr(inverter.model.fuser, "direction_feature", counted)
    inverted = inverter.invert(faces)
    edited = inverter.edit(inverted, {"gender": 1.0})
    for _ in range(3):
        inverter.render(edited)
    assert calls == [1]
    inverter.render(inverted)
    assert calls == [1, 1]


def test_a_saved_inversion_is_edited_again_without_encoding(inverter, faces, tmp_path, monkeypatch):
    edited = inverter.edit(inverter.invert(faces[:2]), {"gender": 1.0})
    path = tmp_path / "faces.safetensors"
    inverter.save_inversion(path, edited)
    expected = inverter.render(inverter.edit(edited, {"noble": 1.0}), output="tensor")
    monkeypatch.setattr(inverter.model.encoder, "forward", None)
    loaded = inverter.load_inversion(path)
    assert loaded.names == ("face0", "face1")
    assert not loaded.single
    actual = inverter.render(inverter.edit(loaded, {"noble": 1.0}), output="tensor")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_the_inversion_of_another_model_is_refused(inverter, other_model_folder, faces, tmp_path):
    path = tmp_path / "face.safetensors"
    other = ms.load(other_model_folder, device="cpu")
    inverted = other.invert(faces[0])
    other.save_inversion(path, inverted)
    with pytest.raises(CheckpointError, match=r"was made by another model .*load that model, or invert"):
        inverter.load_inversion(path)
    with pytest.raises(CheckpointError, match="was made by another model"):
        inverter.render(inverted)


def test_a_model_without_fuser_renders_its_feature_as_it_is(
    tmp_path, tiny_generator_config, tiny_mambastyle_config, faces
):
    from tests.conftest import save_tiny_model

    config = dataclasses.replace(tiny_mambastyle_config, fuser=False)
    inverter = ms.load(save_tiny_model(tmp_path, tiny_generator_config, config), device="cpu")
    inverted = inverter.invert(faces[:2])
    assert inverter.render(inverter.edit(inverted, {"gender": 1.0}), output="tensor").shape == (2, 3, 16, 16)


def test_loading_leaves_the_callers_random_numbers_alone(tiny_model_folder):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ms.load(tiny_model_folder, device="cpu")
    assert torch.equal(torch.rand(1), expected)


def test_a_model_loaded_in_inference_mode_works_there(tiny_model_folder, faces):
    with torch.inference_mode():
        loaded = ms.load(tiny_model_folder, device="cpu")
        again = loaded.render(loaded.invert(faces[:1]), output="tensor")
    # Kernels made there are not kept turned, nor are a copy's; turned ones round otherwise.
    outside = ms.load(tiny_model_folder, device="cpu")
    outside.generator = deepcopy(outside.generator)
    assert torch.equal(again, outside.render(outside.invert(faces[:1]), output="tensor"))


def test_mistakes_are_named(inverter, faces, tiny_model_folder):
    with pytest.raises(ms.DirectionError, match="did you mean 'gender'"):
        inverter.edit(faces[0], {"gendre": 1.0})
    with pytest.raises(ms.DirectionError, match="expected a number"):
        inverter.edit(faces[0], {"gender": "much"})
    with pytest.raises(ms.ImageError, match="no pictures"):
        inverter.invert([])
    with pytest.raises(ms.ImageError, match="no such file"):
        inverter.invert([faces[0], "nowhere.png"])
    with pytest.raises(ValueError, match="1 names for 2 pictures"):
        inverter.invert(faces[:2], names=["a"])
    with pytest.raises(ValueError, match="output is 'jpeg'"):
        inverter.render(faces[0], output="jpeg")
    with pytest.raises(ValueError, match="batch_size is 0"):
        ms.load(tiny_model_folder, device="cpu", batch_size=0)
    with pytest.raises(ValueError, match="the device 'abacus' cannot be used"):
        ms.load(tiny_model_folder, device="abacus")


def test_an_unknown_model_suggests_the_nearest_preset():
    with pytest.raises(CheckpointError, match="no preset or folder named 'kaokore46': did you mean"):
        ms.load("kaokore46")


def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def test_parts_that_do_not_belong_together_are_refused(tiny_model_folder, other_model_folder, tmp_path):
    folder = copy(tiny_model_folder, tmp_path)
    (folder / "generator.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks generator.safetensors: a model is a folder with"):
        ms.load(folder)
    shutil.copy(other_model_folder / "generator.safetensors", folder)
    with pytest.raises(CheckpointError, match="was discovered in another generator"):
        ms.load(folder)
    shutil.copy(folder / "directions.safetensors", folder / "generator.safetensors")
    with pytest.raises(CheckpointError, match="holds a 'directions' checkpoint, expected 'stylegan2'"):
        ms.load(folder)


def test_a_generator_of_other_sizes_is_refused(tiny_model_folder, tmp_path, tiny_generator_config):
    import dataclasses

    from mambastyle.models.stylegan2 import Generator

    folder = copy(tiny_model_folder, tmp_path)
    config = dataclasses.replace(tiny_generator_config, widths=(8, 8, 12))
    tensors = {f"generator.{name}": tensor for name, tensor in Generator(config).state_dict().items()}
    checkpoints.save(folder / "generator.safetensors", tensors, kind="stylegan2", config=config)
    with pytest.raises(CheckpointError, match=r"for another generator than .*feature_channels 10 against 12"):
        ms.load(folder)
    # Tensors that do not fit the config beside them.
    checkpoints.save(
        folder / "generator.safetensors", tensors, kind="stylegan2", config=tiny_generator_config
    )
    with pytest.raises(CheckpointError, match=r"does not fit its own config in \d+ of"):
        ms.load(folder)


def test_a_broken_hash_is_refused(tiny_model_folder, tmp_path):
    folder = copy(tiny_model_folder, tmp_path)
    path = folder / "inversion.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 255
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its own hash"):
        ms.load(folder)


def test_a_model_with_a_frame_takes_and_gives_its_proportions(
    tmp_path, tiny_generator_config, tiny_mambastyle_config
):
    from tests.conftest import save_tiny_model

    config = dataclasses.replace(tiny_mambastyle_config, frame=(12, 16))
    inverter = ms.load(save_tiny_model(tmp_path, tiny_generator_config, config), device="cpu")
    prepared = inverter.prepare(torch.zeros(3, 60, 80))
    assert prepared.shape == (3, 32, 32)
    # Resizing blends the two rows at the edge of a bar.
    torch.testing.assert_close(prepared[:, :2], torch.full((3, 2, 32), -1.0))
    torch.testing.assert_close(prepared[:, 6:26], torch.zeros(3, 20, 32))
    rendered = inverter.render(inverter.edit(torch.zeros(3, 60, 80), {"noble": 1.0}), output="tensor")
    assert rendered.shape == (1, 3, 12, 16)


def test_bfloat16_comes_near_and_gives_float32(inverter, tiny_model_folder, faces, monkeypatch):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)  # whose pictures are larger than these
    fast = ms.load(tiny_model_folder, device="cpu", precision="bf16")
    exact, near = (each.edit(faces, {"gender": 1.0}) for each in (inverter, fast))
    for a, b in ((exact.ws, near.ws), (exact.feature, near.feature)):
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()
    rendered = fast.render(near, output="tensor")
    assert rendered.dtype == torch.float32
    assert (rendered - inverter.render(exact, output="tensor")).abs().mean() < 0.02
    # A batch in bfloat16 may round otherwise than its pictures alone, but an optimisation never runs in it.
    found = [each.invert(faces[0], method="optimise", steps=2).ws for each in (inverter, fast)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_it_moves_to_another_precision_and_back_or_stays_as_it_is(tiny_model_folder, faces):
    inverter = ms.load(tiny_model_folder, device="cpu")
    exact = inverter.edit(faces, {"gender": 1.0})
    assert inverter.to("cpu", "bf16") is inverter
    assert not torch.equal(inverter.edit(faces, {"gender": 1.0}).ws, exact.ws)
    with pytest.raises(ValueError, match="the device 'tpu9000' cannot be used"):
        inverter.to("tpu9000", "fp32")
    assert (inverter.device.type, inverter.precision) == ("cpu", "bf16")
    again = inverter.to("cpu", "fp32").edit(faces, {"gender": 1.0})
    # What directions were in the other precision is forgotten.
    torch.testing.assert_close(again.ws, exact.ws, rtol=0, atol=0)
    torch.testing.assert_close(again.feature, exact.feature, rtol=0, atol=0)


@pytest.mark.thorough
@pytest.mark.no_shape_checks
def test_its_networks_may_be_compiled(inverter, tiny_model_folder, faces):
    compiled = ms.load(tiny_model_folder, device="cpu", batch_size=2)
    for network in (compiled.model.encoder, compiled.model.fuser, compiled.generator.synthesis):
        # One graph each: a break, as at a question about inference mode, costs what compiling gains.
        network.compile(backend="aot_eager", fullgraph=True)
    pictures = [
        each.render(each.edit(faces[:2], {"gender": 1.0}), output="tensor") for each in (inverter, compiled)
    ]
    close(pictures[0], pictures[1])


def test_open_files_and_byte_arrays_are_pictures(inverter, faces):
    path = faces[0]
    expected = inverter.invert(path).ws
    with open(path, "rb") as file:
        given = [io.BytesIO(path.read_bytes()), bytearray(path.read_bytes()), file]
        for source in given:
            close(inverter.invert(source).ws, expected)
    with open(path, encoding="latin-1") as file, pytest.raises(images.ImageError, match="open it with 'rb'"):
        inverter.invert(file)


def test_a_slice_is_several_pictures_and_all_say_what_they_are(inverter, faces):
    inverted = inverter.invert(faces[:3], names=["a", "b", "c"])
    assert inverted[1:].names == ("b", "c")
    assert not inverted[1:].single
    assert torch.equal(inverted[::2].ws, inverted.ws[[0, 2]])
    assert repr(inverted) == f"Inverted(3 of model {inverter.model_hash[:8]}: a, b, c)"
    assert "edited" in repr(inverter.edit(inverted, {"gender": 1.0}))
    assert repr(inverter).startswith("Inverter(")
    assert "16 px" in repr(inverter)


def test_a_file_of_inversions_has_a_name_for_each(inverter, faces, tmp_path):
    inverted = dataclasses.replace(inverter.invert(faces[:2]), names=("a",))
    inverter.save_inversion(tmp_path / "few.safetensors", inverted)
    with pytest.raises(CheckpointError, match="1 names for 2 pictures"):
        inverter.load_inversion(tmp_path / "few.safetensors")


def test_a_strength_beyond_all_numbers_is_named(inverter, faces):
    with pytest.raises(images.ImageError, match="edit less strongly"):
        inverter.render(inverter.edit(faces[0], {"gender": 1e38}))
