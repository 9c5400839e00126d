"""The ablation's tables: means over seeds, paired differences, parameters held against Final's."""

import pytest
import torch

from mambastyle.evaluation.ablation import Run, find_runs, recipe_of, runs_table, variants_table
from mambastyle.evaluation.judges import Judges


def made(recipe: str, seed: int, l2: list[float], parameters: float, variant: str | None = None) -> Run:
    values = {"l2": torch.tensor(l2)}
    row = {"l2": float(values["l2"].mean()), "fd_small": float(seed), "parameters": parameters, "edit_x": 0.5}
    return Run(recipe, variant or recipe, seed, row, values)


def test_variants_are_means_over_seeds_with_paired_differences():
    measured = [
        made("final", 0, [1.0, 2.0, 3.0], 100.0),
        made("final", 1, [1.0, 2.0, 5.0], 100.0),
        made("vit", 0, [2.0, 3.0, 5.0], 104.0),
        made("base", 0, [2.0, 3.0, 5.0], 94.0),
        made("no-fuser", 0, [2.0, 3.0, 5.0], 80.0),
        made("longer", 0, [2.0, 3.0, 3.0], 100.0, variant="final"),
    ]
    table = variants_table(measured, "Ablation", Judges())
    final, vit, *_, longer = table.rows
    assert final["seeds"] == "0, 1"
    assert final["l2"] == pytest.approx(7 / 3)
    assert final["fd_small"] == 0.5
    # Each of the three pictures is worse by exactly 1 than the mean of Final's seeds.
    assert vit["l2_less"] == pytest.approx(1.0)
    assert vit["l2_less_interval"] == pytest.approx([1.0, 1.0])
    assert "l2_less" not in final
    assert longer["recipe"] == "longer"
    assert not any(note.startswith("longer") for note in table.notes)
    assert "x" in table.columns.values()
    assert "vit: parameters +4.0%, within 5% of Final's." in table.notes
    assert "base: parameters -6.0%, NOT within 5% of Final's." in table.notes
    assert "no-fuser: parameters -20.0%, as the variant implies." in table.notes
    assert len(runs_table(measured, "Ablation", Judges()).rows) == 6


def test_runs_are_read_from_their_folders_final_first(tmp_path):
    def folder(name, variant, steps=3, finished=True):
        path = tmp_path / name
        path.mkdir()
        settings = (
            f"name: {name}\nsteps: {steps}\nbatch: 2\ngenerator: g\nmodel: kaokore64\nvariant: {variant}\n"
        )
        (path / "run.yaml").write_text(settings)
        if finished:
            (path / "inversion.safetensors").write_bytes(b"")
        return path

    folders = [folder("ablation-base-0", "base"), folder("ablation-final-0", "final"), folder("a", "final")]
    recipes = [recipe_of(settings) for _, settings in find_runs(folders)]
    assert recipes == ["final", "a", "base"]
    with pytest.raises(ValueError, match=r"runs of \[3, 4\] steps"):
        find_runs([*folders, folder("c", "vit", steps=4)])
    with pytest.raises(ValueError, match=r"has no inversion\.safetensors: train it to the end"):
        find_runs([folder("d", "vit", finished=False)])


def test_a_changed_recipe_differs_in_one_section_alone(request):
    from mambastyle.training.config import read_run_file
    from mambastyle.training.inversion import InversionConfig

    recipes = request.config.rootpath / "recipes"
    final = read_run_file(recipes / "ablation" / "final.yaml", InversionConfig).model_dump(exclude={"name"})
    files = sorted((recipes / "changes").glob("*.yaml"))
    assert files
    for file in files:
        config = read_run_file(file, InversionConfig)
        assert config.name == f"ablation-{file.stem}"
        changed = config.model_dump(exclude={"name"})
        assert len([key for key in final if changed[key] != final[key]]) == 1


def test_the_ablations_recipes_are_one_recipe_with_a_variant(request):
    from mambastyle.models.mambastyle import VARIANTS, variant_of
    from mambastyle.training.config import read_run_file
    from mambastyle.training.inversion import InversionConfig

    recipes = request.config.rootpath / "recipes"
    common = read_run_file(recipes / "ablation-kaokore64.yaml", InversionConfig)
    files = sorted((recipes / "ablation").glob("*.yaml"))
    assert {file.stem for file in files} == set(VARIANTS)
    for file in files:
        config = read_run_file(file, InversionConfig)
        assert config.variant == file.stem
        assert config.model == variant_of(common.model, file.stem)
        changed = {"name", "model", "variant", "weights"}
        assert config.model_dump(exclude=changed) == common.model_dump(exclude=changed)
