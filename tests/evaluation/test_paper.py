"""The protocols end to end on a tiny model: table 1, the ablation of real runs, and the cost."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mambastyle.evaluation import ablation, paper, timing
from mambastyle.evaluation.judges import Judges
from mambastyle.features import small
from mambastyle.features.small import Head, SmallFeatures, SmallFeaturesConfig

pytestmark = pytest.mark.no_shape_checks


@pytest.fixture
def network(monkeypatch) -> SmallFeatures:
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    torch.manual_seed(0)
    heads = (Head("gender", ("male", "female")), Head("status", ("noble", "warrior")))
    return SmallFeatures(SmallFeaturesConfig(16, (4, 6), (1, 1), heads)).eval().requires_grad_(False)


@pytest.fixture
def files(tmp_path, monkeypatch, network, tiny_model_folder):
    """A pack of eight test pictures, a judge and directions."""
    from mambastyle.latents.directions import Direction, Directions

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack = tmp_path / "pack"
    pack.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for number in range(8):
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(pack / f"{number}.png")
        rows.append(f"{number}.png,test,{('male', 'female')[number % 2]},{('noble', 'warrior')[number // 4]}")
    (pack / "labels.csv").write_text("file,split,gender,status\n" + "\n".join(rows) + "\n")
    small.save(tmp_path / "judge.safetensors", network)
    found = Directions.load(tiny_model_folder / "directions.safetensors")
    directions = [*found.values(), Direction.from_w("warrior", torch.randn(12), 6)]
    Directions(directions).save(tmp_path / "directions.safetensors")
    return tmp_path


def test_table_1_has_inversion_edits_and_cost_of_every_method(files, tiny_model_folder, network):
    table = paper.run(
        {"ours": tiny_model_folder},
        files / "pack",
        files / "directions.safetensors",
        files / "judge.safetensors",
        others=[("optimise", 2), ("mean-w", None)],
        judges=Judges(small=network),
        device="cpu",
    )
    edits = ["edit_to_female", "edit_to_male", "edit_to_noble", "edit_to_warrior"]
    expected = ["method", "count", "l2", "ms_ssim", "fd_small", *edits, "parameters", "gmacs", "milliseconds"]
    assert list(table.columns) == expected
    assert [row["method"] for row in table.rows] == ["ours", "W+ optimisation, 2 steps", "mean w"]
    for row in table.rows:
        assert set(expected) <= set(row)
        assert 0 <= row["edit_to_male_changed"] <= 1
    assert "edits at strength 1.5" in table.title
    assert {"cases", "to-female"} <= set(table.figures)


def test_the_ablation_measures_runs_and_their_edits(
    files, tiny_model_folder, network, tiny_mambastyle_config
):
    import dataclasses
    import shutil

    folders = []
    for seed in (0, 1):
        folder = shutil.copytree(tiny_model_folder, files / f"run-{seed}")
        settings = {"name": folder.name, "steps": 1, "batch": 2, "seed": seed, "variant": "final"}
        settings |= {"generator": "g", "model": dataclasses.asdict(tiny_mambastyle_config)}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings | {"model": _plain(settings["model"])}))
        folders.append(folder)
    variants, runs = ablation.run(
        folders,
        files / "pack",
        directions=files / "directions.safetensors",
        judge=files / "judge.safetensors",
        judges=Judges(small=network),
        device="cpu",
    )
    assert len(variants.rows) == 1
    assert len(runs.rows) == 2
    assert variants.rows[0]["l2"] == pytest.approx(runs.rows[0]["l2"])
    assert "changed to female" in variants.columns.values()
    assert "Ablation, 1 steps each, 8 test pictures of pack, 16 px" in variants.title


def test_cost_is_measured_in_units_that_make_sense(tiny_model_folder, monkeypatch):
    monkeypatch.delenv("MAMBASTYLE_SQUEEZENET", raising=False)
    row = timing.measure(str(tiny_model_folder), "encoder", None, 2, 1, "cpu")
    mean = timing.measure(str(tiny_model_folder), "mean-w", None, 2, 1, "cpu")
    assert row["parameters"] > mean["parameters"] > 0
    assert row["milliseconds"] > 0
    assert row["milliseconds_batch"] > 0
    # Of this process, which has done much before: of a fresh one it is tens of megabytes.
    assert row["memory"] is None or row["memory"] >= 0


def test_the_table_of_cost_says_which_precision_auto_was(monkeypatch):
    monkeypatch.setattr("mambastyle.compute.has_bfloat16", lambda device: True)
    assert timing.run("model", [], device="cpu", precision="auto").title.endswith("threads, bf16")


def _plain(values):
    return {
        key: list(map(_listed, value)) if isinstance(value, tuple) else value for key, value in values.items()
    }


def _listed(value):
    return list(value) if isinstance(value, tuple) else value
