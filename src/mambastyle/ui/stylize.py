"""The Stylize tab: a photograph in the manner of one to four pictures."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mambastyle.api import Stylizer
from mambastyle.api.inputs import as_picture
from mambastyle.ui import parts

LIMIT = "stylize"
STYLES = 4
SIDES = {"512 px": 512, "768 px": 768, "1024 px": 1024, "as it is": None}
# The brush's editor: more would only be slower to paint on, and the mask is resized to the photo.
EDITOR_SIDE = 640
ABSENT = (
    "<p class='note'>No model that stylizes is installed. Train one (<code>mambastyle train style-transfer "
    "recipes/samam-small.yaml</code>) and serve it: <code>mambastyle serve --stylizer FOLDER</code>.</p>"
)


@dataclasses.dataclass(frozen=True)
class Stylized:
    """What one visitor made last, and what to call it."""

    name: str
    before: Image.Image
    after: Image.Image


def reduced(picture: Image.Image, side: int | None) -> Image.Image:
    """The picture, its longer side at most `side`."""
    if side is not None and max(picture.size) > side:
        picture = picture.copy()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def painted(editor: Mapping[str, Any] | None) -> Image.Image | None:
    """Where the visitor has painted, as a mask; None for nowhere, which means everywhere."""
    layers = (editor or {}).get("layers") or []
    alphas = [layer.getchannel("A") for layer in layers]
    alphas = [alpha for alpha in alphas if alpha.getbbox() is not None]
    if not alphas:
        return None
    mask = Image.new("L", alphas[0].size)
    for alpha in alphas:
        mask.paste(255, mask=alpha)
    return mask


def share_of(editor: Mapping[str, Any] | None) -> str:
    """How much of the photo is painted, in words."""
    mask = painted(editor)
    if mask is None:
        return "<p>Nothing is painted: the whole photo is stylized.</p>"
    share = mask.histogram()[255] / (mask.width * mask.height)
    return f"<p>{max(1, round(100 * share))} % of the photo is stylized.</p>"


def mixed(styles: Sequence[str | None], weights: Sequence[float]) -> tuple[list[str], list[float]]:
    """The styles that were given and have weight, with weights that sum to 1."""
    pairs = [(style, weight) for style, weight in zip(styles, weights, strict=True) if style and weight > 0]
    if not pairs:
        if any(styles):
            raise ValueError("every style has the weight 0: move one of the weights")
        raise ValueError("there is no style yet: upload a painting, or choose one of the examples")
    total = sum(weight for _, weight in pairs)
    return [style for style, _ in pairs], [weight / total for _, weight in pairs]


def stylize(
    stylizer: Stylizer,
    photo: str | None,
    styles: Sequence[str | None],
    weights: Sequence[float],
    *,
    editor: Mapping[str, Any] | None,
    strength: float,
    keep_color: bool,
    seed: float | None,
    side: int | None,
) -> Stylized:
    """One press of the button. Raises ValueError for what is missing."""
    if photo is None:
        raise ValueError("there is no photo yet: upload one, or choose one of the examples")
    chosen, shares = mixed(styles, weights)
    before = reduced(as_picture(photo), side)
    after = stylizer.stylize(
        before,
        styles=chosen,
        weights=shares,
        strength=strength,
        keep_color=keep_color,
        mask=painted(editor),
        seed=int(seed or 0),
    )
    name = ".".join([parts.name_of(photo), *(parts.name_of(style) for style in chosen)])
    return Stylized(name, before, after)


def tab(
    stylizers: Mapping[str, Callable[[], Stylizer]], contents: Sequence[Path], paintings: Sequence[Path]
) -> None:
    """Build the tab inside the current Blocks. `stylizers` load a model by its name when it is first used.

    contents, paintings: pictures that it offers as photos and as styles.
    """
    if not stylizers:
        gr.HTML(ABSENT)
        return
    made = gr.State(None, time_to_live=3600)
    with gr.Row(elem_classes="stage"):
        with gr.Column(scale=3, min_width=240):
            photo = parts.photo("Your photo", height=240, elem_id="stylize-photo")
            if contents:
                gr.Examples([[str(path)] for path in contents], photo, label="Or one of these", preload=False)
            with gr.Accordion("Only a part of it: paint where", open=False) as part:
                editor = gr.ImageEditor(
                    label="Paint where to stylize",
                    show_label=False,
                    type="pil",
                    format="png",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(colors=["#6366f1"], color_mode="fixed", default_size=40),
                    buttons=[],
                    height=320,
                    elem_id="stylize-mask",
                )
                share = gr.HTML(share_of(None), elem_id="stylize-share")
        with gr.Column(scale=5, min_width=300, elem_classes="result"):
            compare = gr.ImageSlider(
                label="Before and after",
                type="pil",
                format="webp",
                interactive=False,
                buttons=["fullscreen"],
                elem_id="stylize-result",
            )
            with gr.Row(elem_classes="buttons"):
                start = gr.Button("Stylize", variant="primary", elem_id="stylize-start")
                stop = gr.Button("Stop", variant="stop", elem_id="stylize-stop")
            parts.download("Save picture", save, [made], elem_id="stylize-save", limit=LIMIT)
        with gr.Column(scale=4, min_width=280):
            styles = [parts.photo("Style", height=200, elem_id="stylize-style-1")]
            if paintings:
                gr.Examples(
                    [[str(path)] for path in paintings], styles[0], label="Or one of these", preload=False
                )
            with gr.Accordion("Mix in more styles", open=False):
                weights = [_weight(1)]
                with gr.Row(elem_classes="styles"):
                    for number in range(2, STYLES + 1):
                        with gr.Column(min_width=110):
                            styles.append(
                                parts.photo(f"Style {number}", height=130, elem_id=f"stylize-style-{number}")
                            )
                            weights.append(_weight(number))
            strength = gr.Slider(
                0, 1.5, 1, step=0.05, label="Strength", info="0 is the photo", elem_id="stylize-strength"
            )
            keep = gr.Checkbox(label="Keep the photo's colours", elem_id="stylize-keep")
            with gr.Row():
                side = gr.Dropdown(list(SIDES), value="768 px", label="Longer side", min_width=110)
                seed = gr.Number(0, precision=0, minimum=0, label="Seed", min_width=90)
            model = gr.Dropdown(
                list(stylizers), value=next(iter(stylizers)), label="Model", visible=len(stylizers) > 1
            )

    def background(photo: str | None) -> dict[str, Any] | None:
        if photo is None:
            return None
        with parts.friendly("This photo cannot be opened"):
            picture = reduced(as_picture(photo), EDITOR_SIDE)
        return {"background": picture, "layers": [], "composite": None}

    def run(
        photo: str | None, editor: Any, model: str, strength: float, keep: bool, side: str,
        seed: float | None, *rest: Any,
    ) -> tuple[tuple[Image.Image, Image.Image], Stylized]:  # fmt: skip
        with parts.friendly("This cannot be stylized"):
            result = stylize(
                stylizers[model](),
                photo,
                rest[:STYLES],
                rest[STYLES:],
                editor=editor,
                strength=strength,
                keep_color=keep,
                seed=seed,
                side=SIDES[side],
            )
        return (result.before, result.after), result

    for event in (photo.change, part.expand):
        event(background, photo, editor, show_progress="hidden", api_visibility="private")
    editor.change(
        share_of, editor, share, show_progress="hidden", trigger_mode="always_last", api_visibility="private"
    )
    running = start.click(
        run,
        [photo, editor, model, strength, keep, side, seed, *styles, *weights],
        [compare, made],
        show_progress_on=compare,
        concurrency_id=LIMIT,
        concurrency_limit=1,
        api_visibility="private",
    )
    stop.click(None, cancels=[running], api_visibility="private")


def _weight(number: int) -> gr.Slider:
    return gr.Slider(
        0, 1, 1, step=0.05, label=f"Weight {number}", buttons=[], elem_id=f"stylize-weight-{number}"
    )


def save(made: Stylized | None) -> str:
    """The last stylized picture as a file."""
    if made is None:
        raise gr.Error("Stylize a photo first.", title="Nothing to download yet")
    with parts.friendly("The file cannot be written"):
        path = parts.new_file(f"{made.name}.png")
        made.after.save(path)
    return str(path)
