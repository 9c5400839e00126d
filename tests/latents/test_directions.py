"""Directions move latents by natural units, combine, restrict to layers, and come back from a file."""

import pytest
import torch

from mambastyle.checkpoints import CheckpointError
from mambastyle.latents.directions import (
    Direction,
    DirectionError,
    Directions,
    UnknownDirectionError,
    check_strength,
    combine,
)


@pytest.fixture
def directions() -> Directions:
    vector = torch.randn(6, 4)
    age = Direction("age", vector, layers=(1, 3), scale=2.0, description="older")
    return Directions([Direction.from_w("gender", torch.randn(4), 6), age], generator="ab" * 32)


def test_an_offset_is_strength_times_scale_times_vector_on_its_layers(directions):
    age = directions["age"]
    offset = age.offset(1.5)
    torch.testing.assert_close(offset[1:3], 3.0 * age.vector[1:3])
    assert not offset[:1].any()
    assert not offset[3:].any()
    # The direction itself stays as it was.
    assert age.vector.all()


def test_each_picture_may_have_its_own_strength(directions):
    gender = directions["gender"]
    ws = torch.randn(2, 6, 4)
    moved = gender.apply(ws, torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(moved[0], gender.apply(ws[:1], 1.0)[0])
    torch.testing.assert_close(moved[1], gender.apply(ws[1:], -2.0)[0])
    torch.testing.assert_close(gender.apply(ws, 0.0), ws)


def test_a_direction_of_w_is_the_same_in_all_layers_until_it_is_restricted(directions):
    gender = directions["gender"]
    assert gender.space == "w"
    assert (gender.vector == gender.vector[0]).all()
    coarse = gender.on_layers(0, 2)
    assert not coarse.offset()[2:].any()
    torch.testing.assert_close(coarse.offset() + gender.on_layers(2, 6).offset(), gender.offset())


def test_a_combination_does_what_its_parts_do_together(directions):
    ws = torch.randn(2, 6, 4)
    both = combine([(directions["gender"], 1.5), (directions["age"], -1.0)], "both")
    one_by_one = directions["age"].apply(directions["gender"].apply(ws, 1.5), -1.0)
    torch.testing.assert_close(both.apply(ws), one_by_one)
    torch.testing.assert_close(directions.offset({"gender": 1.5, "age": -1.0}), both.vector)
    pairs = [("gender", 1.5), (directions["age"], -1.0)]
    torch.testing.assert_close(directions.offset(pairs), both.vector)
    assert both.description == "1.5 gender + -1 age"
    assert both.space == "w+"


def test_a_set_comes_back_from_its_file(directions, tmp_path):
    path = tmp_path / "directions.safetensors"
    directions.save(path, card={"method": "test"})
    loaded = Directions.load(path)
    assert list(loaded) == ["gender", "age"]
    assert loaded.generator == directions.generator
    for name, direction in directions.items():
        again = loaded[name]
        assert again.space == direction.space
        assert (again.layers, again.scale, again.description) == (
            direction.layers,
            direction.scale,
            direction.description,
        )
        torch.testing.assert_close(again.vector, direction.vector, rtol=0, atol=0)


def test_a_damaged_set_is_refused(directions, tmp_path):
    from mambastyle import checkpoints

    path = tmp_path / "directions.safetensors"
    entry = {"name": "age", "space": "w", "layers": None, "scale": 1.0, "description": ""}
    checkpoints.save(path, {}, kind="directions", config={"directions": [entry]})
    with pytest.raises(CheckpointError, match="lacks 'age'"):
        Directions.load(path)


def test_an_unknown_name_suggests_the_nearest(directions):
    with pytest.raises(UnknownDirectionError, match=r"^no direction named 'gendr': did you mean 'gender'\?$"):
        directions["gendr"]
    with pytest.raises(DirectionError, match="the known ones are: gender, age"):
        directions.offset({"zzzzzz": 1.0})
    assert "gendr" not in directions
    assert directions.get("gendr") is None


@pytest.mark.parametrize("strength", ["strong", None, float("nan"), float("inf"), "-inf", [1.0]])
def test_a_strength_that_is_no_finite_number_is_refused(directions, strength):
    with pytest.raises(DirectionError, match=r"the strength of gender is .*, expected a (finite )?number"):
        directions.resolve([("gender", strength)])


def test_numbers_in_any_form_are_strengths():
    assert [check_strength(value) for value in ("1.5", 2, torch.tensor(0.5), -1e-3)] == [1.5, 2.0, 0.5, -1e-3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vector": torch.zeros(4)}, "expected \\(num_ws, w_dim\\) float32"),
        ({"vector": torch.zeros(6, 4).half()}, "float16, expected"),
        ({"vector": torch.full((6, 4), float("nan"))}, "NaN"),
        ({"layers": (3, 3)}, "out of range"),
        ({"layers": (0, 7)}, "both from 0 to 6"),
        ({"space": "z"}, "expected 'w' or 'w\\+'"),
        ({"name": "a=b"}, "cannot stand in NAME=STRENGTH"),
        ({"scale": float("inf")}, "infinity"),
    ],
)
def test_impossible_directions_say_why(values, message):
    with pytest.raises(DirectionError, match=message):
        Direction(**{"name": "x", "vector": torch.zeros(6, 4)} | values)


def test_directions_of_other_generators_do_not_mix(directions):
    other = Direction("other", torch.zeros(8, 4))
    with pytest.raises(DirectionError, match="shapes"):
        Directions([directions["age"], other])
    with pytest.raises(DirectionError, match="different generators"):
        combine([(directions["age"], 1.0), (other, 1.0)])
    with pytest.raises(DirectionError, match="discovered in the same generator"):
        other.apply(torch.zeros(1, 6, 4))
    with pytest.raises(DirectionError, match="two directions are named 'age'"):
        Directions([directions["age"], directions["age"]])
    with pytest.raises(DirectionError, match="nothing to combine"):
        combine([])
    with pytest.raises(DirectionError, match="expected a \\(name, strength\\) pair"):
        directions.resolve(["gender"])


def test_sets_of_one_generator_join(directions):
    smile = Directions([Direction.from_w("smile", torch.ones(4), 6)])
    joined = Directions.joined([smile, directions])
    assert list(joined) == ["smile", "gender", "age"]
    assert joined.generator == directions.generator
    with pytest.raises(DirectionError, match="discovered in different generators"):
        Directions.joined([directions, Directions(smile.values(), generator="cd" * 32)])
    with pytest.raises(DirectionError, match="two directions are named 'smile'"):
        Directions.joined([smile, smile])


def test_loaded_directions_do_not_follow_their_file(tmp_path):
    path = tmp_path / "directions.safetensors"
    Directions([Direction("age", torch.ones(4, 6))]).save(path)
    found = Directions.load(path)
    with path.open("r+b") as file:  # in place, as cp does it
        file.write(bytes(path.stat().st_size))
    assert torch.equal(found["age"].vector, torch.ones(4, 6))


def test_layers_may_be_named_in_an_edit_and_must_change_something():
    vector = torch.zeros(6, 4)
    vector[1:3] = 1
    found = Directions([Direction("age", vector, space="w+")])
    (direction, strength) = found.resolve({"age@0:2": 2})[0]
    assert strength == 2
    assert direction.offset().any(1).tolist() == [False, True, False, False, False, False]
    with pytest.raises(DirectionError, match=r"'age@3:6' changes nothing: age moves the layers 1:3"):
        found.at("age@3:6")
