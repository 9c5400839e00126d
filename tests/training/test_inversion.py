"""The inversion task: what a step draws, which terms it gives, and that it trains what it should."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.published_files import MODEL

import mambastyle as ms
from mambastyle import checkpoints, images
from mambastyle.features import SmallFeatures, SmallFeaturesConfig, small
from mambastyle.latents.directions import Direction, Directions
from mambastyle.losses.inversion import composite
from mambastyle.models.mambastyle import CONFIGS, KAOKORE64, Inversion, MambaStyleConfig
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.training.config import check, read_run_file
from mambastyle.training.inversion import InversionConfig, InversionTask, Pairs
from mambastyle.training.loop import find_checkpoints, train
from mambastyle.training.random import StepRandom

GENERATOR = StyleGAN2Config(
    resolution=32, z_dim=8, w_dim=24, mapping_layers=2, widths=(8, 8, 12, 8), feature_layer=0
)
CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[2] / "recipes"
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


def test_the_rate_grows_over_the_warm_up_then_falls_and_restarts_and_a_saved_state_goes_on(files):
    settings = {"learning_rate": 1.0, "restart_steps": 4, "restart_factor": 2, "minimum_learning_rate": 0.0}

    def rates(player, steps) -> list[float]:
        found = []
        for _ in range(steps):
            found.append(player.optimizer.param_groups[0]["lr"])
            player.optimizer.step()
            player.scheduler.step()
        return found

    (player,) = make_task(files, **settings).players
    cosine = [0.5 + 0.5 * math.cos(math.pi * step / 4) for step in range(4)]
    published = rates(player, 5)
    assert published == pytest.approx([*cosine, 1])
    (player,) = make_task(files, **settings, warm_up=5).players
    assert rates(player, 7) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, *cosine[:2]])
    (resumed,) = make_task(files, **settings, warm_up=5).players
    resumed.optimizer.load_state_dict(player.optimizer.state_dict())
    resumed.scheduler.load_state_dict(player.scheduler.state_dict())
    assert rates(resumed, 3) == pytest.approx([*cosine[2:], 1])


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


def test_a_picture_whose_feature_is_dropped_is_held_to_its_latents_alone(files):
    task = make_task(files, feature_dropout=0.5)
    random = StepRandom(0, 0, 4)
    kept = random.uniform("feature dropout") >= 0.5
    assert kept.any()
    assert not kept.all()
    found = task.terms(random)["l2"]

    pairs = draw(task)
    ws, feature = task.encode(torch.cat([pairs.image, pairs.edited]))  # one set of batch statistics
    inverted = task.model.edit(Inversion(ws[:4], feature[:4]))
    with_feature = task.render(inverted.ws + task.w_avg, inverted.feature)
    alone = task.render(inverted.ws + task.w_avg)
    expected = torch.where(kept[:, None, None, None], with_feature, alone)
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(expected, pairs.image))


def test_a_model_without_a_feature_trains_on_latents_alone(files, tmp_path):
    # A layer that this generator lacks does not matter where no feature enters.
    model = replace(MODEL, feature=False, fuser=False, feature_layer=9)
    task = make_task(files, model=model, feature_target="generator", weights={"edit_l2": 1.0})
    terms = task.terms(StepRandom(0, 0, 4))
    assert set(terms) == {"l2", "smooth_l1", "w_norm", "edit_l2"} | EDIT_TERMS - {"edit_feature"}
    torch.stack(list(terms.values())).sum().backward()
    dead = [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert dead == []
    with torch.no_grad():
        assert task.samples({"model": task.model.eval()}).shape == (36, 3, 32, 32)
    task.export({"model": task.model}, tmp_path, {})
    shutil.copy(files / "generator.safetensors", tmp_path)
    inverter = ms.load(tmp_path, device="cpu")
    inverted = inverter.invert(torch.zeros(1, 3, 32, 32))
    assert inverted.feature is None
    edited = inverter.edit(inverted, [(Direction.from_w("d", torch.ones(24), 8), 1.0)])
    assert not torch.equal(
        inverter.render(edited, output="tensor"), inverter.render(inverted, output="tensor")
    )
    inverter.save_inversion(tmp_path / "one.safetensors", edited)
    assert inverter.load_inversion(tmp_path / "one.safetensors").feature is None


def test_the_feature_may_enter_at_a_coarser_layer(files):
    model = replace(MODEL, strides=(2, 2, 1, 2), feature_layer=3, feature_channels=8)
    task = make_task(files, model=model, feature_target="generator")
    terms = task.terms(StepRandom(0, 0, 4))
    assert terms["feature"] > 0
    assert task.encode(torch.zeros(1, 3, 32, 32)).feature.shape == (1, 8, 8, 8)


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


def test_an_edit_of_a_real_picture_is_held_to_a_composite(files, pack):
    weights = dict.fromkeys(("cycle", "total_variation", "edit_consistency", "edit_feature"), 0.0)
    settings = {"pack": str(pack), "real_share": 0.5, "edit_share": 0.5}
    task = make_task(files, weights=weights | {"real_edit_l2": 1.0}, **settings)
    pairs = draw(task)
    found = task.terms(StepRandom(0, 0, 4))["real_edit_l2"]

    encoded = task.encode(pairs.image)
    at = pairs.edits
    edited = task.edit(Inversion(encoded.ws[at], encoded.feature[at]), pairs.direction[at])
    one = at < pairs.real
    ws = edited.ws[one] + task.w_avg
    wanted = composite(pairs.image[at][one], task.render(ws - pairs.direction[at][one]), task.render(ws))
    shown = task.render(edited.ws + task.w_avg, edited.feature)[one]
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(shown, wanted))

    found.backward()
    assert any(p.grad is not None and p.grad.abs().any() for p in task.model.fuser.parameters())
    alone = make_task(files, variant="w-plus", weights=weights | {"real_edit_l2": 1.0}, **settings)
    assert "real_edit_l2" not in alone.terms(StepRandom(0, 0, 4))


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


def test_a_run_starts_from_a_checkpoint_of_its_own_sizes(files, tmp_path):
    first = make_task(files)
    first.export({"model": first.model}, tmp_path, {"step": 0})
    torch.manual_seed(1)
    values = first.config.model_dump() | {"start": str(tmp_path / "inversion.safetensors"), "model": MODEL}
    second = InversionTask(check(values, InversionConfig, "test"), CPU)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="other sizes"):
        make_task(files, start=values["start"], model=replace(MODEL, state=3))


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


def run_config(files, folder, **changes) -> InversionConfig:
    """A whole run of the task, for the loop."""
    values = {"name": "run", "output": str(folder), "steps": 4, "batch": 4, "model": MODEL, "ema_decay": 0.9}
    values |= {"generator": str(files / "generator.safetensors"), "l2_size": None, "smooth_l1_sizes": [None]}
    return check(values | changes, InversionConfig, "test")


def test_ten_steps_lower_the_loss(files, tmp_path):
    tasks = []

    def make(device):
        tasks.append(InversionTask(config, device))
        return tasks[-1]

    def loss(task) -> float:
        """Of pictures that no step draws; the step's own batch differs from step to step."""
        task.model.eval()
        with torch.no_grad():
            terms = task.terms(StepRandom(7, 0, 16))
        return float(sum(task.weights[name] * term for name, term in terms.items()))

    config = run_config(files, tmp_path, steps=10, learning_rate=2e-3)
    torch.manual_seed(config.seed)
    before = loss(InversionTask(config, CPU))
    train(config, make)
    assert loss(tasks[0]) < 0.9 * before


def test_a_run_that_goes_on_ends_with_the_same_weights(files, tmp_path):
    for folder, stops in (("whole", [4]), ("parts", [2, 4])):
        for steps in stops:
            config = run_config(files, tmp_path / folder, steps=steps, ema_decay=0.5)
            train(config, lambda device, config=config: InversionTask(config, device))
    whole, parts = (
        checkpoints.load(tmp_path / folder / "run" / "inversion.safetensors").tensors
        for folder in ("whole", "parts")
    )
    for name, value in whole.items():
        assert torch.equal(value, parts[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_neither_gradients_nor_statistics(files, precision):
    found = []
    for kept in (False, True):
        task = make_task(files, gradient_checkpointing=kept)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            terms = task.terms(StepRandom(0, 0, 4))
        torch.stack([task.weights[name] * term for name, term in terms.items()]).sum().backward()
        gradients = {name: p.grad for name, p in task.model.named_parameters()}
        found.append(gradients | dict(task.model.named_buffers()))
    plain, again = found
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_pictures_of_a_frame_lose_the_bars_and_get_them_back(files):
    task = make_task(files, model=replace(MODEL, frame=(24, 32)))
    pairs = draw(task)
    assert pairs.image.shape == (4, 3, 24, 32)
    assert pairs.edited is not None
    assert pairs.edited.shape == (4, 3, 24, 32)
    prepared = task.prepare(pairs.image)
    assert prepared.shape == (4, 3, 32, 32)
    assert (prepared[:, :, :4] == -1).all()
    assert (prepared[:, :, 28:] == -1).all()
    torch.testing.assert_close(prepared[:, :, 4:28], pairs.image)
    assert set(task.terms(StepRandom(0, 0, 4))) >= EDIT_TERMS


PUBLISHED_WEIGHTS = {
    "l2": 5.0, "smooth_l1": 5.0, "perceptual": 0.8, "identity": 0.1, "structure": 1.0, "w_norm": 0.005,
    "feature": 1.0, "edit_feature": 1.0, "total_variation": 4.0, "cycle": 5.0, "edit_consistency": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("name", ["faces1024", "faces256", "cars512"])
def test_the_recipes_of_the_full_sizes_have_the_published_loss(name):
    config = read_run_file(RECIPES / f"{name}.yaml", InversionConfig)
    assert config.model == CONFIGS[name]
    faces = {"identity": 0.0, "structure": 0.0} if name == "cars512" else {}
    weights = {key: value for key, value in config.weights.model_dump().items() if value}
    assert weights == {key: value for key, value in (PUBLISHED_WEIGHTS | faces).items() if value}
    assert set(config.judges) == {"perceptual", "identity", "structure"} - set(faces)
    assert (config.learning_rate, config.batch, config.steps) == (5e-4, 16, 510_000)


def test_a_judge_without_weight_needs_no_file(files):
    section = {"network": "arcface", "file": "nowhere.pth"}
    task = make_task(files, judges={"identity": section}, weights={"identity": 0})
    assert task.judges == {}


def test_a_term_without_its_judge_is_said(files, caplog):
    make_task(files, weights={"structure": 0})
    assert "no judge for perceptual, identity, so the loss lacks them" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"base": "kaokore64"}}, "the model's num_ws is 10, and this generator needs 8"),
        ({"model": "kaokor"}, "no model 'kaokor': choose among faces1024, faces256"),
        ({"variant": "no-fusser"}, "no variant 'no-fusser': did you mean 'no-fuser'"),
        ({"model": replace(MODEL, feature_layer=3)}, "feature_channels is 12, and this generator needs 8"),
        ({"real_share": 0.5, "model": replace(MODEL, frame=(24, 32))}, "packs hold squares"),
        ({"real_share": 0.5}, "name the pictures with pack"),
        ({"weights": {"edit_perceptual": 1.0}}, "edit_perceptual needs a judge named perceptual"),
        ({"weights": {"real_edit_perceptual": 1.0}}, "real_edit_perceptual needs a judge named perceptual"),
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


def test_a_run_file_may_name_a_row_of_the_ablation():
    values = {"name": "x", "steps": 1, "batch": 2, "generator": "g", "model": "kaokore64"}
    config = check(values | {"variant": "vit"}, InversionConfig, "test")
    assert config.model == replace(KAOKORE64, mixer="vit")
    config = check(values | {"variant": "no-le", "weights": {"l2": 3.0}}, InversionConfig, "test")
    assert (config.model, config.weights.l2, config.weights.edit_consistency) == (KAOKORE64, 3.0, 0.0)
    # What a run saves is read again.
    assert check(config.model_dump(mode="json"), InversionConfig, "run.yaml") == config


def test_the_baseline_recipe_differs_from_the_preset_in_its_model_alone(request):
    recipes = request.config.rootpath / "recipes"
    preset = read_run_file(recipes / "inversion-kaokore64.yaml", InversionConfig)
    alone = read_run_file(recipes / "inversion-kaokore64-w.yaml", InversionConfig)
    assert alone.model == replace(preset.model, feature=False, fuser=False)
    changed = {"name", "model", "variant"}
    assert alone.model_dump(exclude=changed) == preset.model_dump(exclude=changed)
