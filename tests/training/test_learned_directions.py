"""Directions learned from labelled pictures: edits reach the label both ways, and only free layers move."""

import csv
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mambastyle import checkpoints
from mambastyle.api import load_inverter
from mambastyle.features import small
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig
from mambastyle.latents.directions import Direction, Directions
from mambastyle.training.learned_directions import Settings, learn_direction, learn_from_pack, places

COUNT = 80


@pytest.fixture(scope="module")
def inverter(tiny_model_folder):
    inverter = load_inverter(tiny_model_folder)
    # The affine layers of a fresh generator hardly react; a trained one does.
    for name, parameter in inverter.generator.named_parameters():
        if "affine.weight" in name:
            parameter.data.mul_(5)
    return inverter


@pytest.fixture(scope="module")
def labelled(inverter):
    """Pictures (count 3 16 16) in bytes, and of which of them the inversion is brighter than most."""
    random = torch.Generator().manual_seed(3)
    pictures = torch.randint(256, (COUNT, 3, 16, 16), dtype=torch.uint8, generator=random)
    brightness = inverted(inverter, pictures).mean((1, 2, 3))
    return pictures, brightness > brightness.median()


def inverted(inverter, pictures, offset=0.0):
    found = inverter.invert(pictures.float() / 127.5 - 1)
    return inverter.render(replace(found, offset=found.offset + offset), output="tensor").clone()


def classifier(inverter, labelled, head: Head) -> SmallFeatures:
    """Knows bright from dark: its head is the difference of the two sides' mean features."""
    pictures, bright = labelled
    torch.manual_seed(1)
    network = SmallFeatures(SmallFeaturesConfig(resolution=16, widths=(8, 12), blocks=(1, 1), heads=(head,)))
    image = inverted(inverter, pictures)
    for _ in range(20):
        network(image)
    network.eval().requires_grad_(False)
    features = network.pooled(image)
    normal = features[bright].mean(0) - features[~bright].mean(0)
    middle = (features[bright].mean(0) + features[~bright].mean(0)) / 2
    normal = normal / normal.norm().square() * 4
    layer = network.heads[head.name]
    layer.weight.zero_()
    layer.bias.fill_(-10.0 if len(head.labels) > 2 else 0.0)  # labels beyond the second: never likely
    layer.bias[:2] = torch.stack([normal @ middle, -(normal @ middle)]) / 2
    layer.weight[:2] = torch.stack([-normal, normal]) / 2
    return network


@pytest.fixture(scope="module")
def two(inverter, labelled):
    return classifier(inverter, labelled, Head("light", ("dark", "bright")))


@pytest.fixture(scope="module")
def three(inverter, labelled):
    return classifier(inverter, labelled, Head("light", ("dark", "bright", "black")))


def learn(inverter, labelled, network, label="bright", **options) -> Direction:
    pictures, bright = labelled
    settings = Settings(steps=60, batch=8, learning_rate=1.0, likeness=0.0, places=0.0, colour=0.0)
    return learn_direction(
        "light",
        pictures,
        bright if label == "bright" else ~bright,
        model=inverter.model,
        generator=inverter.generator,
        classifier=network,
        head="light",
        label=label,
        **{"settings": settings, "layers": (0, 4)} | options,
    )


def test_two_labels_are_reached_both_ways(inverter, labelled, two):
    pictures, bright = labelled
    found = learn(inverter, labelled, two)
    assert found.name == "light"
    assert found.description == "dark to bright; learned from 40 pictures with and 40 without it"
    for label, sign, sources in ((1, 1.0, pictures[~bright]), (0, -1.0, pictures[bright])):
        before = two.predict(inverted(inverter, sources), "light") == label
        after = two.predict(inverted(inverter, sources, found.offset(sign * 2.5)), "light") == label
        assert before.float().mean() < 0.4
        assert after.float().mean() > 0.9


def test_only_free_layers_move_and_a_seed_repeats(inverter, labelled, three):
    few = Settings(steps=3, batch=4)
    found = learn(inverter, labelled, three, settings=few, layers=(1, 3))
    assert found.layers == (1, 3)
    assert not found.vector[[0, 3, 4, 5]].any()
    assert found.vector[1:3].any(1).all()
    again = learn(inverter, labelled, three, settings=few, layers=(1, 3))
    torch.testing.assert_close(again.vector, found.vector, rtol=0, atol=0)
    other = learn(inverter, labelled, three, settings=few, layers=(1, 3), seed=1)
    assert not torch.equal(other.vector, found.vector)
    # By default the three finest of six stay.
    assert learn(inverter, labelled, three, settings=few, layers=None).layers == (0, 3)


def test_learning_begins_where_it_is_told_and_networks_are_left_alone(inverter, labelled, three):
    before = {name: tensor.clone() for name, tensor in inverter.generator.state_dict().items()}
    start = Direction("light", torch.randn(6, 12))
    still = Settings(steps=1, batch=4, learning_rate=0.0)
    found = learn(inverter, labelled, three, settings=still, start=start, layers=(0, 6))
    torch.testing.assert_close(found.vector, start.vector)
    after = inverter.generator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in inverter.model.parameters())


def test_places_are_mean_colours_of_a_grid():
    image = torch.zeros(1, 3, 16, 16)
    image[0, 1, :2, 2:4] = 1
    found = places(image).view(3, 8, 8)
    assert found[1, 0, 1] == 1
    assert found.sum() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "green"}, "has no label 'green': it has dark, bright, black"),
        ({"has": torch.arange(COUNT) < 3}, "3 pictures with 'bright', expected 10 or more"),
        ({"has": torch.ones(COUNT, dtype=torch.bool)}, "0 pictures without 'bright'"),
    ],
)
def test_what_cannot_be_learned_is_said(inverter, labelled, three, change, message):
    given = {"has": labelled[1], "label": "bright"} | change
    with pytest.raises(ValueError, match=message):
        learn_direction(
            "light",
            labelled[0],
            given["has"],
            model=inverter.model,
            generator=inverter.generator,
            classifier=three,
            head="light",
            label=given["label"],
        )


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch": 1}, {"strengths": (2.0, 1.0)}])
def test_settings_are_checked(options):
    with pytest.raises(ValueError, match="expected"):
        Settings(**options)


@pytest.fixture
def pack(tmp_path, labelled):
    """A folder with labels.csv: a train split with all pictures, and two more."""
    pictures, bright = labelled
    rows = [("file", "split", "light")]
    for index, (picture, is_bright) in enumerate(zip(pictures, bright, strict=True)):
        name = f"{index}.png"
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / name)
        rows.append((name, "train", "bright" if is_bright else "dark"))
    rows[-1] = (rows[-1][0], "test", rows[-1][2])
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return tmp_path


def test_a_pack_gives_a_direction_for_each_label(inverter, pack, two, three):
    few = Settings(steps=1, batch=4)
    parts = (pack, inverter.model, inverter.generator)
    found = list(learn_from_pack(*parts, two, heads=["light"], settings=few))
    assert [direction.name for direction in found] == ["light"]
    one = list(learn_from_pack(*parts, three, heads=["light"], only=["bright"], settings=few))
    assert [direction.name for direction in one] == ["bright"]
    assert list(learn_from_pack(*parts, two, heads=["light"], done=["light"], settings=few)) == []
    sizes = []
    for half in ("first", "second", "both"):
        (direction,) = learn_from_pack(*parts, two, heads=["light"], half=half, settings=few)
        sizes.append(sum(int(word) for word in direction.description.split() if word.isdigit()))
    assert sizes[0] + sizes[1] == sizes[2] == COUNT - 1
    with pytest.raises(ValueError, match="no label 'grey': the heads light have"):
        list(learn_from_pack(*parts, two, heads=["light"], only=["grey"], settings=few))
    with pytest.raises(ValueError, match="no head 'age'"):
        list(learn_from_pack(*parts, two, heads=["age"], settings=few))


def test_the_command_writes_and_goes_on(tiny_model_folder, tmp_path, pack, two, capsys, monkeypatch):
    from mambastyle.cli import main

    small.save(tmp_path / "judge.safetensors", two)
    out = tmp_path / "learned.safetensors"
    arguments = ["directions", "learn", out, "--pack", pack, "-m", tiny_model_folder, "--head", "light"]
    arguments += [
        "--steps",
        1,
        "--batch",
        4,
        "--layers",
        "0:2",
        "--classifier",
        tmp_path / "judge.safetensors",
    ]

    def run(*more) -> int:
        monkeypatch.setattr("sys.argv", ["mambastyle", *map(str, [*arguments, *more])])
        with pytest.raises(SystemExit) as stopped:
            main()
        return stopped.value.code

    assert run() == 0
    found = Directions.load(out)
    assert list(found) == ["light"]
    assert found["light"].layers == (0, 2)
    generator = checkpoints.load(tiny_model_folder / "generator.safetensors")
    assert found.generator == generator.sha256
    card = checkpoints.read_header(out).card
    assert (card["command"], card["steps"], card["batch"]) == ("directions learn", 1, 4)
    written = out.read_bytes()
    assert run() == 0  # what is there stays
    assert out.read_bytes() == written
    assert run("--layers", "two") == 1
    assert "expected FIRST:STOP" in capsys.readouterr().err
    Directions(found.values(), generator="0" * 64).save(tmp_path / "other.safetensors")
    assert run("--start", tmp_path / "other.safetensors") == 1
    assert "begin at those of" in capsys.readouterr().err
    Directions(found.values(), generator="0" * 64).save(out)
    assert run() == 1
    assert "another generator" in capsys.readouterr().err


def test_likeness_brings_the_set_towards_the_other(inverter, labelled, three):
    """Without the classifier's word: the mean features of edits come nearer to those of the other side."""
    pictures, bright = labelled
    alike = Settings(steps=40, batch=16, attribute=0.0, places=0.0, colour=0.0, learning_rate=0.3)
    found = learn(inverter, labelled, three, settings=alike)
    aim = three.pooled(pictures[bright].float() / 127.5 - 1).mean(0)
    before, after = (
        (three.pooled(inverted(inverter, pictures[~bright], offset)).mean(0) - aim).norm()
        for offset in (torch.zeros(6, 12), found.offset(1.75))
    )
    assert after < 0.8 * before
