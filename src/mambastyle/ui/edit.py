"""The Edit tab: invert a picture once, then every move of a slider renders it anew."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mambastyle.api import Inverted, Inverter
from mambastyle.api.inputs import as_picture
from mambastyle.api.photos import crop, find_squares
from mambastyle.ui import parts

LIMIT = "edit"
REACH = 4.0
STRIP = (-3, -2, -1, 0, 1, 2, 3)
# What can be downloaded, and the end of its name: what the model makes, the same pasted back, its latents.
DOWNLOADS = {"picture": ".png", "whole photo": ".whole.png", "inversion": ".safetensors"}


@dataclasses.dataclass(frozen=True)
class Opened:
    """One visitor's picture, what the encoder sees of it, and its inversion; encoded once."""

    path: str
    find_face: bool
    original: Image.Image
    inverted: Inverted


def open_picture(inverter: Inverter, path: str | None, find_face: bool) -> Opened | None:
    """Read and invert; of several faces the largest."""
    if path is None:
        return None
    with parts.friendly("This picture cannot be opened"):
        seen: Any = path
        if find_face:
            picture = as_picture(path)
            seen = crop(picture, find_squares(picture, find_faces=True)[0], inverter.model.config.image_size)
        prepared = inverter.prepare(seen)
        return Opened(path, find_face, inverter.preview(prepared), inverter.invert(prepared))


def edits_of(inverter: Inverter, strengths: Sequence[float | None]) -> dict[str, float]:
    """The sliders that were moved."""
    given = zip(inverter.directions, strengths, strict=True)
    return {name: strength for name, strength in given if strength}


def render(inverter: Inverter, opened: Opened, edits: dict[str, float]) -> Image.Image:
    with parts.friendly("This edit cannot be rendered"):
        return inverter.render(inverter.edit(opened.inverted, edits))


def strip(inverter: Inverter, opened: Opened, edits: dict[str, float], swept: str) -> list[Any]:
    """One direction at growing strengths, the other sliders as they are: pictures with captions."""
    return [
        (render(inverter, opened, edits | {swept: strength}), f"{strength:+d}" if strength else "0")
        for strength in STRIP
    ]


def save(inverter: Inverter, opened: Opened | None, edits: dict[str, float], what: str) -> str:
    """One of DOWNLOADS as a file, named after picture and edits."""
    if opened is None:
        raise gr.Error("Upload a picture or choose an example.", title="Nothing to download yet")
    change = "".join(f".{name}{strength:+g}" for name, strength in edits.items()) or ".inversion"
    with parts.friendly("The file cannot be written"):
        path = parts.new_file(f"{parts.name_of(opened.path)}{change}{DOWNLOADS[what]}")
        edited = inverter.edit(opened.inverted, edits)
        if what == "inversion":
            inverter.save_inversion(path, edited)
        elif what == "whole photo":
            inverter.edit_photo(opened.path, edits, find_faces=opened.find_face).save(path)
        else:
            inverter.render(edited).save(path)
    return str(path)


def tab(inverter: Inverter, examples: Sequence[Path]) -> None:
    """Build the tab inside the current Blocks."""
    names = list(inverter.directions)
    opened = gr.State(None, time_to_live=3600)

    with gr.Row(elem_classes="stage"):
        with gr.Column(scale=3, min_width=240):
            photo = parts.photo("Your picture", height=240, elem_id="edit-photo")
            if examples:
                gr.Examples([[str(path)] for path in examples], photo, label="Or one of these", preload=False)
            find_face = gr.Checkbox(
                label="Find the face",
                info="for models of aligned photographs; otherwise the middle is taken",
                elem_id="edit-find-face",
            )
        with gr.Column(scale=5, min_width=300, elem_classes="result"):
            compare = gr.ImageSlider(
                label="Before and after",
                type="pil",
                format="png",
                interactive=False,
                buttons=["fullscreen"],
                slider_position=50,
                elem_id="edit-result",
            )
            buttons = gr.Row(elem_classes="buttons")
        with gr.Column(scale=4, min_width=280):
            plain = [name for name in names if not re.fullmatch(r"pc\d+", name)]
            sliders_by_name = {name: _slider(inverter, name) for name in plain}
            if components := [name for name in names if name not in plain]:
                with gr.Accordion("Components of the latent space", open=not plain):
                    sliders_by_name |= {name: _slider(inverter, name) for name in components}
            sliders = [sliders_by_name[name] for name in names]

    with gr.Row(elem_classes="strip"):
        swept = gr.Dropdown(
            names,
            value=names[0] if names else None,
            label="Strength strip",
            info="one direction, growing strength: press a picture to take it",
            scale=1,
            min_width=220,
        )
        gallery = gr.Gallery(
            label="Strength strip",
            show_label=False,
            columns=len(STRIP),
            height="auto",
            object_fit="contain",
            allow_preview=False,
            format="png",
            buttons=[],
            scale=5,
            elem_id="edit-strip",
        )

    def show(opened: Opened | None, *strengths: float) -> tuple[Image.Image, Image.Image] | None:
        if opened is None:
            return None
        return opened.original, render(inverter, opened, edits_of(inverter, strengths))

    def show_strip(opened: Opened | None, swept: str | None, *strengths: float) -> list[Any]:
        if opened is None or swept is None:
            return []
        return strip(inverter, opened, edits_of(inverter, strengths), swept)

    quiet: dict[str, Any] = {
        "show_progress": "hidden",
        "concurrency_id": LIMIT,
        "api_visibility": "private",
        "trigger_mode": "always_last",
    }
    gr.on(
        [photo.change, find_face.input],
        lambda path, find_face: open_picture(inverter, path, find_face),
        [photo, find_face],
        opened,
        show_progress_on=compare,
        concurrency_id=LIMIT,
        concurrency_limit=1,
        api_visibility="private",
    ).success(show, [opened, *sliders], compare, **quiet).then(
        show_strip, [opened, swept, *sliders], gallery, **quiet
    )
    swept.change(show_strip, [opened, swept, *sliders], gallery, **quiet)
    if sliders:
        gr.on([slider.change for slider in sliders], show, [opened, *sliders], compare, **quiet)
    for name, slider in sliders_by_name.items():
        # In the browser alone: a strip holds its own direction's strengths, so only a change of it matters.
        slider.input(None, None, swept, js=f"() => {json.dumps(name)}", api_visibility="private")

    def take(event: gr.SelectData, swept: str) -> list[Any]:
        return [STRIP[event.index] if name == swept else gr.skip() for name in names]

    gallery.select(take, swept, sliders, queue=False, api_visibility="private")
    with buttons:
        undo = gr.Button("Undo edits", size="sm", elem_id="edit-undo")
        for what in DOWNLOADS:
            parts.download(
                f"Save {what}",
                lambda opened, *strengths, what=what: save(
                    inverter, opened, edits_of(inverter, strengths), what
                ),
                [opened, *sliders],
                elem_id=f"edit-save-{what.replace(' ', '-')}",
                limit=LIMIT,
            )
    undo.click(lambda: [0.0] * len(sliders), None, sliders, queue=False, api_visibility="private").then(
        show_strip, [opened, swept, *sliders], gallery, **quiet
    )


def _slider(inverter: Inverter, name: str) -> gr.Slider:
    direction = inverter.directions[name]
    return gr.Slider(
        -REACH,
        REACH,
        0,
        step=0.1,
        label=name,
        info=direction.description.partition(";")[0] or None,
        buttons=["reset"],
        elem_id=f"edit-{name}",
    )
