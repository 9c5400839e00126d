"""CLIP (Radford et al. 2021): pictures and texts in one space, from a folder that the user names."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Of CLIP's own preprocessing; a folder's preprocessor_config.json goes before them.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_NEEDED = ("config.json", "model.safetensors", "tokenizer_config.json")


class Clip(nn.Module):
    """Text and picture to unit vectors of one space; frozen: gradients reach the pictures.

    folder: a CLIP in the format of transformers, with its tokenizer and model.safetensors; nothing is
        downloaded, and no pickle is read. Needs the extra [text].
    Raises ValueError for a folder that is not there or lacks a file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        folder = Path(folder)
        if missing := [name for name in _NEEDED if not (folder / name).is_file()]:
            raise ValueError(
                f"{folder} is no CLIP of transformers: it lacks {', '.join(missing)}; give a folder such as "
                "a download of openai/clip-vit-base-patch32"
            )
        from transformers import CLIPModel, CLIPTokenizer  # an optional package, and slow to import

        # As a name that is a folder: anything else would be looked for on a server.
        options: dict[str, Any] = {"local_files_only": True}
        self.tokenizer = CLIPTokenizer.from_pretrained(str(folder.resolve()), **options)
        model = CLIPModel.from_pretrained(str(folder.resolve()), use_safetensors=True, **options)
        self.model = model.float().eval().requires_grad_(False)
        vision: Any = model.config.vision_config
        self.side = int(vision.image_size)
        mean, std = _normalisation(folder)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @torch.no_grad()
    def text(self, texts: Iterable[str]) -> Float[Tensor, "texts dim"]:
        """The embedding of each text, of unit length."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        device = self.get_buffer("mean").device
        pooled = self.model.text_model(
            input_ids=tokens["input_ids"].to(device), attention_mask=tokens["attention_mask"].to(device)
        ).pooler_output
        return F.normalize(self.model.text_projection(pooled), dim=1)

    def forward(self, image: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """The embedding of each picture in [-1, 1], of unit length."""
        # images.resize clamps, which would stop the gradient of every saturated pixel.
        image = F.interpolate(image, (self.side, self.side), mode="bicubic", antialias=True)
        normal = ((image + 1) / 2 - self.get_buffer("mean")) / self.get_buffer("std")
        pooled = self.model.vision_model(pixel_values=normal).pooler_output
        return F.normalize(self.model.visual_projection(pooled), dim=1)


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return _MEAN, _STD
    values = json.loads(path.read_text(encoding="utf-8"))
    return tuple(values.get("image_mean", _MEAN)), tuple(values.get("image_std", _STD))
