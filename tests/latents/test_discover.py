"""Discovery: known axes are found again, with the stated unit; conditional boundaries leave others alone."""

import pytest
import torch

from mambastyle import checkpoints
from mambastyle.features import small
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig
from mambastyle.latents import discover as latents_discover
from mambastyle.latents.discover import boundary_direction, discover, log_odds, pca_directions
from mambastyle.models.stylegan2 import Generator, StyleGAN2Config
from mambastyle.training import directions as training_directions

GENERATOR = StyleGAN2Config(
    resolution=16, z_dim=8, w_dim=8, mapping_layers=2, widths=(8, 8, 8), feature_layer=3
)
FEATURES = SmallFeaturesConfig(
    resolution=16,
    widths=(4, 8),
    blocks=(1, 1),
    heads=(Head("gender", ("male", "female")), Head("status", ("noble", "warrior", "commoner"))),
)


def latents(samples: int = 2000, w_dim: int = 6) -> torch.Tensor:
    ws = torch.randn(samples, w_dim, generator=torch.Generator().manual_seed(0))
    ws[:, 2] *= 5
    ws[:, 4] *= 3
    return ws + torch.arange(w_dim)


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    generator = Generator(GENERATOR).eval().requires_grad_(False)
    # The affine layers of a fresh generator hardly react; a trained one does.
    for name, parameter in generator.named_parameters():
        if "affine.weight" in name:
            parameter.mul_(5)
    return generator


@pytest.fixture
def classifier(generator) -> SmallFeatures:
    torch.manual_seed(1)
    network = SmallFeatures(FEATURES)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    pictures = generator(z).clamp(-1, 1)
    for _ in range(20):
        network(pictures)
    network.eval()
    # Centred answers, so that every label occurs.
    for name, logits in network.classify(pictures).items():
        network.heads[name].weight.data.mul_(20)
        network.heads[name].bias.data.sub_(network.classify(pictures)[name].mean(0).detach() * 1.0)
        assert logits.shape[0] == 64
    return network.requires_grad_(False)


def test_principal_components_come_in_order_with_their_deviation_as_unit():
    ws = latents()
    first, second = pca_directions(ws, 2, num_ws=4)
    assert (first.name, second.name) == ("pc0", "pc1")
    assert first.vector.shape == (4, 6)
    assert first.space == "w"
    assert first.vector[0, 2] > 0.99  # also: the sign is that of the largest entry
    assert second.vector[0, 4] > 0.99
    assert first.scale == pytest.approx(float(ws[:, 2].std()), rel=1e-2)
    torch.testing.assert_close(first.vector[0].norm(), torch.tensor(1.0))
    assert "of its variance" in first.description


def test_more_components_than_samples_or_dimensions_is_an_error():
    with pytest.raises(ValueError, match="expected 1 to 6 components"):
        pca_directions(latents(), 7, num_ws=4)
    with pytest.raises(ValueError, match="expected 1 to 3 components"):
        pca_directions(latents(4), 4, num_ws=4)


def test_boundary_finds_the_axis_of_the_labels_and_its_unit_is_the_distance_of_the_sides():
    ws = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    scores = ws[:, 1] + 0.1 * ws[:, 3]
    boundary = boundary_direction("smile", ws, scores, num_ws=4)
    truth = torch.tensor([0, 1, 0, 0.1, 0, 0]) / 1.01**0.5
    assert boundary.direction.vector[0] @ truth > 0.99
    assert boundary.accuracy > 0.97
    # Means of a halved unit Gaussian lie at +- sqrt(2 / pi).
    assert boundary.direction.scale == pytest.approx(2 * (2 / torch.pi) ** 0.5, rel=0.05)
    moved = boundary.direction.apply(torch.zeros(2, 4, 6), 1.0)
    torch.testing.assert_close(moved[1], boundary.direction.vector * boundary.direction.scale)


def test_conditional_boundary_does_not_move_along_the_other():
    ws = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    other = torch.tensor([0.6, 0.8, 0, 0, 0, 0])
    boundary = boundary_direction("smile", ws, ws[:, 1], num_ws=2, against=[other])
    assert abs(float(boundary.direction.vector[0] @ other)) < 1e-6
    # cos of the angle between axis 1 and its part orthogonal to `other`.
    assert boundary.direction.vector[0, 1] == pytest.approx(0.6, abs=0.1)
    with pytest.raises(ValueError, match="span this one"):
        boundary_direction("smile", ws, ws[:, 1], num_ws=2, against=list(torch.eye(6)))


def test_boundary_without_two_sides_says_so():
    ws = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="100 samples with and 0 without"):
        boundary_direction("smile", ws, torch.ones(100), num_ws=2)


def test_log_odds_are_those_of_the_softmax():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1)[:, 1]
    torch.testing.assert_close(log_odds(logits, 1), (p / (1 - p)).log())


def test_discover_names_directions_after_heads_and_labels_and_is_seeded(generator, classifier):
    found = discover(generator, classifier, components=2, samples=400, seed=3, generator_hash="abc")
    assert list(found) == ["gender", "noble", "warrior", "commoner", "pc0", "pc1"]
    assert found.generator == "abc"
    assert found["gender"].vector.shape == (GENERATOR.num_ws, 8)
    assert "male to female" in found["gender"].description
    again = discover(generator, classifier, components=2, samples=400, seed=3, batch=64)
    assert torch.equal(again["noble"].vector, found["noble"].vector)
    # Moving along the direction moves what the classifier says, on average.
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(9))
    ws = generator.mapping(z)
    before = log_odds(classifier.classify(generator.synthesis(ws).clamp(-1, 1), ["gender"])["gender"], 1)
    moved = generator.synthesis(found["gender"].apply(ws, 1.0)).clamp(-1, 1)
    after = log_odds(classifier.classify(moved, ["gender"])["gender"], 1)
    assert (after - before).mean() > 0


def test_discover_conditions_one_boundary_on_another(generator, classifier):
    found = discover(generator, classifier, components=0, samples=400, conditional={"noble": ["gender"]})
    assert list(found) == ["gender", "noble", "warrior", "commoner"]
    assert abs(float(found["noble"].vector[0] @ found["gender"].vector[0])) < 1e-5
    assert "keeping gender" in found["noble"].description
    with pytest.raises(ValueError, match="no boundary named 'age'"):
        discover(generator, classifier, components=0, samples=400, conditional={"noble": ["age"]})


def test_discover_on_files_takes_folder_or_generator(generator, classifier, tmp_path):
    tensors = {f"generator.{name}": t for name, t in generator.state_dict().items()}
    path = tmp_path / "generator.safetensors"
    checkpoints.save(path, tensors, kind="stylegan2", config=GENERATOR)
    options = {"samples": 400, "progress": False}
    with pytest.raises(ValueError, match="no features"):
        training_directions.discover(tmp_path, method="boundary", **options)
    pca = training_directions.discover(path, method="pca", components=3, **options)
    assert list(pca) == ["pc0", "pc1", "pc2"]
    assert pca.generator == checkpoints.read_header(path).sha256
    small.save(tmp_path / "features.safetensors", classifier)
    both = training_directions.discover(tmp_path, components=1, **options)
    assert list(both) == ["gender", "noble", "warrior", "commoner", "pc0"]
    with pytest.raises(ValueError, match="expected the method"):
        training_directions.discover(tmp_path, method="svm", **options)
    with pytest.raises(ValueError, match="no head 'age'"):
        training_directions.discover(tmp_path, heads=["age"], **options)


def test_samples_without_a_classifier_are_not_rendered(generator, monkeypatch):
    monkeypatch.setattr(generator, "synthesis", None)
    drawn = latents_discover.draw_samples(generator, None, samples=10, batch=4)
    assert drawn.ws.shape == (10, 8)
    assert drawn.logits == {}
