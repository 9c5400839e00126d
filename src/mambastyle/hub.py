"""Models as folders that the Hugging Face hub keeps: weights that hold their config, and a model card.

Nothing here reaches the network unless it is told to: a hub id is looked up in huggingface_hub's cache.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mambastyle import checkpoints
from mambastyle.checkpoints import Checkpoint, CheckpointError
from mambastyle.files import write_whole
from mambastyle.presets import PRESETS

LIBRARY = "mambastyle"
# Licences of checkpoint cards by their names on the hub, which calls all others "other".
_LICENCES = {
    "cc by-sa 4.0": "cc-by-sa-4.0",
    "cc by 4.0": "cc-by-4.0",
    "apache-2.0": "apache-2.0",
    "mit": "mit",
}
_FETCHED = ["*.safetensors", "*.md", "config.json"]


def locate(
    source: str | os.PathLike[str], *, download: bool = False, revision: str | None = None
) -> str | os.PathLike[str]:
    """The folder that a hub id (`owner/name`) stands for; a preset's name or a path stays as it is.

    Without `download` only the cache is asked. Raises CheckpointError, with the remedy, when it is not there
    or cannot be fetched, and ModuleNotFoundError without huggingface_hub.
    """
    text = str(source)
    if text in PRESETS or Path(text).expanduser().exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return source
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            text, revision=revision, local_files_only=not download, allow_patterns=_FETCHED
        )
    except LocalEntryNotFoundError as error:
        remedy = (
            "check the id and the connection"
            if download
            else f"from_pretrained({text!r}, download=True) fetches it"
        )
        raise CheckpointError(
            f"no folder {text} here, and no such model in the cache of huggingface_hub: {remedy}"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"cannot fetch {text} ({reason}): check the id and the connection") from error
    return Path(folder)


def store(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    kind: str,
    config: Any,
    source: Path | None = None,
    card: Mapping[str, Any] | None = None,
) -> str:
    """Write a model's tensors as a checkpoint, and return its sha256.

    It is a copy of `source`, byte for byte, as long as the tensors are still those of that file and its card
    says what `card` says; else a new file with the card of `source` and `card` on top.
    """
    merged = dict(card or {})
    if source is not None:
        stored = checkpoints.load(source, kind=kind)
        merged = stored.card | merged
        if merged == stored.card and _holds(stored, tensors):
            write_whole(path, source.read_bytes())
            return stored.sha256
    return checkpoints.save(path, tensors, kind=kind, config=config, card=merged)


def _holds(stored: Checkpoint, tensors: Mapping[str, Tensor]) -> bool:
    found = stored.tensors
    return all(
        name in found and torch.equal(tensor.cpu(), found[name].to(tensor.dtype))
        for name, tensor in tensors.items()
    )


def describe(
    folder: Path,
    files: Iterable[Path],
    *,
    name: str,
    loads: tuple[str, str],
    tags: Iterable[str],
    sources: Iterable[Path],
) -> None:
    """Write config.json and, unless there is one, README.md: the model card, from the checkpoints' cards.

    `loads` is the variable and the function of the Python lines that load the model; what stands in the *.md
    beside one of `sources`, the checkpoints that were copied, goes into the card.
    """
    headers = [checkpoints.read_header(path) for path in files]
    parts = {
        header.path.name: {"kind": header.kind, "config": header.config, "sha256": header.sha256}
        for header in headers
    }
    config = {"library_name": LIBRARY, "model_type": headers[0].kind, "name": name, "files": parts}
    write_whole(folder / "config.json", json.dumps(config, indent=2, sort_keys=True).encode())
    card = folder / "README.md"
    if not card.exists():
        beside = {path.name: path.with_suffix(".md") for path in sources}
        texts = {file: path.read_text("utf-8") for file, path in beside.items() if path.is_file()}
        write_whole(card, _model_card(headers, name, loads, list(tags), texts).encode())


def _model_card(
    headers: list[Checkpoint], name: str, loads: tuple[str, str], tags: list[str], texts: Mapping[str, str]
) -> str:
    licences = list(dict.fromkeys(str(h.card["licence"]) for h in headers if h.card.get("licence")))
    front: dict[str, Any] = {"library_name": LIBRARY, "pipeline_tag": "image-to-image", "tags": tags}
    if len(licences) == 1 and licences[0].lower() in _LICENCES:
        front["license"] = _LICENCES[licences[0].lower()]
    elif licences:
        front |= {"license": "other", "license_name": "; ".join(licences)}
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {name}", ""]
    variable, function = loads
    lines += ["```python", "import mambastyle as ms", ""]
    lines += [f'{variable} = {function}("OWNER/{name}", download=True)  # from the Hugging Face hub']
    lines += [f'{variable} = {function}("{name}")  # or from a copy of this folder', "```"]
    for header in headers:
        lines += ["", f"## {header.path.name}", ""]
        if header.path.name in texts:
            # Without its own title, the headings one level down.
            text = re.sub(r"^# .*\n", "", texts[header.path.name].strip())
            lines += [re.sub(r"^(#+ )", r"#\1", text, flags=re.MULTILINE).strip(), ""]
        lines += ["| | |", "|---|---|", f"| kind | {header.kind} |", f"| sha256 | {header.sha256} |"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in header.card.items()]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return " ".join(text.split()).replace("|", "\\|")
