"""The style-transfer task: what a step draws, which terms it gives, that it learns, resumes and exports."""

import json

import pytest
import torch

from mambastyle import checkpoints, images
from mambastyle.models.mamba_st import MambaST, MambaSTConfig
from mambastyle.models.samam import SaMam, SaMamConfig
from mambastyle.training.config import check, read_run_file
from mambastyle.training.loop import find_checkpoints, train
from mambastyle.training.random import StepRandom
from mambastyle.training.style_transfer import (
    CONFIGS,
    StyleTransferConfig,
    StyleTransferTask,
    crops,
    vary_colours,
)

CPU = torch.device("cpu")
DECODER = [[8], [8, 6], [4, 3]]
MODELS = {
    "samam": {"dim": 16, "state": 2, "patch": 4, "squeeze": 4, "style_dim": 4, "decoder": DECODER}
    | {"encoder_layers": 1, "groups": 1, "group_layers": 1, "embedder_steps": 2},
    "mamba-st": {"dim": 16, "state": 2, "patch": 4, "encoder_layers": 1, "decoder_layers": 1}
    | {"decoder": DECODER},
}
TERMS = {"content", "style", "identity_1", "identity_2"}


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    """Five contents and seven styles of 40 px."""
    folders = {}
    for kind, count in (("content", 5), ("style", 7)):
        folder = tmp_path_factory.mktemp(kind)
        random = torch.Generator().manual_seed(count)
        for number in range(count):
            coarse = torch.rand(3, 5, 5, generator=random) * 2 - 1
            images.write(folder / f"{number}.png", images.resize(coarse, 40, 40))
        rows = "".join(f"{number}.png\n" for number in range(count))
        (folder / "labels.csv").write_text(f"file\n{rows}")
        folders[kind] = str(folder)
    return folders


@pytest.fixture
def _judge(monkeypatch):
    """Two fixed random convolutions in the place of SqueezeNet, whose weights a test run may not have."""
    weights = [torch.randn(4, 3, 3, 3), torch.randn(6, 4, 3, 3)]

    class Maps(torch.nn.Module):
        def __init__(self, path=None) -> None:
            super().__init__()

        def forward(self, image, layers):
            first = torch.relu(torch.nn.functional.conv2d(image, weights[0], stride=2))
            found = {"relu1": first, "fire2": torch.nn.functional.conv2d(first, weights[1], stride=2)}
            return {name: 50 * found[name] for name in found if name in set(layers)}

    monkeypatch.setattr("mambastyle.training.style_transfer.SqueezeNetFeatures", Maps)


def make_config(packs, network="samam", **changes) -> StyleTransferConfig:
    values = {
        "name": "test",
        "steps": 3,
        "batch": 4,
        "network": network,
        "model": MODELS[network],
        "pictures": {**packs, "size": 36, "crop": 24},
        "judge": {"content": ["fire2"], "style": ["relu1", "fire2"]},
    }
    return check(values | changes, StyleTransferConfig, "test")


def make_task(packs, network="samam", **changes) -> StyleTransferTask:
    torch.manual_seed(0)
    return StyleTransferTask(make_config(packs, network, **changes), CPU)


@pytest.mark.usefixtures("_judge")
@pytest.mark.parametrize("network", MODELS)
def test_a_step_gives_the_published_terms(packs, network):
    task = make_task(packs, network)
    (player,) = task.players
    terms = player.terms(StepRandom(0, 0, 4))
    assert set(terms) == TERMS
    loss = torch.stack([player.weights[name] * term for name, term in terms.items()]).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())


@pytest.mark.usefixtures("_judge")
def test_terms_follow_their_weights(packs):
    weights = {"identity_1": 0, "identity_2": 0, "pixel_style": 1.0, "total_variation": 1.0, "grid": 1.0}
    terms = make_task(packs, weights=weights).terms(StepRandom(0, 0, 4))
    assert set(terms) == {"content", "style", "pixel_style", "total_variation", "grid"}
    terms = make_task(packs, weights={"content": 0, "style": 0}, identity_share=0.3).terms(
        StepRandom(0, 0, 4)
    )
    assert set(terms) == {"identity_1", "identity_2"}


@pytest.mark.usefixtures("_judge")
def test_the_grid_is_looked_at_in_as_many_patches_as_asked_for(packs):
    one, two = (
        make_task(packs, weights={"grid": 1.0}, grid_patches=patches).terms(StepRandom(0, 0, 4))
        for patches in (1, 2)
    )
    assert one["grid"] != two["grid"]
    assert one["style"] == two["style"]


@pytest.mark.usefixtures("_judge")
def test_two_draws_of_the_shuffles_are_compared(packs):
    off = {"content": 0, "style": 0, "identity_1": 0, "identity_2": 0}
    weights = off | {"pixel_style": 1, "shuffle": 5.0}
    task = make_task(packs, "mamba-st", weights=weights, identity_share=0.5)
    terms = task.terms(StepRandom(0, 0, 4))
    assert set(terms) == {"pixel_style", "shuffle"}
    assert terms["shuffle"] > 0
    terms["shuffle"].backward()
    assert task.model.st_decoder[0].ss2d.in_style_proj.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="needs a network that shuffles"):
        make_config(packs, "samam", weights={"shuffle": 1.0})
    with pytest.raises(ValueError, match="needs a network that shuffles"):
        make_config(
            packs, "mamba-st", model=MODELS["mamba-st"] | {"shuffle": False}, weights={"shuffle": 1.0}
        )


@pytest.mark.usefixtures("_judge")
@pytest.mark.parametrize("network", MODELS)
def test_training_lowers_the_loss(packs, network):
    task = make_task(packs, network, learning_rate=3e-3, decay=0.0)
    (player,) = task.players

    def step() -> float:
        terms = player.terms(StepRandom(0, 0, 4))
        loss = torch.stack([player.weights[name] * term for name, term in terms.items()]).sum()
        player.optimizer.zero_grad()
        loss.backward()
        player.optimizer.step()
        return loss.item()

    first = step()
    for _ in range(10):
        last = step()
    assert last < 0.9 * first


@pytest.mark.usefixtures("_judge")
def test_a_step_depends_on_seed_and_step_alone(packs):
    task = make_task(packs)
    first, again, other = (task.pairs(StepRandom(0, step, 4)) for step in (3, 3, 4))
    assert first.content.shape == first.style.shape == (4, 3, 24, 24)
    assert torch.equal(first.content, again.content)
    assert torch.equal(first.style, again.style)
    assert not torch.equal(first.style, other.style)


def test_crops_lie_inside_and_flip():
    pictures = torch.arange(10, dtype=torch.uint8).expand(2, 3, 10, 10).contiguous()
    draws = torch.tensor([[0.0, 0.0, 0.0, 0.9], [0.0, 0.99, 0.99, 0.1]])
    cut = ((crops(pictures, 4, draws, zoom=False) + 1) * 127.5).round()
    assert cut[0, 0, 0].tolist() == [0, 1, 2, 3]
    assert cut[1, 0, 0].tolist() == [9, 8, 7, 6]
    whole = crops(pictures, 4, torch.tensor([[0.999, 0.5, 0.5, 0.9]]).expand(2, 4), zoom=True)
    assert whole.shape == (2, 3, 4, 4)
    torch.testing.assert_close(whole.mean(), crops(pictures, 10, draws, zoom=False).mean(), rtol=1e-3, atol=0)


def test_colours_turn_about_grey():
    grey = torch.linspace(-0.5, 0.5, 20).expand(1, 3, 4, 20)
    # log(0.8) / log(1.5625) = -0.5: the middle draw leaves contrast as it is.
    turned = vary_colours(grey, torch.tensor([[0.9, 0.5, 0.9, 0.5]]))
    torch.testing.assert_close(turned, grey)
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 0.6
    turned = vary_colours(red, torch.tensor([[0.9, 0.5, 0.5, 0.5]]))
    assert (turned[0, 1] - turned[0, 2]).abs().mean() > 0.05
    torch.testing.assert_close(turned.mean(), red.mean())


@pytest.mark.usefixtures("_judge")
@pytest.mark.parametrize("network", MODELS)
def test_a_run_resumes_exactly_and_exports_what_loads(packs, network, tmp_path):
    def run(folder: str, steps: int) -> StyleTransferTask:
        config = make_config(
            packs, network, output=str(tmp_path), name=folder, steps=steps, checkpoint_every=2
        )
        tasks = []

        def make(device: torch.device) -> StyleTransferTask:
            torch.manual_seed(0)
            tasks.append(StyleTransferTask(config, CPU))
            return tasks[0]

        train(config, make)
        return tasks[0]

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert len(find_checkpoints(tmp_path / "parts")) == 2
    assert list((tmp_path / "parts" / "samples").glob("*.png"))

    checkpoint = checkpoints.load(tmp_path / "parts" / f"{network}.safetensors", kind=network)
    kinds = {"samam": (SaMamConfig, SaMam), "mamba-st": (MambaSTConfig, MambaST)}
    config_type, model_type = kinds[network]
    model = model_type(checkpoints.config_from_dict(config_type, checkpoint.config))
    model.load_state_dict(checkpoint.tensors)
    assert json.loads((tmp_path / "parts" / "log.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.usefixtures("_judge")
def test_a_run_starts_from_a_checkpoint_of_its_own_sizes(packs, tmp_path):
    first = make_task(packs)
    card = {"step": 0}
    first.export({"model": first.model}, tmp_path, card)
    start = str(tmp_path / "samam.safetensors")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        second = StyleTransferTask(make_config(packs, start=start), CPU)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="other sizes"):
        make_task(packs, start=start, model=MODELS["samam"] | {"dim": 20})
    # Neither of these has to do with sizes.
    make_task(packs, start=start, model=MODELS["samam"] | {"grain": 0.1, "token_limit": 3.0})


@pytest.mark.usefixtures("_judge")
def test_contents_have_the_grain_of_the_model_and_their_targets_none(packs):
    task = make_task(packs, model=MODELS["samam"] | {"grain": 0.1})
    seen, judged = [], []
    task.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network = task.judge.maps
    task.judge.maps = lambda image, names: judged.append(image) or network(image, names)
    task.terms(StepRandom(0, 0, 4))
    content = task.pairs(StepRandom(0, 0, 4)).content
    assert torch.equal(judged[0], content)
    assert float((seen[0] - content).std()) == pytest.approx(0.1, rel=0.1)
    # The parts of a batch on two processes have the grain that they have on one.
    whole = StepRandom(0, 0, 4).normal("grain shuffle", 3, 2, 2)
    part = StepRandom(0, 0, 4, shard=1, shards=2).normal("grain shuffle", 3, 2, 2)
    assert torch.equal(part, whole[2:])


@pytest.mark.parametrize("stage", ["-1", "-2", ""])
@pytest.mark.parametrize("network", ["samam", "mamba-st"])
def test_the_recipes_are_valid(network, stage, request):
    name = f"{network}-small{stage}"
    config = read_run_file(request.config.rootpath / "recipes" / f"{name}.yaml", StyleTransferConfig)
    assert (config.name, config.network) == (name, network)
    assert config.model == CONFIGS[network]["small"]
    assert (config.start is None) == (stage == "-1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "large"},
            "model: Value error, no model 'large' of samam: choose among paper, patch4, small",
        ),
        ({"model": {"base": "small", "dims": 3}}, "did you mean .*dim"),
        ({"weigths": {}}, "unknown key weigths: did you mean weights"),
        ({"pictures": {"content": "a", "style": "b", "size": 64, "crop": 80}}, "crop 80 must not be larger"),
    ],
)
def test_mistakes_in_a_run_file_say_why(packs, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(packs, **changes)
