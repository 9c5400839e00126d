"""Pictures in and out: the only place where files, PIL pictures and arrays become tensors, and back.

Inside the package a picture is a float tensor (3 height width), a batch (batch 3 height width), RGB in
[-1, 1]. At the door a float tensor has that range too, a float array has numpy's custom (height width 3) in
[0, 1], and integers go from 0 to the most their type can hold.
"""

import glob
import io
import math
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from mambastyle.checkpoints import nearest
from mambastyle.files import write_whole

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
# What Pillow may try. Its other plugins (EPS runs Ghostscript) have no business with a stranger's file.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000", "TGA")
_WRITERS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# What Pillow's decoders raise on damaged files.
_DECODING_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError, OverflowError,
    struct.error, zlib.error,
)  # fmt: skip


class ImageError(ValueError):
    """A picture that cannot be read or written; the message says what was expected, what came, what to do."""


class ImageWarning(UserWarning):
    """A picture that was read, but not as it stood: transparency composited."""


class _QuietPillow:
    """Pillow warns of odd metadata and of large pictures below its limit; neither concerns the caller.

    `warnings.catch_warnings` belongs to the process: two threads that each restore what they found can leave
    everything ignored for good. So the first that comes in sets the filter and the last that leaves takes it
    back, and it ignores Pillow's warnings alone.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\b")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_quiet_pillow = _QuietPillow()

Background = Literal["white", "black"]


def read(
    source: Any, *, at_least: int | None = None, background: Background = "white"
) -> Float[Tensor, "3 height width"]:
    """A picture as a tensor in [-1, 1], upright, sRGB, opaque.

    `source` is a path, the bytes of a file or one opened for bytes, a PIL picture, an array (height width) or
    (height width 1|3|4), of integers or in [0, 1], or a tensor (3 height width) or (1 3 height width), of
    uint8 or in [-1, 1]. EXIF rotation is applied, an embedded colour profile and CMYK converted to sRGB, grey
    and palettes expanded, 16 bits kept; transparency is composited on `background` with an ImageWarning. Of
    an animation it is the first frame. With `at_least`, a picture whose short side is four times that or more
    is first reduced by a whole factor (a box filter), which spares time and memory.

    Raises ImageError with a remedy when it is no picture, is damaged, or is too large (Pillow's own limit
    against decompression bombs, 179 million pixels).
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source, background)
    if isinstance(source, Image.Image):
        return _from_pil(source, "the picture", at_least, background)
    if isinstance(source, bytes | bytearray):
        return _decode(bytes(source), "the picture", at_least, background)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        return _decode(_read_bytes(path), str(path), at_least, background)
    if hasattr(source, "read"):
        return _decode(_read_open(source), "the picture", at_least, background)
    raise TypeError(
        f"cannot read a picture from {type(source).__name__}: "
        "give a path, bytes, a file opened for bytes, a PIL picture, an array or a tensor"
    )


def to_pil(image: Float[Tensor, "3 height width"]) -> Image.Image:
    """The picture in 8 bits; values are clamped to [-1, 1] and rounded. Raises ImageError on NaN."""
    if not bool(torch.isfinite(image).all()):
        raise ImageError("the picture has values that are NaN or infinite: check the network that made it")
    pixels = image.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())


def write(path: str | os.PathLike[str], image: Tensor | Image.Image, quality: int = 95) -> Path:
    """Write a picture as PNG, JPEG or WebP, after the suffix of `path`, whole or not at all.

    `quality` (1 to 100) is JPEG's and WebP's. Raises ImageError for another suffix, files.WriteError (an
    OSError) when the disk is full.
    """
    path = Path(path)
    check_writable(path)
    return write_whole(path, encode(image, path.suffix, quality))


def encode(image: Tensor | Image.Image, suffix: str, quality: int = 95) -> memoryview:
    """The file that `write` would write under a name with this suffix."""
    check_writable(f"picture{suffix}")
    picture = to_pil(image) if isinstance(image, Tensor) else image
    buffer = io.BytesIO()
    form = _WRITERS[suffix.lower()]
    # Full chroma: at 64 px JPEG's usual halving of the colours shows.
    options = {"PNG": {}, "JPEG": {"quality": quality, "subsampling": 0}, "WEBP": {"quality": quality}}[form]
    picture.save(buffer, form, **options)
    return buffer.getbuffer()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise ImageError when no picture can be written under this name, before the work is done for it."""
    suffix = Path(path).suffix
    if suffix.lower() not in _WRITERS:
        known = ", ".join(_WRITERS)
        raise ImageError(f"cannot write {path}: its suffix is {suffix or 'missing'}, use one of {known}")


def find(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    suffixes: Sequence[str] = SUFFIXES,
    what: str = "pictures",
) -> list[Path]:
    """The pictures that files, folders and globs (`faces/*.png`, `**/*.jpg`) stand for, each once.

    A named file is taken whatever its suffix; of a folder (not those below it) and a glob, sorted by name,
    the files with one of `suffixes`. Raises ImageError when one of the sources stands for no picture.
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    found: dict[Path, None] = {}
    for source in sources:
        found.update(dict.fromkeys(_find_one(Path(source).expanduser(), tuple(suffixes), what)))
    return list(found)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """(..., 3 h w) -> (..., 3 height width), bicubic and antialiased, clamped to [-1, 1]."""
    if height < 1 or width < 1:
        raise ValueError(f"cannot resize to {height} x {width}: height and width must be 1 or more")
    if image.shape[-2:] == (height, width):
        return image
    batch = image.reshape(-1, *image.shape[-3:])
    resized = F.interpolate(batch, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1).reshape(*image.shape[:-2], height, width)


def fit(image: Tensor, side: int) -> Tensor:
    """(..., 3 h w) scaled down, where it is larger, to `side` pixels on its long side."""
    height, width = image.shape[-2:]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    return resize(image, max(1, round(height * scale)), max(1, round(width * scale)))


def blur(image: Tensor, deviation: float, radius: int | None = None) -> Tensor:
    """(..., channels h w) through a Gaussian of so many pixels, cut at `radius` (default: three deviations).

    Outside the picture its border is repeated.
    """
    radius = max(1, round(3 * deviation)) if radius is None else radius
    offsets = torch.arange(-radius, radius + 1, device=image.device, dtype=image.dtype)
    kernel = torch.exp(-offsets.square() / (2 * deviation**2))
    kernel = kernel / kernel.sum()
    maps = image.reshape(-1, 1, *image.shape[-2:])
    for axis in (-2, -1):
        shape = [1, 1, 1, 1]
        shape[axis] = len(kernel)
        pad = (0, 0, radius, radius) if axis == -2 else (radius, radius, 0, 0)
        maps = F.conv2d(F.pad(maps, pad, mode="replicate"), kernel.view(shape))
    return maps.reshape(image.shape)


def add_grain(
    image: Float[Tensor, "*batch 3 height width"], deviation: float, generator: torch.Generator
) -> Float[Tensor, "*batch 3 height width"]:
    """Pictures in [-1, 1] with normal noise of this deviation, in each pixel and colour; not clamped.

    The picture itself for a deviation of 0. The draw depends on the generator and the picture's size.
    """
    if not deviation:
        return image
    noise = torch.randn(image.shape, generator=generator, device=generator.device)
    return image + deviation * noise.to(image.device)


def center_crop_square(image: Tensor) -> Tensor:
    """(..., height width) -> (..., side side): the middle, with side the smaller of both."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[..., top : top + side, left : left + side]


def crop_middle(image: Tensor, height: int, width: int) -> Tensor:
    """(..., h w) -> (..., height width): the middle, the inverse of `pad_middle`."""
    top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
    if top < 0 or left < 0:
        size = f"{image.shape[-2]} x {image.shape[-1]}"
        raise ValueError(f"cannot crop {size} to {height} x {width}: the crop must lie inside the picture")
    return image[..., top : top + height, left : left + width]


def pad_middle(image: Tensor, height: int, width: int) -> Tensor:
    """(..., h w) -> (..., height width): the picture in the middle, black around it."""
    top, left = (height - image.shape[-2]) // 2, (width - image.shape[-1]) // 2
    if top < 0 or left < 0:
        size = f"{image.shape[-2]} x {image.shape[-1]}"
        raise ValueError(f"cannot pad {size} to {height} x {width}: the picture must fit inside")
    bottom, right = height - image.shape[-2] - top, width - image.shape[-1] - left
    return F.pad(image, (left, right, top, bottom), value=-1.0)


def to_framed_square(image: Tensor, height: int, width: int) -> Tensor:
    """(..., h w) -> (..., side side): the middle in the proportions height : width, between black bars."""
    h, w = image.shape[-2:]
    h, w = min(h, max(round(w * height / width), 1)), min(w, max(round(h * width / height), 1))
    side = max(h, w)
    return pad_middle(crop_middle(image, h, w), side, side)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """(batch 3 h w) padded at the bottom and right to multiples of `multiple`; `crop` undoes it.

    The picture is mirrored, or where it is smaller than the padding, its border repeated.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}, expected 1 or more")
    height, width = image.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    if not bottom and not right:
        return image
    mode = "reflect" if bottom < height and right < width else "replicate"
    return F.pad(image, (0, right, 0, bottom), mode=mode)


def crop(image: Tensor, height: int, width: int) -> Tensor:
    """(..., h w) -> (..., height width): the top left corner, the inverse of `pad_to_multiple`."""
    if image.shape[-2] < height or image.shape[-1] < width:
        size = f"{image.shape[-2]} x {image.shape[-1]}"
        raise ValueError(f"cannot crop {size} to {height} x {width}: the crop must lie inside the picture")
    return image[..., :height, :width]


def grid(
    images: Sequence[Tensor] | Tensor,
    columns: int,
    labels: Sequence[str] | None = None,
    *,
    scale: int = 1,
    gap: int = 2,
    column_labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
) -> Float[Tensor, "3 height width"]:
    """A contact sheet: pictures of one size (3 h w) row by row, on white, with `gap` pixels between them.

    `labels` stand under the pictures, one each; `column_labels` above the columns; `row_labels` left of the
    rows. Each picture is enlarged `scale` times by repeating pixels, so that small ones can be looked at.
    """
    images = list(images)
    if not images or columns < 1:
        raise ValueError(f"a grid of {len(images)} pictures in {columns} columns: give one or more of both")
    sizes = {tuple(image.shape) for image in images}
    if len(sizes) > 1:
        raise ValueError(f"pictures of several sizes in one grid ({sorted(sizes)}): resize them first")
    rows = math.ceil(len(images) / columns)
    for name, texts, count in [
        ("labels", labels, len(images)),
        ("column_labels", column_labels, columns),
        ("row_labels", row_labels, rows),
    ]:
        if texts is not None and len(texts) != count:
            raise ValueError(f"{len(texts)} {name} for {count}: give one each")

    height, width = images[0].shape[-2] * scale, images[0].shape[-1] * scale
    font = ImageFont.load_default(size=max(9, min(width // 7, 20)))
    line = math.ceil(font.getbbox("Ag")[3]) + 3
    left = 6 + math.ceil(max(font.getlength(text) for text in row_labels)) if row_labels else 0
    top = line if column_labels else 0
    pitch_y, pitch_x = height + gap + (line if labels else 0), width + gap
    sheet = Image.new("RGB", (left + columns * pitch_x - gap, top + rows * pitch_y - gap), "white")
    draw = ImageDraw.Draw(sheet)

    def text_at(x: float, y: float, text: str, room: float) -> None:
        while len(text) > 1 and font.getlength(text) > room:
            text = text[:-2].rstrip() + "…"
        draw.text((x, y), text, fill="black", font=font)

    for index, image in enumerate(images):
        x, y = left + index % columns * pitch_x, top + index // columns * pitch_y
        picture = to_pil(image)
        sheet.paste(
            picture.resize((width, height), Image.Resampling.NEAREST) if scale > 1 else picture, (x, y)
        )
        if labels:
            text_at(x + 1, y + height, labels[index], width)
    for column, text in enumerate(column_labels or ()):
        text_at(left + column * pitch_x + 1, 0, text, width)
    for row, text in enumerate(row_labels or ()):
        text_at(2, top + row * pitch_y + (height - line) / 2, text, left)
    return _from_pil(sheet, "the grid", None, "white")


# ---- from files ----------------------------------------------------------------------------------------


def _find_one(source: Path, suffixes: tuple[str, ...], what: str) -> list[Path]:
    def wanted(files: Iterable[Path]) -> list[Path]:
        visible = (f for f in files if f.suffix.lower() in suffixes and not f.name.startswith("."))
        return sorted(f for f in visible if f.is_file())

    if source.is_file():
        return [source]
    if source.is_dir():
        if files := wanted(source.iterdir()):
            return files
        below = next((f for f in source.rglob("*") if f.suffix.lower() in suffixes), None)
        hint = f'; there are some below it: give "{source}/**/*"' if below else f" ({', '.join(suffixes)})"
        raise ImageError(f"no {what} in the folder {source}{hint}")
    if glob.has_magic(str(source)):
        if files := wanted(Path(match) for match in glob.glob(str(source), recursive=True)):
            return files
        raise ImageError(f"no {what} match {source}: check the pattern")
    raise ImageError(_missing(source))


def _missing(path: Path) -> str:
    siblings = [f.name for f in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, siblings)
    return f"no such file: {path}; " + (f"did you mean {path.parent / near}?" if near else "check the path")


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ImageError(f"{path} is a folder: name a picture in it, or expand it with images.find")
    if not path.exists():
        raise ImageError(_missing(path))
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}; check its permissions") from error


def _read_open(file: Any) -> bytes:
    data = file.read()
    if not isinstance(data, bytes | bytearray):
        raise ImageError("the picture comes from a file opened for text: open it with 'rb'")
    return bytes(data)


def _decode(data: bytes, name: str, at_least: int | None, background: Background) -> Tensor:
    if not data:
        raise ImageError(f"{name} is empty (0 bytes): copy or download it again")
    with _quiet_pillow:
        try:
            picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        except UnidentifiedImageError as error:
            raise ImageError(
                f"{name} is not a picture that can be read: give PNG, JPEG, WebP or TIFF"
            ) from error
        except Image.DecompressionBombError as error:
            raise ImageError(_too_large(name)) from error
        except _DECODING_ERRORS as error:
            raise ImageError(_damaged(name, error)) from error
        try:
            if at_least and picture.format in ("JPEG", "MPO"):
                # Decodes a large JPEG at a half, quarter or eighth of its size.
                picture.draft(None, (4 * at_least, 4 * at_least))
            picture.load()
        except Image.DecompressionBombError as error:
            raise ImageError(_too_large(name)) from error
        except _DECODING_ERRORS as error:
            raise ImageError(_damaged(name, error)) from error
    return _from_pil(picture, name, at_least, background)


def _too_large(name: str) -> str:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    return f"{name} has more than {limit / 1e6:.0f} million pixels: scale it down first"


def _damaged(name: str, error: Exception) -> str:
    return f"{name} is truncated or damaged ({str(error).rstrip('.') or type(error).__name__}): copy it again"


# ---- from PIL, arrays and tensors ----------------------------------------------------------------------


def _from_pil(picture: Image.Image, name: str, at_least: int | None, background: Background) -> Tensor:
    picture = _upright(picture)
    factor = min(picture.size) // (2 * at_least) if at_least else 1
    if factor >= 2 and picture.mode.startswith("I;16"):
        picture = picture.convert("I")  # Pillow reduces 32 bits, and not 16
    if factor >= 2 and picture.mode not in ("P", "PA", "1"):
        picture = picture.reduce(factor)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _from_high_depth(np.asarray(picture), name)
    if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = _opaque(picture, name, background)
    return _from_array(np.array(_to_srgb(picture)), background)


def _upright(picture: Image.Image) -> Image.Image:
    with _quiet_pillow:
        try:
            return ImageOps.exif_transpose(picture)
        except _DECODING_ERRORS:
            # Damaged EXIF says nothing about the pixels.
            return picture


def _to_srgb(picture: Image.Image) -> Image.Image:
    profile = picture.info.get("icc_profile")
    if profile and picture.mode in ("RGB", "CMYK", "L"):
        try:
            return ImageCms.profileToProfile(  # type: ignore[return-value]
                picture,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                outputMode="RGB",
            )
        except (ImageCms.PyCMSError, OSError, ValueError):
            # A broken profile, or one for another mode: the plain conversion is what viewers show too.
            pass
    return picture.convert("RGB")


def _opaque(picture: Image.Image, name: str, background: Background) -> Image.Image:
    rgba = picture.convert("RGBA")
    if rgba.getchannel("A").getextrema()[0] == 255:
        opaque = rgba.convert("RGB")
    else:
        warnings.warn(
            f"{name} is transparent in places: composited on {background}", ImageWarning, stacklevel=5
        )
        opaque = Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    if picture.mode in ("RGBA", "RGB"):
        opaque.info["icc_profile"] = picture.info.get("icc_profile")
    return opaque


def _from_high_depth(values: np.ndarray, name: str) -> Tensor:
    low, high = float(values.min()), float(values.max())
    # Pillow opens 16-bit grey as I;16 or I, and float TIFFs as F; neither says where white is.
    white = 1.0 if values.dtype.kind == "f" and high <= 1 else 65535.0
    if not (low >= 0 and high <= white):
        raise ImageError(
            f"{name} has grey values from {low:g} to {high:g}, expected 0..65535 or 0.0..1.0: rescale it"
        )
    return _from_array((values / white).astype(np.float32), "white")


def _from_array(values: np.ndarray, background: Background) -> Tensor:
    channels = values.shape[2] if values.ndim == 3 else 1
    if values.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in values.shape:
        raise ImageError(f"an array of shape {values.shape} is no picture: expected (height, width[, 1|3|4])")
    if values.dtype.kind == "f":
        low, high = float(values.min()), float(values.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise ImageError(
                f"a float array from {low:g} to {high:g} is no picture: expected [0, 1] "
                "(for [-1, 1] give a tensor of shape (3, height, width))"
            )
        unit = torch.from_numpy(values.astype(np.float32))
    elif values.dtype == bool:
        unit = torch.from_numpy(values.astype(np.float32))
    elif values.dtype.kind == "u":
        unit = torch.from_numpy(values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max))
    else:
        raise ImageError(
            f"an array of {values.dtype} is no picture: expected uint8, uint16 or floats in [0, 1]"
        )
    unit = unit.reshape(*values.shape[:2], channels).permute(2, 0, 1)
    if channels == 4:
        alpha = unit[3:]
        if bool((alpha < 1).any()):
            warnings.warn(
                f"the array is transparent in places: composited on {background}", ImageWarning, stacklevel=3
            )
        unit = unit[:3] * alpha + (1 - alpha if background == "white" else 0)
    return unit.expand(3, -1, -1).clamp(0, 1).mul(2).sub(1).contiguous()


def _from_tensor(image: Tensor) -> Tensor:
    if image.ndim == 4 and image.shape[0] == 1:
        image = image[0]
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ImageError(f"a tensor of shape {tuple(image.shape)} is no picture: expected (3, height, width)")
    image = image.detach()
    if image.dtype == torch.uint8:
        image = image.float() / 127.5 - 1
    elif not image.is_floating_point():
        raise ImageError(f"a tensor of {image.dtype} is no picture: expected floats in [-1, 1] or uint8")
    image = image.float()
    low, high = float(image.min()), float(image.max())
    # A network's own output may overshoot a little; 0..255 in floats is a mistake.
    if not (low >= -2 and high <= 2):
        raise ImageError(f"a float tensor from {low:g} to {high:g} is no picture: expected [-1, 1]")
    return image.clamp(-1, 1).expand(3, -1, -1)
