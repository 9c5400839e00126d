"""Edit pictures with an exported model: numpy, pillow and onnxruntime, no torch.

mambastyle export kaokore64 --out onnx
python examples/onnx_edit.py onnx examples/kaokore_00007421.webp gender=1.5 noble=-1

mambastyle export samam-small --out onnx-samam
python examples/onnx_edit.py onnx-samam photo.jpg painting.jpg
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path: Path, side: int | None = None) -> np.ndarray:
    """A picture as (1, 3, height, width) in [-1, 1]; with `side` its middle square of this side."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    if side is not None:
        picture = ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1


def write(path: Path, picture: np.ndarray) -> None:
    pixels = np.rint((picture[0].clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)


def edit(folder: Path, picture: Path, edits: list[str]) -> np.ndarray:
    """One picture, inverted and moved by the sum of strength times direction."""
    session = onnxruntime.InferenceSession(folder / "edit.onnx")
    image, direction = session.get_inputs()
    total = np.zeros((1, *direction.shape[1:]), np.float32)
    with np.load(folder / "directions.npz") as directions:
        for text in edits:
            name, _, strength = text.partition("=")
            if name not in directions:
                sys.exit(f"no direction named {name!r}: there are {', '.join(directions)}")
            total += float(strength) * directions[name]
    return session.run(None, {"image": read(picture, image.shape[2]), "direction": total})[0]


def stylize(folder: Path, content: Path, style: Path) -> np.ndarray:
    """One photograph in the manner of a painting, in its own size."""
    code = onnxruntime.InferenceSession(folder / "encode_style.onnx").run(None, {"style": read(style)})[0]
    session = onnxruntime.InferenceSession(folder / "stylize.onnx")
    about = session.get_modelmeta().custom_metadata_map
    random = np.random.default_rng(0)
    photo = read(content)
    # The noise that the network's contents had in training.
    grain = float(about["grain"]) * random.standard_normal(photo.shape, np.float32)
    inputs = {"content": photo + grain, "code": code}
    for orders in session.get_inputs()[2:]:
        # Mamba-ST sees the style's tokens in a random order in each layer.
        patch = int(about["patch"])
        positions = np.prod([max(2, -(-size // patch)) for size in inputs["content"].shape[2:]])
        inputs["orders"] = np.stack([random.permutation(positions) for _ in range(orders.shape[1])])[None]
    return session.run(None, inputs)[0]


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    folder, picture, rest = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    stylizes = not any("=" in word for word in rest)
    out = Path(f"{picture.stem}.{'stylized' if stylizes else 'edited'}.png")
    write(out, stylize(folder, picture, Path(rest[0])) if stylizes else edit(folder, picture, rest))
    print(out)
