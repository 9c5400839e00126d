"""The Train tab: start, watch and stop runs from recipes."""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from mambastyle.ui import parts
from mambastyle.ui.runs import TASKS, Run, Runs

SECONDS = 2.0
WIDTH, HEIGHT = 240, 80


def curve(term: str, points: Sequence[tuple[int, float]]) -> str:
    """One term over the steps, on a scale of its own, as a drawing with its last value in words."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return ""
    if len(finite) == 1:
        # A level line: a single point would not be seen.
        finite = [(finite[0][0] - 1, finite[0][1]), *finite]
    steps, values = zip(*finite, strict=True)
    low, high = min(values), max(values)
    across, up = max(steps[-1] - steps[0], 1), (high - low) or 1.0
    path = " ".join(
        f"{(step - steps[0]) / across * WIDTH:.1f},{HEIGHT - (value - low) / up * HEIGHT:.1f}"
        for step, value in finite
    )
    name = html.escape(term)
    return (
        f"<figure><figcaption><b>{name}</b> <span>{values[-1]:.4g}</span></figcaption>"
        f'<svg viewBox="-2 -4 {WIDTH + 4} {HEIGHT + 8}" preserveAspectRatio="none" role="img" '
        f'aria-label="{name}: {values[-1]:.4g} at step {steps[-1]}">'
        f'<polyline points="{path}" vector-effect="non-scaling-stroke"/></svg>'
        f"<small>{low:.4g} to {high:.4g}</small></figure>"
    )


def report(run: Run) -> str:
    """State, curves and the last words of a run."""
    curves = "".join(curve(term, points) for term, points in run.curves.items())
    head = f"<b>{html.escape(run.name)}</b>: {html.escape(run.state)}"
    if run.step:
        head += f", step {run.step:,}, {run.pictures_per_second:.1f} pictures/s"
    output = f"<pre>{html.escape(run.output)}</pre>" if run.output else ""
    return f'<p role="status">{head}</p><div class="curves">{curves}</div>{output}'


def task_of(recipe: str) -> str | None:
    """What a recipe of ours trains, by its name; None where the name does not say."""
    if recipe.startswith(("samam", "mamba-st")):
        return "style-transfer"
    return next((task for task in TASKS if recipe.startswith(task)), None)


def tab(runs: Runs | None, recipes: Path, selected: gr.Tab) -> None:
    """Build the tab inside the current Blocks; `runs` is None where strangers could start processes."""
    if runs is None:
        gr.HTML(
            "<p class='note'>Training is offered only where this machine alone can reach the page. Here, use "
            "<code>mambastyle train</code>.</p>"
        )
        return
    found = sorted(path.name for path in recipes.glob("*.yaml")) if recipes.is_dir() else []
    first = found[0] if found else None
    with gr.Row(elem_classes="stage"):
        with gr.Column(scale=3, min_width=280):
            recipe = gr.Dropdown(
                found, value=first, label="Recipe", info=f"a run file of {recipes}", elem_id="train-recipe"
            )
            task = gr.Dropdown(
                list(TASKS), value=task_of(first or "") or TASKS[0], label="Task", elem_id="train-task"
            )
            name = gr.Textbox(
                Path(first).stem if first else "", label="Name", info="of the run", elem_id="train-name"
            )
            overrides = gr.Textbox(
                label="Settings",
                info="KEY=VALUE, one on a line, in place of the recipe's",
                placeholder="steps=1000",
                lines=3,
                elem_id="train-settings",
            )
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Start or go on", variant="primary", elem_id="train-start")
                stop = gr.Button("Save and stop", variant="stop", elem_id="train-stop")
        with gr.Column(scale=7, min_width=300):
            watched = gr.Dropdown(
                runs.names(), value=None, label="Watch", info=f"a run in {runs.folder}", elem_id="train-watch"
            )
            shown = gr.HTML("", elem_id="train-report")
            samples = gr.Gallery(
                label="Samples, the newest first",
                show_label=False,
                columns=4,
                height="auto",
                object_fit="contain",
                format="png",
                buttons=[],
                elem_id="train-samples",
            )
    clock = gr.Timer(SECONDS, active=False)
    # The newest sample that this visitor has: the pictures are sent again only when there is another.
    newest = gr.State("")

    def look(name: str | None, newest: str) -> tuple[Any, Any, str]:
        if not name:
            return "", [], ""
        with parts.friendly("This run cannot be read"):
            run = runs.look(name)
        sample = str(run.samples[0]) if run.samples else name
        if sample == newest:
            return report(run), gr.skip(), newest
        return report(run), [(str(path), path.stem) for path in run.samples], sample

    def begin(task: str, recipe: str | None, name: str, overrides: str) -> Any:
        with parts.friendly("The training cannot be started"):
            if not recipe:
                raise ValueError(
                    f"there is no recipe in {recipes}: serve from the repository, or --recipes DIR"
                )
            lines = [line.strip() for line in overrides.splitlines() if line.strip()]
            runs.start(task, recipes / recipe, name.strip(), lines)
        return gr.Dropdown(runs.names(), value=name.strip())

    def end(name: str | None) -> None:
        with parts.friendly("Nothing was stopped"):
            runs.stop(name or "")
        gr.Info("It saves at its next step and ends.")

    def fill(recipe: str | None) -> tuple[Any, str]:
        return task_of(recipe or "") or gr.skip(), Path(recipe).stem if recipe else ""

    settings: dict[str, Any] = {
        "show_progress": "hidden",
        "concurrency_id": "train",
        "api_visibility": "private",
    }
    recipe.change(fill, recipe, [task, name], queue=False, api_visibility="private")
    start.click(begin, [task, recipe, name, overrides], watched, **settings)
    stop.click(end, watched, None, **settings)
    selected.select(lambda: gr.Dropdown(runs.names()), None, watched, **settings)
    for event in (watched.change, clock.tick):
        event(look, [watched, newest], [shown, samples, newest], trigger_mode="always_last", **settings)
    watched.change(
        lambda name: gr.Timer(active=bool(name)), watched, clock, queue=False, api_visibility="private"
    )
