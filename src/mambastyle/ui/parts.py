"""What the tabs share: a picture field that leaves reading to the library, errors in one line, downloads."""

import contextlib
import html
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData
from gradio.utils import get_upload_folder

# What a caller, a file or a disk can cause; anything else is a mistake of ours and shows as such.
EXPECTED = (ValueError, OSError, MemoryError)
# Runs in the browser: saves the file that the hidden holder was just given, under its own name.
SAVE_FILE = """(file) => {
    const link = document.createElement("a");
    link.href = file.url;
    link.download = file.orig_name;
    link.click();
}"""


def photo(label: str, **settings: Any) -> gr.Image:
    """A picture field whose value is the uploaded file as it came.

    Gradio would open it with Pillow first: other limits, another rotation, other error messages. It is told
    on the instance, since a subclass of a component writes a stub file beside this one.
    """
    field = gr.Image(
        label=label,
        sources=["upload", "clipboard"],
        type="filepath",
        buttons=[],
        interactive=True,
        **settings,
    )
    field.preprocess = _path  # type: ignore[method-assign]
    return field


def _path(payload: ImageData | None) -> str | None:
    return None if payload is None else payload.path


@contextlib.contextmanager
def friendly(title: str) -> Iterator[None]:
    """Inside, an expected error becomes a message on the page with this title."""
    try:
        yield
    except EXPECTED as error:
        text = " ".join(str(error).split()) or type(error).__name__
        # Visitors know their file by its name, not by where it lies here.
        text = re.sub(re.escape(get_upload_folder()) + r"[/\\]\w+[/\\]", "", text)
        raise gr.Error(html.escape(text), title=title, duration=15, print_exception=False) from error


def name_of(path: str) -> str:
    """The stem of an upload, for the files made from it."""
    return Path(path).stem[:60] or "picture"


def new_file(name: str) -> Path:
    """A path of this name in a folder of its own, where the page's files lie until they are cleared."""
    folder = Path(get_upload_folder()) / secrets.token_hex(8)
    folder.mkdir(parents=True)
    return folder / name


def download(label: str, make: Any, inputs: Sequence[Any], *, elem_id: str, limit: str) -> gr.Button:
    """A button that makes a file when it is pressed and saves it: `make(*inputs)` gives the path."""
    button = gr.Button(label, size="sm", elem_id=elem_id)
    holder = gr.File(visible="hidden", elem_id=f"{elem_id}-file")
    made = button.click(
        make, inputs, holder, show_progress="hidden", concurrency_id=limit, api_visibility="private"
    )
    made.success(None, holder, None, js=SAVE_FILE, api_visibility="private")
    return button


def examples(folder: Path | None, limit: int = 12) -> list[Path]:
    """The example pictures of a folder, if there is one."""
    if folder is None or not folder.is_dir():
        return []
    suffixes = (".png", ".jpg", ".jpeg", ".webp")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes)[:limit]
