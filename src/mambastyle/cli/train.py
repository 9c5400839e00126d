"""`mambastyle train gan|inversion|style-transfer|features`: a recipe, some overrides, one training loop."""

import contextlib
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Train a part from a recipe (YAML). An interrupted run goes on where its last checkpoint stands.",
    epilog=(
        "Examples:\n\n"
        "  mambastyle train gan recipes/gan-kaokore64.yaml\n\n"
        "  mambastyle train gan recipes/gan-kaokore64.yaml -s steps=200 -s name=trial\n\n"
        "  torchrun --nproc-per-node 2 -m mambastyle train gan recipes/gan-kaokore64.yaml"
    ),
    no_args_is_help=True,
)
# task -> (module with `run(config)`, its run model)
TASKS = {
    "gan": ("mambastyle.training.gan", "GANConfig"),
    "inversion": ("mambastyle.training.inversion", "InversionConfig"),
    "style-transfer": ("mambastyle.training.style_transfer", "StyleTransferConfig"),
    "features": ("mambastyle.training.features", "FeaturesConfig"),
}
Recipe = Annotated[Path, typer.Argument(help="The run file; recipes/ has one for each preset.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", "-s", metavar="KEY=VALUE", help="Override a key (data.path=x); may be given again."
    ),
]


@app.command()
def gan(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train a StyleGAN2 generator."""
    _run("gan", recipe, overrides)


@app.command()
def inversion(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train MambaStyle's encoder and fuser against a frozen generator."""
    _run("inversion", recipe, overrides)


@app.command("style-transfer")
def style_transfer(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train SaMam or Mamba-ST on photographs and paintings."""
    _run("style-transfer", recipe, overrides)


@app.command()
def features(recipe: Recipe, overrides: Overrides = None) -> None:
    """Train the small network that judges pictures and names their attributes."""
    _run("features", recipe, overrides)


def _run(task: str, recipe: Path, overrides: list[str] | None) -> None:
    from mambastyle.training.config import read_run_file

    module_name, schema = TASKS[task]
    values = parse_overrides(overrides or [])
    module = import_module(module_name)
    folder = module.run(read_run_file(recipe, getattr(module, schema), values))
    typer.echo(f"written to {folder}")


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """['optimizer.lr=1e-3'] -> {'optimizer.lr': 0.001}; the values are YAML."""
    import yaml

    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"the override {text!r} is not KEY=VALUE: write for example -s steps=1000")
        try:
            values[key.strip()] = yaml.safe_load(value)
            if isinstance(values[key.strip()], str):
                # YAML 1.1 reads 1e-3, without a point, as text.
                with contextlib.suppress(ValueError):
                    values[key.strip()] = float(value)
        except yaml.YAMLError as error:
            raise ValueError(f"the value of {key} is not valid YAML: {str(error).splitlines()[0]}") from error
    return values
