"""Files of any published kind, read without executing them: path -> tree of plain values and tensors.

| begins with | what it is | read by |
|---|---|---|
| zip, with `data.pkl` | torch's container since 1.6 (.pt, .pth, .ckpt) | `unpickler.read_torch_zip` |
| zip, with `.npy` members | numpy's .npz | `_array` |
| pickle of torch's magic number | torch's container before 1.6 | `unpickler.read_torch_container` |
| another pickle | NVIDIA's .pkl | `unpickler.read_pickle` |
| \\x93NUMPY | numpy's .npy | `_array` |
| length and "{" | safetensors | the safetensors package |

torch.load is not used: even with weights_only=True it refuses the `argparse.Namespace` in many of these
files, and allocates what a file claims before it knows what the file holds.
"""

import ast
import math
import mmap
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mambastyle import checkpoints
from mambastyle.published.unpickler import (
    TORCH_MAGIC,
    PublishedError,
    StoredTensor,
    read_pickle,
    read_torch_container,
    read_torch_zip,
)

_TORCH_MAGIC_PICKLE = b"\x8a\x0a" + TORCH_MAGIC.to_bytes(10, "little") + b"."


def read(path: Path) -> Any:
    """The tree that a file holds; tensors are `StoredTensor` records or, from safetensors, tensors.

    Raises PublishedError, which names the file, for a file that is missing, truncated, of no known format, or
    that holds anything else than plain values of known kinds.
    """
    if not path.is_file():
        raise PublishedError(f"no file at {path}: check the path")
    try:
        return _read(path)
    except PublishedError as error:
        raise PublishedError(f"{path}: {error}") from error


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(16)
        if len(head) < 16:
            raise PublishedError(f"refused: it has {len(head)} bytes, so it is truncated")
        # Tensors stay views of the map, which lives as long as the last of them.
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path, data)
    if head.startswith(b"\x93NUMPY"):
        return _array(data, "the array")
    if head[0] == 0x80:
        is_torch = head[2:].startswith(_TORCH_MAGIC_PICKLE)
        return read_torch_container(data) if is_torch else read_pickle(data)
    if head[8:9] == b"{":
        try:
            with safetensors.safe_open(path, framework="pt") as opened:
                metadata = opened.metadata() or {}
            # One that `convert` wrote: its hash is verified.
            if metadata.get("format") == checkpoints.FORMAT:
                return checkpoints.load(path).tensors
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise PublishedError(f"refused: no readable safetensors file ({error})") from error
    # Protocol 0 has no header, and its first opcode names what would be called.
    if name := re.match(rb"c([\w.]{1,80})\n([\w.]{1,80})\n", bytes(data[:200])):
        named = b".".join(name.groups()).decode()
        raise PublishedError(f"refused: a pickle of protocol 0 that names {named!r}; 2 to 5 are read")
    raise PublishedError(
        "refused: no file of torch, numpy or safetensors and no pickle of protocol 2 to 5: "
        "give the file as its authors published it"
    )


# ---- Zip archives


def _read_zip(path: Path, data: memoryview) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise PublishedError(f"refused: a zip archive that is truncated or damaged ({error})") from error

    def member(name: str) -> memoryview:
        return _member(data, entries, name)

    pickled = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if any("/code/" in name for name in entries):
        raise PublishedError(
            "refused: a TorchScript archive, which is code; give the weights as a state dict"
        )
    if len(pickled) == 1:
        folder = pickled[0].removesuffix("data.pkl")
        order = f"{folder}byteorder"
        if order in entries and bytes(member(order)) != b"little":
            raise PublishedError("refused: it was written on a big-endian machine")
        return read_torch_zip(member(pickled[0]), lambda key: member(f"{folder}data/{key}"))
    if entries and all(name.endswith(".npy") for name in entries):
        return {name.removesuffix(".npy"): _array(member(name), name) for name in entries}
    raise PublishedError("refused: a zip archive that is neither torch's nor numpy's")


def _member(data: memoryview, entries: dict[str, zipfile.ZipInfo], name: str) -> memoryview:
    """One member of an archive as a view of the file: torch and numpy store, and do not compress."""
    info = entries.get(name)
    if info is None:
        raise PublishedError(f"refused: its archive lacks {name[:120]!r}")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise PublishedError(f"refused: {name[:120]!r} is compressed; save it again without compression")
    # The local header repeats the name and may hold more padding than the central one.
    local = bytes(data[info.header_offset : info.header_offset + 30])
    if len(local) < 30 or not local.startswith(b"PK\x03\x04"):
        raise PublishedError(f"refused: the header of {name[:120]!r} is damaged")
    first = info.header_offset + 30 + sum(struct.unpack("<HH", local[26:30]))
    if first + info.file_size > len(data):
        raise PublishedError(
            f"refused: {name[:120]!r} claims {info.file_size:,} bytes and the file has fewer: it is truncated"
        )
    return data[first : first + info.file_size]


# ---- Arrays


def _array(data: memoryview, name: str) -> Tensor:
    """A numpy array; object arrays (pickles) are refused, and the header's size is checked first."""
    if len(data) < 12 or bytes(data[:6]) != b"\x93NUMPY":
        raise PublishedError(f"refused: {name} is no numpy array")
    wide = data[6] > 1
    first = 12 if wide else 10
    length = struct.unpack("<I", data[8:12])[0] if wide else struct.unpack("<H", data[8:10])[0]
    if length > 4096 or first + length > len(data):
        raise PublishedError(f"refused: the header of {name} is truncated or damaged")
    try:
        header = ast.literal_eval(bytes(data[first : first + length]).decode("latin1"))
        code, fortran, shape = header["descr"], header["fortran_order"], tuple(header["shape"])
        if not isinstance(code, str) or not re.fullmatch(r"[<|=][fiub][1248]", code):
            raise PublishedError(
                f"refused: {name} holds {str(code)[:20]!r}, no plain numbers: save it as float32"
            )
        sizes_are_fine = len(shape) <= 8 and all(type(size) is int and size >= 0 for size in shape)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        if isinstance(error, PublishedError):
            raise
        raise PublishedError(f"refused: the header of {name} is damaged") from error
    dtype = np.dtype(code)
    held = len(data) - first - length
    if not sizes_are_fine or math.prod(shape) * dtype.itemsize != held:
        raise PublishedError(
            f"refused: {name} claims {' x '.join(map(str, shape))} numbers and holds {held:,} bytes"
        )
    array = np.frombuffer(data[first + length :], dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(array.copy())


# ---- Trees


def tensors_in(tree: Any) -> dict[str, Tensor | StoredTensor]:
    """The tensors of a flat mapping (a state dict) by name; other values are left out."""
    if not isinstance(tree, dict):
        return {}
    return {
        name: value
        for name, value in tree.items()
        if isinstance(name, str) and isinstance(value, Tensor | StoredTensor)
    }


def read_tensors(tensors: dict[str, Tensor | StoredTensor]) -> dict[str, Tensor]:
    """The tensors themselves. What they claim together is checked before the first one is made."""
    stored = {name: value for name, value in tensors.items() if isinstance(value, StoredTensor)}
    for name, value in stored.items():
        value.check(name)
    # Many tensors may claim the same storage, so that each is small and all together fill the memory.
    claimed = sum(value.nbytes for value in stored.values())
    held = sum({id(value.storage): len(value.storage.data) for value in stored.values()}.values())
    if claimed > 2 * held:
        raise PublishedError(
            f"refused: its tensors claim {claimed:,} bytes and it holds {held:,}: it is made to harm"
        )
    return {
        name: value.read(name) if isinstance(value, StoredTensor) else value
        for name, value in tensors.items()
    }
