"""GAN training on a tiny pack: every term appears, the run resumes exactly, the checkpoint loads."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mambastyle import checkpoints
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.training.augment import AdaptiveProbability, augment
from mambastyle.training.config import read_run_file
from mambastyle.training.gan import GANConfig, GANTask, run
from mambastyle.training.loop import find_checkpoints
from mambastyle.training.random import StepRandom

MODEL = {
    "resolution": 32,
    "z_dim": 8,
    "w_dim": 8,
    "mapping_layers": 2,
    "widths": [8, 8, 8, 4],
    "feature_layer": 5,
}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "pack.zip", "w") as archive:
        archive.writestr("labels.csv", "file,split\n" + "".join(f"{n}.png,train\n" for n in range(6)))
        for number in range(6):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{number}.png", buffer.getvalue())
    return {
        "name": "gan",
        "output": str(tmp_path / "runs"),
        "steps": 6,
        "batch": 4,
        "log_every": 1,
        "sample_every": 6,
        "checkpoint_every": 3,
        "model": MODEL,
        "data": {"pack": str(tmp_path / "pack.zip")},
        "projected": {"weight": 0.0},
        "r1_every": 2,
        "path_length_every": 2,
        "path_length_after": 2,
    }


def test_resumes_exactly_and_exports_a_generator(settings):
    whole = run(GANConfig(**settings))
    run(GANConfig(**(settings | {"name": "again", "steps": 3})))
    again = run(GANConfig(**(settings | {"name": "again"})))
    first, second = (checkpoints.load(folder / "generator.safetensors") for folder in (whole, again))
    assert first.kind == "stylegan2"
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    config = checkpoints.config_from_dict(StyleGAN2Config, first.config)
    generator = Generator(config)
    tensors = {
        n.removeprefix("generator."): t for n, t in first.tensors.items() if n.startswith("generator.")
    }
    generator.load_state_dict(tensors)
    assert generator(torch.zeros(1, 8)).shape == (1, 3, 32, 32)
    log = (whole / "log.jsonl").read_text()
    for term in ("d_adversarial", "g_adversarial", "r1", "path_length"):
        assert f'"{term}"' in log
    assert (whole / "samples" / "step-00000006.png").is_file()
    assert generator.mapping.w_avg.abs().sum() > 0


def test_a_falling_rate_resumes_exactly_and_ends_near_zero(settings):
    settings |= {"schedule": "cosine", "steps": 4}
    whole = run(GANConfig(**settings))
    run(GANConfig(**(settings | {"name": "again", "max_minutes": 0})))
    assert [path.name for path in find_checkpoints(whole.parent / "again")] == ["step-00000001"]
    again = run(GANConfig(**(settings | {"name": "again"})))
    first, second = (checkpoints.load(folder / "generator.safetensors") for folder in (whole, again))
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name
    state = torch.load(find_checkpoints(whole)[-1] / "state.pt", weights_only=True)
    rates = {
        (name, group["initial_lr"]): group["lr"]
        for name, optimizer in state["optimizers"].items()
        for group in optimizer["param_groups"]
    }
    assert len(rates) == 2
    assert all(rate == pytest.approx(0, abs=1e-9) for rate in rates.values())


def test_reconstructs_a_share_of_the_pictures_and_resumes_exactly(settings):
    settings |= {"reconstruction": {"share": 0.5, "perceptual": 0.0, "l2": 50.0}, "steps": 4, "log_every": 1}
    whole = run(GANConfig(**(settings | {"checkpoint_every": 2})))
    run(GANConfig(**(settings | {"name": "again", "steps": 2})))
    again = run(GANConfig(**(settings | {"name": "again"})))
    first, second = (checkpoints.load(folder / "generator.safetensors") for folder in (whole, again))
    assert any(name.startswith("encoder.") for name in first.tensors)
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_reconstruction_teaches_generator_and_encoder_the_pictures(settings):
    settings |= {"reconstruction": {"share": 0.5, "perceptual": 0.0, "l2": 10.0}, "data": settings["data"]}
    task = GANTask(GANConfig(**settings), torch.device("cpu"))
    discriminators, generator = task.players
    random = StepRandom(0, 1, 4)
    discriminators.terms(random)
    terms = generator.terms(random)
    assert {"l2", "divergence", "g_adversarial"} <= set(terms)
    terms["l2"].backward()
    assert task.encoder is not None
    for module in (task.encoder, task.generator.synthesis, task.generator.mapping):
        assert any(p.grad is not None and p.grad.abs().any() for p in module.parameters())


def test_the_term_of_spectra_brings_fine_detail_to_that_of_the_pictures(settings):
    # The pictures are noise, of which a new generator has far too little.
    folder = run(GANConfig(**(settings | {"spectrum": 1.0, "steps": 20})))
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["spectrum"] < 0.5 * logged[0]["spectrum"]


def test_a_perceptual_reconstruction_without_its_network_is_an_error(settings):
    with pytest.raises(ValueError, match="needs SqueezeNet"):
        run(GANConfig(**(settings | {"reconstruction": {"share": 0.5}})))


@pytest.mark.parametrize(
    ("name", "share", "fit", "start"),
    [
        ("-1", 0.75, False, None),
        ("-2", 0.5, True, "runs/gan-kaokore64-1/generator.safetensors"),
        ("", 0.125, False, "runs/gan-kaokore64-2/generator.safetensors"),
    ],
)
def test_the_recipes_are_valid(name, share, fit, start, request):
    config = read_run_file(request.config.rootpath / "recipes" / f"gan-kaokore64{name}.yaml", GANConfig)
    assert config.name == f"gan-kaokore64{name}"
    assert (config.reconstruction.share, config.reconstruction.fit_prior) == (share, fit)
    assert config.start == start


def test_starts_from_a_checkpoint(settings):
    first = run(GANConfig(**(settings | {"steps": 1})))
    start = str(first / "generator.safetensors")
    second = run(GANConfig(**(settings | {"name": "on", "steps": 1, "learning_rate": 1e-12, "start": start})))
    before, after = (checkpoints.load(folder / "generator.safetensors") for folder in (first, second))
    for name, tensor in before.tensors.items():
        # The generator's average and the discriminator's last weights; a rate of 1e-12 leaves them there.
        if "w_avg" not in name and "noise_const" not in name:
            torch.testing.assert_close(after.tensors[name], tensor)
    wide = settings | {"name": "wide", "start": start, "model": MODEL | {"w_dim": 16}}
    with pytest.raises(ValueError, match="other sizes"):
        run(GANConfig(**wide))


def test_bad_settings_are_errors(settings):
    with pytest.raises(ValueError, match="batch of at least 2"):
        run(GANConfig(**(settings | {"batch": 1})))
    with pytest.raises(ValueError, match="did you mean"):
        GANConfig(**(settings | {"model": {"resolutoin": 32}}))


def test_augmentation_is_differentiable_seeded_and_off_at_zero():
    image = torch.rand(4, 3, 16, 16, requires_grad=True)
    assert augment(image, 0.0, torch.Generator()) is image
    first = augment(image, 1.0, torch.Generator().manual_seed(1))
    second = augment(image, 1.0, torch.Generator().manual_seed(1))
    assert torch.equal(first, second)
    assert not torch.allclose(first, image)
    first.sum().backward()
    assert image.grad.abs().sum() > 0


def test_a_colour_map_with_nothing_happening_is_the_identity():
    image = torch.rand(4, 3, 16, 16)
    out = augment(image, 1e-12, torch.Generator().manual_seed(0))
    torch.testing.assert_close(out, image, rtol=1e-4, atol=1e-5)


def test_the_probability_follows_the_overfitting_heuristic():
    probability = AdaptiveProbability(target=0.6, images=1000, maximum=0.8)
    probability.update(1.0, 100)
    assert probability.value == pytest.approx(0.1)
    probability.update(0.0, 200)
    assert probability.value == 0.0
    for _ in range(20):
        probability.update(1.0, 100)
    assert probability.value == 0.8


def test_a_gan_does_not_accumulate(tmp_path):
    model = {"resolution": 32, "z_dim": 8, "w_dim": 8, "widths": [8, 8, 8, 8], "feature_layer": 5}
    settings = GANConfig(
        name="gan",
        output=str(tmp_path),
        steps=1,
        batch=8,
        accumulate=2,
        model=model,
        data={"pack": "none.zip"},
    )
    with pytest.raises(ValueError, match="cannot accumulate"):
        run(settings)
