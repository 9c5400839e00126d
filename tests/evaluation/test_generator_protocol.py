"""The generator protocol on a tiny checkpoint and pack."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mambastyle import checkpoints
from mambastyle.evaluation.generator import draw, run
from mambastyle.evaluation.judges import Judges
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config

CONFIG = StyleGAN2Config(
    resolution=32, z_dim=8, w_dim=8, mapping_layers=2, widths=(8, 8, 8, 8), feature_layer=5
)


class Colours(torch.nn.Module):
    """Stands in for a network: mean and deviation of each channel."""

    def pooled(self, image):
        return torch.cat([image.mean((2, 3)), image.std((2, 3))], 1)


@pytest.fixture
def pack(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        rows = "".join(f"{n}.png,{'train' if n < 12 else 'test'}\n" for n in range(20))
        archive.writestr("labels.csv", "file,split\n" + rows)
        for number in range(20):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{number}.png", buffer.getvalue())
    return tmp_path / "pack.zip"


@pytest.mark.no_shape_checks
def test_one_row_per_checkpoint_and_one_for_held_out_pictures(tmp_path, pack):
    torch.manual_seed(0)
    tensors = {f"generator.{name}": value for name, value in Generator(CONFIG).state_dict().items()}
    path = tmp_path / "generator-00000010.safetensors"
    checkpoints.save(path, tensors, kind="stylegan2", config=CONFIG, card={"pictures": 160})
    table = run([path, path], pack, Judges(small=Colours()), count=12, batch=5, progress=False)
    held_out, first, second = table.rows
    assert held_out["name"] == "8 held-out pictures"
    assert first["pictures"] == 160
    assert first["fd_small"] == second["fd_small"]
    assert first["fd_small"] > held_out["fd_small"] >= 0
    # Noise of 8 bits, tested against noise of 8 bits; an untrained generator draws smooth colours.
    assert held_out["hatching"] == pytest.approx(1.0, abs=0.1)
    assert first["hatching"] == second["hatching"] < 0.5
    assert "12 samples" in table.title
    assert "pack, 32 px" in table.title


def test_samples_follow_the_seed_not_the_batch():
    torch.manual_seed(0)
    generator = Generator(CONFIG).eval()
    first = draw(generator, 4, 4, 1.0, 3, "cpu", False)
    again = draw(generator, 4, 4, 1.0, 3, "cpu", False)
    assert torch.equal(first, again)
    assert first.shape == (4, 3, 32, 32)
    assert first.abs().max() <= 1


def test_no_checkpoint_is_an_error(pack):
    with pytest.raises(ValueError, match="no generator to evaluate"):
        run([], pack, Judges())
