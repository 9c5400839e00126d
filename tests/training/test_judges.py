"""The judges of a training step, from published files with random weights."""

import re

import pytest
import torch

from mambastyle.features.face_parsing import FaceParsingUNet
from mambastyle.features.identity import ArcFace, crop_face
from mambastyle.features.lpips import LPIPS
from mambastyle.training import judges
from mambastyle.training.judges import Judge, JudgeSection

CPU = torch.device("cpu")


def picture(seed: int, size: int = 64) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, size, size, generator=random) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The three files that the paper's loss needs, under their published names."""
    folder = tmp_path_factory.mktemp("judges")
    torch.manual_seed(0)
    state = LPIPS("squeeze").state_dict()
    named = {re.sub(r"^linear\.(\d)", r"lin\1.model.1", name): tensor for name, tensor in state.items()}
    torch.save({k: t.abs() for k, t in named.items() if k.startswith("lin")}, folder / "squeeze.pth")
    torch.save({k: t for k, t in named.items() if not k.startswith("lin")}, folder / "squeezenet1_1.pth")
    torch.save(FaceParsingUNet().state_dict(), folder / "unet.pth")
    return folder


def test_lpips_from_its_two_files_is_the_mean_of_its_distances(folder):
    section = JudgeSection(
        network="lpips", file=str(folder / "squeeze.pth"), backbone=str(folder / "squeezenet1_1.pth")
    )
    judge = Judge("perceptual", section, CPU)
    rendered, target = picture(0).requires_grad_(), picture(1)
    term = judge(rendered, target)
    assert judge.lpips is not None
    torch.testing.assert_close(term, judge.lpips(rendered, target).mean())
    term.backward()
    assert rendered.grad is not None
    assert rendered.grad.abs().sum() > 0
    assert judge(target, target) == 0
    with pytest.raises(ValueError, match="name it under perceptual, not identity"):
        Judge("identity", section, CPU)


def test_face_parsing_compares_five_levels(folder, monkeypatch):
    assert judges._PARSING_SIZE == 512
    monkeypatch.setattr(judges, "_PARSING_SIZE", 96)
    judge = Judge("structure", JudgeSection(network="face-parsing", file=str(folder / "unet.pth")), CPU)
    ours, theirs = judge.see(picture(0)), judge.see(picture(1))
    assert [x.shape[2] for x in ours.values()] == [48, 24, 12, 6, 6]
    torch.testing.assert_close(judge(picture(0), picture(1)), sum_of_angles(ours, theirs))
    section = JudgeSection(network="face-parsing", file=str(folder / "unet.pth"), layers=("level1",))
    part = Judge("structure", section, CPU)(picture(0), picture(1))
    torch.testing.assert_close(part, sum_of_angles({1: ours["level1"]}, {1: theirs["level1"]}))


def sum_of_angles(maps, target) -> torch.Tensor:
    """1 - cos of the flattened maps, the mean over pictures, summed."""
    cosines = [torch.cosine_similarity(maps[k].flatten(1), target[k].flatten(1)) for k in maps]
    return torch.stack([1 - cosine.mean() for cosine in cosines]).sum()


def test_arcface_compares_the_cropped_face_at_five_depths(monkeypatch):
    torch.manual_seed(0)
    network = ArcFace()
    seen, look = [], network.maps

    def maps(face):
        seen.append((face, look(face)))
        return seen[-1][1]

    monkeypatch.setattr(network, "maps", maps)
    monkeypatch.setattr("mambastyle.published.load", lambda path, backbone: network)
    judge = Judge("identity", JudgeSection(network="arcface", file="model_ir_se50.pth"), CPU)
    ours, theirs = picture(0, 256)[:1], picture(1, 256)[:1]
    term = judge(ours, theirs)
    (_, target), (face, found) = seen
    torch.testing.assert_close(face, crop_face(ours))
    assert len(found) == 5
    torch.testing.assert_close(term, sum_of_angles(found, target))


def test_wrong_files_and_layers_say_what_to_do(folder, monkeypatch):
    monkeypatch.setattr(judges, "_PARSING_SIZE", 96)
    with pytest.raises(ValueError, match="the judge of network arcface needs a file"):
        Judge("identity", JudgeSection(network="arcface"), CPU)
    section = JudgeSection(network="arcface", file=str(folder / "unet.pth"))
    with pytest.raises(ValueError, match="holds a FaceParsingUNet, and the judge arcface needs ArcFace"):
        Judge("identity", section, CPU)
    section = JudgeSection(network="face-parsing", file=str(folder / "unet.pth"), layers=("level9",))
    with pytest.raises(ValueError, match="no layers level9: choose among level0"):
        Judge("structure", section, CPU)(picture(0), picture(1))
