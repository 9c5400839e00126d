"""Training of the small network: draws, priors, distortion, splits, and a run that resumes exactly."""

import csv
import io
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mambastyle.features import small
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig
from mambastyle.features.squeezenet import LAYERS
from mambastyle.training import features
from mambastyle.training.features import NO_LABEL, FeaturesConfig, LabelledPictures


def random_squeezenet(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {"features.0.weight": torch.randn(96, 3, 7, 7, generator=generator) * 0.1}
    tensors["features.0.bias"] = torch.zeros(96)
    in_channels = 96
    for index, channels, _ in list(LAYERS.values())[1:]:
        squeeze, expand, prefix = channels // 8, channels // 2, f"features.{index}"
        shapes = {
            "squeeze": (squeeze, in_channels, 1),
            "expand1x1": (expand, squeeze, 1),
            "expand3x3": (expand, squeeze, 3),
        }
        for name, (out, into, kernel) in shapes.items():
            weight = torch.randn(out, into, kernel, kernel, generator=generator)
            tensors[f"{prefix}.{name}.weight"] = weight * (2 / (into * kernel**2)) ** 0.5
            tensors[f"{prefix}.{name}.bias"] = torch.zeros(out)
        in_channels = channels
    save_file(tensors, path)
    return path


def write_pack(path: Path, rows: list[dict[str, str]]) -> str:
    generator = torch.Generator().manual_seed(len(rows))
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.csv", table.getvalue())
        for row in rows:
            pixels = torch.randint(0, 256, (40, 36, 3), dtype=torch.uint8, generator=generator)
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            archive.writestr(row["file"], file.getvalue())
    return str(path)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("packs")
    kaokore = [
        {"file": f"k{i}.png", "split": split, "gender": gender, "status": status}
        for i, (split, gender, status) in enumerate(
            (split, gender, status)
            for split in ("train", "train", "train", "val", "test")
            for gender in features.GENDERS
            for status in features.STATUSES
        )
    ]
    classify = [{"file": f"c{i}.png", "label": ("cat", "dog", "shoe")[i % 3]} for i in range(24)]
    style = [
        {"file": f"s{i}.png", "label": label}
        for i, label in enumerate(6 * ["wikiart:A", "wikiart:B", "texture:a", "texture:b"])
    ]
    return {
        "kaokore": write_pack(folder / "kaokore.zip", kaokore),
        "classify80": write_pack(folder / "classify80.zip", classify),
        "style": write_pack(folder / "style.zip", style),
    }


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_squeezenet(tmp_path_factory.mktemp("squeezenet") / "squeezenet.safetensors"))


def make_config(packs: dict[str, str], squeezenet: str, output: Path, **values) -> FeaturesConfig:
    return FeaturesConfig.model_validate(
        {
            "name": "tiny",
            "output": str(output),
            "batch": 8,
            "clip_gradient": 5.0,
            "log_every": 1,
            "model": {"resolution": 32, "widths": [4, 6, 8], "blocks": [1, 1, 1]},
            "packs": packs,
            "squeezenet": squeezenet,
        }
        | values
    )


def make_pictures(sources: list[str], **labels: list[int]) -> LabelledPictures:
    count = len(sources)
    return LabelledPictures(
        torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
        {name: torch.tensor(values) for name, values in labels.items()},
        sources,
        [f"{i}.png" for i in range(count)],
    )


def test_draws_keep_the_shares_of_the_packs_and_favour_rare_labels():
    pictures = make_pictures(["a"] * 5 + ["b"] * 2, kind=[0, 0, 0, 0, 1, NO_LABEL, NO_LABEL])
    weights = features.draw_weights(pictures, {"a": 0.75, "b": 0.25})
    assert weights[:5].sum() == pytest.approx(0.75)
    # Four pictures of one label against one of the other: sqrt(4) against sqrt(1).
    assert weights[:4].sum() == pytest.approx(2 * float(weights[4]))
    with pytest.raises(ValueError, match="no share of the batch given for 'b'"):
        features.draw_weights(pictures, {"a": 1.0})


def test_prior_counts_labelled_pictures_alone():
    labels = torch.tensor([0, 0, 1, NO_LABEL])
    prior = features.log_prior(labels, torch.tensor([0.1, 0.1, 0.2, 0.6]), 2)
    torch.testing.assert_close(prior.exp(), torch.tensor([0.5, 0.5]))
    with pytest.raises(ValueError, match="no training picture has label 2"):
        features.log_prior(labels, torch.ones(4), 3)


def test_loss_ignores_unknown_labels_and_is_zero_without_any():
    logits, prior = torch.tensor([[2.0, 0.0], [0.0, 9.0]]), torch.zeros(2)
    alone = features.labelled_loss(logits[:1], torch.tensor([0]), prior)
    torch.testing.assert_close(features.labelled_loss(logits, torch.tensor([0, NO_LABEL]), prior), alone)
    assert features.labelled_loss(logits, torch.tensor([NO_LABEL, NO_LABEL]), prior) == 0


def test_distortion_is_a_function_of_its_generator_and_keeps_range_and_shape():
    x = torch.rand(16, 3, 20, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first = features.distort(x, torch.Generator().manual_seed(3))
    assert first.shape == x.shape
    assert first.abs().max() <= 1
    assert torch.equal(first, features.distort(x, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, features.distort(x, torch.Generator().manual_seed(4)))


def test_halves_and_held_out_pictures_never_meet(packs):
    def load(half: str) -> features.Splits:
        return features.load_splits(features.PacksSection(**packs, kaokore_half=half), 8)

    first, second, both = load("first"), load("second"), load("both")
    kaokore = [
        {n for n, s in zip(x.training.names, x.training.sources, strict=True) if s == "kaokore"}
        for x in (first, second, both)
    ]
    assert kaokore[0]
    assert kaokore[1]
    assert not kaokore[0] & kaokore[1]
    assert kaokore[0] | kaokore[1] == kaokore[2]
    assert not set(both.training.names) & (set(both.test.names) | set(both.validation.names))
    assert [head.name for head in both.heads] == ["gender", "status", "class", "style", "texture"]
    assert both.heads[3].labels == ("A", "B")
    labels = both.test.labels
    assert ((labels["gender"] == NO_LABEL) == (labels["status"] == NO_LABEL)).all()
    assert ((labels["style"] == NO_LABEL) | (labels["texture"] == NO_LABEL)).all()


def test_accuracies_count_right_answers_per_label():
    network = SmallFeatures(
        SmallFeaturesConfig(
            resolution=8,
            widths=(4,),
            blocks=(1,),
            heads=(Head("kind", ("x", "y")), Head("other", ("x", "y"))),
        )
    ).eval()
    torch.nn.init.zeros_(network.heads["kind"].weight)
    network.heads["kind"].bias.data = torch.tensor([1.0, 0.0])  # always answers x
    pictures = make_pictures(["a"] * 5, kind=[0, 0, 0, 1, NO_LABEL])
    assert features.accuracies(network, pictures) == {
        "kind": {"accuracy": 0.75, "balanced_accuracy": 0.5, "count": 4}
    }


def test_resumed_run_gives_the_weights_of_an_uninterrupted_one(packs, squeezenet, tmp_path):
    whole = features.run(make_config(packs, squeezenet, tmp_path / "whole", steps=4))
    parts = make_config(packs, squeezenet, tmp_path / "parts", steps=4, max_minutes=0)
    folder = parts.folder
    for _ in range(4):  # the time limit ends each run after one step
        assert features.run(parts) == folder
    ours = small.load(folder / "features.safetensors").state_dict()
    for name, value in small.load(whole / "features.safetensors").state_dict().items():
        assert torch.equal(ours[name], value), name
    assert len((folder / "validation.jsonl").read_text().splitlines()) == 4


def test_report_measures_the_held_out_pictures(packs, tmp_path):
    splits = features.load_splits(features.PacksSection(**packs), 8)
    network = SmallFeatures(
        SmallFeaturesConfig(resolution=8, widths=(4,), blocks=(1,), heads=splits.heads)
    ).eval()
    small.save(tmp_path / "features.safetensors", network)
    report = features.report(tmp_path / "features.safetensors", features.PacksSection(**packs))
    assert report["gender"]["count"] == 8
    assert {"gender", "status", "class"} <= set(report)
