"""The inversion task: what a step draws, which terms it gives, and that it trains what it should."""

import pytest
import torch

from mambastyle import checkpoints, images
from mambastyle.features import SmallFeatures, SmallFeaturesConfig, small
from mambastyle.latents.directions import Direction, Directions
from mambastyle.models.mambastyle import KAOKORE64, MambaStyleConfig
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.training.config import check
from mambastyle.training.inversion import InversionConfig, InversionTask, Pairs
from mambastyle.training.loop import find_checkpoints, train
from mambastyle.training.random import StepRandom

GENERATOR = StyleGAN2Config(
    resolution=32, z_dim=8, w_dim=24, mapping_layers=2, widths=(8, 8, 12, 8), feature_layer=0
)
MODEL = MambaStyleConfig(
    image_size=32,
    num_ws=8,
    w_dim=24,
    widths=(8, 8, 8, 12),
    blocks=(1, 1, 1, 1),
    strides=(2, 1, 2, 2),
    fpn_width=8,
    position_patch=4,
    position_grid=5,
    latent_split=(2, 2, 4),
    head_pools=((4, 3, 3), (4, 3, 3), (4, 2, 2)),
    feature_channels=12,
    feature_layer=5,
    direction_tokens=8,
    direction_grid=4,
    direction_width=8,
    direction_widths=(8, 8, 8),
    state=2,
    expand=1,
)
CPU = torch.device("cpu")
EDIT_TERMS = {"edit_feature", "total_variation", "cycle", "edit_consistency"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random generator and three directions of it."""
    folder = tmp_path_factory.mktemp("inversion")
    torch.manual_seed(0)
    tensors = {f"generator.{name}": value for name, value in Generator(GENERATOR).state_dict().items()}
    checkpoints.save(folder / "generator.safetensors", tensors, kind="stylegan2", config=GENERATOR)
    vectors = torch.eye(24)[:3]
    Directions(Direction.from_w(f"d{i}", vectors[i], 8) for i in range(3)).save(
        folder / "directions.safetensors"
    )
    return folder


def make_task(files, **changes) -> InversionTask:
    values = {
        "name": "test",
        "steps": 3,
        "batch": 4,
        "generator": str(files / "generator.safetensors"),
        "model": MODEL,
        "l2_size": None,
        "smooth_l1_sizes": (None,),
    }
    torch.manual_seed(0)
    return InversionTask(check(values | changes, InversionConfig, "test"), CPU)


def draw(task: InversionTask, step: int = 0, batch: int = 4) -> Pairs:
    return task.pairs(StepRandom(0, step, batch))


def test_a_step_gives_the_published_terms_and_moves_every_parameter(files):
    task = make_task(files)
    (player,) = task.players
    terms = player.terms(StepRandom(0, 0, 4))
    assert set(terms) == {"l2", "smooth_l1", "w_norm", "feature"} | EDIT_TERMS
    loss = sum(player.weights[name] * term for name, term in terms.items())
    assert isinstance(loss, torch.Tensor)
    assert torch.isfinite(loss)
    loss.backward()
    dead = [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert dead == []
    assert all(p.grad is None for p in task.generator.parameters())


def test_a_term_of_weight_zero_is_left_out(files):
    task = make_task(files, weights={"edit_consistency": 0, "cycle": 0, "total_variation": 0})
    terms = task.terms(StepRandom(0, 0, 4))
    assert set(terms) == {"l2", "smooth_l1", "w_norm", "feature", "edit_feature"}
    assert draw(task).edited is None


def test_known_truth_gives_further_terms(files):
    task = make_task(
        files, weights={"latent": 1.0, "edit_l2": 1.0}, feature_target="generator", edit_share=0.5
    )
    terms = task.terms(StepRandom(0, 0, 4))
    assert {"latent", "edit_l2", "feature"} <= set(terms)
    assert draw(task).edits.tolist() == [0, 1]


def test_a_model_without_a_fuser_trains(files):
    task = make_task(files, model=MODEL.__class__(**{**MODEL.__dict__, "fuser": False}))
    terms = task.terms(StepRandom(0, 0, 4))
    assert terms["feature"].item() == 0
    assert terms["cycle"].requires_grad


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Six pictures with the labels file that a pack has."""
    folder = tmp_path_factory.mktemp("pack")
    random = torch.Generator().manual_seed(0)
    for number in range(6):
        images.write(folder / f"{number}.png", torch.rand(3, 32, 32, generator=random) * 2 - 1)
    rows = "".join(f"{number}.png,train\n" for number in range(6))
    (folder / "labels.csv").write_text(f"file,split\n{rows}")
    return folder


def test_real_pictures_take_part_in_what_needs_no_known_latents(files, pack):
    task = make_task(files, pack=str(pack), real_share=0.5, edit_share=0.5, weights={"latent": 1.0})
    pairs = draw(task)
    assert pairs.real == 2
    assert pairs.edits.tolist() == [0, 2]
    assert pairs.edited is not None
    assert len(pairs.image) == 4
    assert len(pairs.ws) == 2
    assert len(pairs.edited) == 1
    torch.testing.assert_close(pairs.image[2:], task.render(pairs.ws).clamp(-1, 1))
    assert EDIT_TERMS | {"latent"} <= set(task.terms(StepRandom(0, 0, 4)))


def test_a_frozen_network_judges_inversion_and_edit(files, tmp_path):
    torch.manual_seed(0)
    small.save(tmp_path / "judge.safetensors", SmallFeatures(SmallFeaturesConfig(32, (4, 6), (1, 1))))
    section = {"network": "small", "file": str(tmp_path / "judge.safetensors")}
    task = make_task(
        files, judges={"perceptual": section, "identity": section}, weights={"edit_perceptual": 1.0}
    )
    terms = task.terms(StepRandom(0, 0, 4))
    assert {"perceptual", "identity", "edit_perceptual"} <= set(terms)
    assert "structure" not in terms


def test_pairs_are_what_the_generator_makes_of_the_same_latents(files):
    task = make_task(files)
    pairs = draw(task)
    assert pairs.image.shape == (4, 3, 32, 32)
    assert pairs.edited is not None
    torch.testing.assert_close(pairs.image, task.render(pairs.ws).clamp(-1, 1))
    torch.testing.assert_close(pairs.edited, task.render(pairs.ws + pairs.direction).clamp(-1, 1))
    # One z per picture: all layers have the same w.
    assert (pairs.ws == pairs.ws[:, :1]).all()


def test_a_step_depends_on_seed_and_step_alone(files):
    task = make_task(files, latents={"style_mixing": 0.5})
    first, again, other = draw(task, 3), draw(task, 3), draw(task, 4)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.direction, again.direction)
    assert not torch.equal(first.direction, other.direction)


def test_directions_join_one_by_one(files):
    task = make_task(
        files,
        directions={
            "file": str(files / "directions.safetensors"),
            "names": ["d2", "d0", "d1"],
            "join_every": 10,
            "random_share": 0.0,
            "strength": 1.5,
        },
    )
    assert [task.known_count(step) for step in (0, 9, 10, 25, 999)] == [1, 1, 2, 3, 3]
    early = draw(task, 0, 16).direction
    late = draw(task, 30, 16).direction
    assert set(early.abs().sum((0, 1)).nonzero().flatten().tolist()) == {2}
    assert set(late.abs().sum((0, 1)).nonzero().flatten().tolist()) == {0, 1, 2}
    assert 0.5 < late.abs().max() <= 1.5
    assert (late > 0).any()
    assert (late < 0).any()


def test_random_directions_lead_towards_another_latent_on_a_run_of_layers(files):
    task = make_task(files, directions={"random_layers": 1.0})
    for direction in draw(task, 0, 16).direction:
        moved = direction.abs().sum(1).nonzero().flatten().tolist()
        assert moved == list(range(moved[0], moved[-1] + 1))


def test_the_samples_are_pairs_and_the_export_loads(files, tmp_path):
    task = make_task(files)
    averages = {"model": task.model.eval()}
    with torch.no_grad():
        assert task.samples(averages).shape == (36, 3, 32, 32)
    task.export(averages, tmp_path, {"step": 1})
    saved = checkpoints.load(tmp_path / "inversion.safetensors", kind="mambastyle")
    assert checkpoints.config_from_dict(MambaStyleConfig, saved.config) == MODEL
    task.model.load_state_dict(saved.tensors)


def test_the_loop_runs_the_task(files, tmp_path):
    values = {
        "name": "loop",
        "output": str(tmp_path),
        "steps": 2,
        "batch": 2,
        "model": MODEL,
        "ema_decay": 0.9,
    }
    values |= {"generator": str(files / "generator.safetensors"), "l2_size": None, "clip_gradient": 1.0}
    config = check(values, InversionConfig, "test")
    folder = train(config, lambda device: InversionTask(config, device))
    assert len(find_checkpoints(folder)) == 1
    assert (folder / "inversion.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"base": "kaokore64"}}, "the model's num_ws is 10, and this generator needs 8"),
        ({"model": "kaokor"}, "no model 'kaokor': choose among paper, kaokore64"),
        ({"real_share": 0.5}, "name the pictures with pack"),
        ({"weights": {"edit_perceptual": 1.0}}, "edit_perceptual needs a judge named perceptual"),
        ({"judges": {"identity": {"network": "small"}}}, "needs a file"),
        ({"weights": {"cycel": 1.0}}, "did you mean cycle"),
    ],
)
def test_mistakes_in_a_run_file_say_what_to_do(files, changes, message):
    with pytest.raises(ValueError, match=message):
        make_task(files, **changes)


def test_a_model_section_may_name_a_base_and_what_differs():
    values = {"name": "x", "steps": 1, "batch": 2, "generator": "g"}
    config = check(values | {"model": {"base": "kaokore64", "mixer": "vit"}}, InversionConfig, "test")
    assert config.model == MambaStyleConfig(**{**KAOKORE64.__dict__, "mixer": "vit"})
