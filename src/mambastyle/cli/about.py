"""`mambastyle info` and `mambastyle doctor`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mambastyle.evaluation.cost import Cost, Report


def info(
    model: Annotated[
        str | None, typer.Argument(help="A preset, a folder, or one checkpoint; without it, the presets.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="Count what a model costs: faces1024, faces256, cars512, kaokore64, mamba-st, samam, "
            "samam-patch4. Needs no weights.",
        ),
    ] = None,
    variant: Annotated[
        str, typer.Option(help="With --config: final, base, vit, no-ss2d, no-fuser, no-le.")
    ] = "final",
    table: Annotated[
        bool, typer.Option("--table", help="All variants of faces1024 beside the paper's numbers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print --config or --table as JSON.")] = False,
) -> None:
    """Show what a preset, a folder or a checkpoint holds, and verify its hash; or what a model costs.

    Costs are of one picture in float32: parameters, multiply-accumulates by the paper's rule (convolutions
    and linear layers) and of all that runs, updates of the scans' states, and memory.

    Examples:

        mambastyle info

        mambastyle info kaokore64

        mambastyle info out/face.inversion.safetensors

        mambastyle info --config faces1024 --variant vit

        mambastyle info --table --json
    """
    if config is not None or table:
        if model is not None or (config is not None and table):
            raise ValueError("give one of a model, --config and --table")
        return _show_table(as_json) if config is None else _show_cost(config, variant, as_json)
    if as_json:
        raise ValueError("--json prints --config or --table: give one of them")
    from mambastyle.presets import PRESETS, find

    if model is None:
        presets = Table("preset", "what", "licence", "reaches", box=None, pad_edge=False)
        for preset in PRESETS.values():
            state = "" if not preset.missing() else " (not installed)"
            presets.add_row(preset.name + state, preset.description, preset.licence, preset.reaches)
        return Console().print(presets)
    if Path(model).is_file():
        return _show_checkpoint(Path(model))
    if model in PRESETS:
        preset = PRESETS[model]
        typer.echo(
            f"{preset.description}\ndata: {preset.data}\nlicence: {preset.licence}\n{preset.reaches}\n"
        )
    for path in find(model).paths:
        _show_checkpoint(path)
    return None


def _show_checkpoint(path: Path) -> None:
    from mambastyle import checkpoints

    checkpoint = checkpoints.load(path)
    parameters = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    typer.echo(
        f"{path}: {checkpoint.kind}, {len(checkpoint.tensors)} tensors, {parameters:,} numbers, "
        f"{path.stat().st_size / 2**20:.1f} MiB, sha256 {checkpoint.sha256[:16]} (verified)"
    )
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, values in (("config", checkpoint.config), ("card", checkpoint.card)):
        for key, value in values.items():
            text = str(value)
            table.add_row(f"  {name}", key, text if len(text) <= 200 else f"{text[:200]}…")
    Console().print(table)


def _show_cost(config: str, variant: str, as_json: bool) -> None:
    from mambastyle.evaluation.cost import cost

    report = cost(config, variant)
    if as_json:
        return typer.echo(json.dumps(report.to_dict(), indent=2))
    table = Table(box=None, pad_edge=False)
    table.add_column("module")
    for name in ("parameters", "dead, as published", "GMAC, paper's rule", "GMAC, all", "M state updates"):
        table.add_column(name, justify="right")
    for name, cost_of_module in report.modules.items():
        table.add_row(name, *_cost_cells(cost_of_module))
    table.add_section()
    table.add_row("total", *_cost_cells(report.total))
    height, width = report.picture
    typer.echo(f"{report.config}, {report.variant}: one picture of {height} x {width} px, float32")
    Console(width=_TABLE_WIDTH).print(table)
    return typer.echo(_memory(report))


# Wide enough for the tables, also where the output is no terminal.
_TABLE_WIDTH = 160


def _cost_cells(cost: "Cost") -> list[str]:
    dead = f"{cost.dead:,}" if cost.dead else ""
    updates = f"{cost.state_updates / 1e6:,.1f}" if cost.state_updates else ""
    macs = [f"{macs / 1e9:,.2f}" for macs in (cost.paper_macs, cost.macs)]
    return [f"{cost.parameters:,}", dead, *macs, updates]


def _memory(report: "Report") -> str:
    weights, activations = report.weight_bytes / 2**20, report.activation_bytes / 2**20
    return (
        f"memory: weights {weights:,.0f} MiB, activations at their most {activations:,.0f} MiB "
        "(without the working memory of convolutions)"
    )


def _show_table(as_json: bool) -> None:
    """Every row of the paper's ablation, the paper's numbers beside ours."""
    from mambastyle.evaluation.cost import TABLE, cost

    rows = []
    for name, row in TABLE.items():
        total = cost("faces1024", name).total
        rows.append(
            {
                "variant": name,
                "parameters": total.parameters,
                "parameters_published": total.parameters + total.dead,
                "paper_parameters": round(row.paper_millions * 1e6),
                "gmacs_paper_rule": total.paper_macs / 1e9,
                "paper_gmacs": row.paper_gmacs,
                "gmacs": total.macs / 1e9,
                "state_updates": total.state_updates,
                "difference": row.why,
            }
        )
    if as_json:
        return typer.echo(json.dumps(rows, indent=2))
    table = Table(box=None, pad_edge=False)
    table.add_column("variant")
    for name in ("M live", "M published", "paper", "GMAC, paper's rule", "paper", "GMAC, all", "M updates"):
        table.add_column(name, justify="right")
    table.add_column("difference")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['parameters_published'] / 1e6:.2f}",
            f"{row['paper_parameters'] / 1e6:.2f}",
            f"{row['gmacs_paper_rule']:.2f}",
            f"{row['paper_gmacs']:.2f}",
            f"{row['gmacs']:.2f}",
            f"{row['state_updates'] / 1e6:.0f}",
            row["difference"],
        )
    typer.echo("faces1024 with its generator: ours, and tables 1 and 3 of the paper")
    return Console(width=_TABLE_WIDTH).print(table)


def doctor() -> None:
    """Check this installation: versions, devices, scan backends, presets; exit code 1 when one is broken.

    Example:

        mambastyle doctor
    """
    from mambastyle.doctor import examine

    findings = examine()
    table = Table("what", "state", "", box=None, pad_edge=False)
    for finding in findings:
        table.add_row(finding.what, finding.state, finding.detail)
    Console().print(table)
    if broken := [finding.what for finding in findings if finding.state == "broken"]:
        typer.echo(f"error: {', '.join(broken)} broken: see above", err=True)
        raise typer.Exit(1)
