"""A reader of pickles that executes nothing: opcodes move plain data, known globals become plain records.

Python's unpickler calls whatever a file names. This one is a loop over the opcodes which the published
files use. A global is only a name, looked up in `GLOBALS`; "calling" it runs the few lines of this module
that stand for it. Every length is compared with the bytes that are left before anything is allocated, byte
strings stay views of the file, and tensors stay `StoredTensor` records until somebody asks for one.

Python documents the opcodes in `pickletools`; torch's older container is a row of pickles and raw bytes.
"""

import dataclasses
import math
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mambastyle.checkpoints import CheckpointError

TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""What the first pickle in torch's older container holds."""


class PublishedError(CheckpointError):
    """A file that is refused or does not fit; the message names what is wrong and what to do."""


@dataclasses.dataclass(eq=False)
class Storage:
    """The numbers behind one or more tensors; `data` is a view of the file."""

    dtype: torch.dtype
    count: int
    data: memoryview = dataclasses.field(default_factory=lambda: memoryview(b""))

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as a file describes it; `read` makes the tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.storage.itemsize

    def check(self, name: str) -> None:
        """Raise PublishedError if the tensor claims numbers that its storage does not hold."""
        count = math.prod(self.shape)
        span = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        held = len(self.storage.data) // self.storage.itemsize
        # Expanded tensors (stride 0) would pass the second test with any size.
        if count > held or (count and self.offset + span >= held):
            raise PublishedError(
                f"the tensor {name!r} claims {count} numbers {self.shape} and its storage holds {held}: "
                "the file is damaged or made to harm"
            )

    def read(self, name: str) -> Tensor:
        """The tensor, contiguous and with memory of its own."""
        self.check(name)
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        span = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True)) + 1
        first, stop = self.offset * self.storage.itemsize, (self.offset + span) * self.storage.itemsize
        # A copy into a bytearray: torch warns about memory that it may not write.
        flat = torch.frombuffer(bytearray(self.storage.data[first:stop]), dtype=self.storage.dtype)
        return flat.as_strided(self.shape, self.stride).contiguous()


@dataclasses.dataclass(eq=False)
class Persistent:
    """One of NVIDIA's persistent objects: its class's name and its attributes; its source text is dropped."""

    class_name: str
    state: dict[str, Any]


@dataclasses.dataclass(eq=False)
class Record:
    """An object of a known harmless class (argparse.Namespace and the like), as its attributes."""

    class_name: str
    state: dict[str, Any] = dataclasses.field(default_factory=dict)


class _Dict(dict):
    """A dictionary that BUILD may add attributes to, as EasyDict and its like are pickled."""


@dataclasses.dataclass(frozen=True)
class Global:
    """A name in a pickle; `call` stands for calling it, and None for a name that cannot be called."""

    name: str
    call: Callable[..., Any] | None = None
    dtype: torch.dtype | None = None


class _Refusal(Exception):
    """Why a pickle is refused, without the name of the file."""


# ---- What the known globals stand for


def _size(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > 16:
        raise _Refusal("a tensor's size or stride is no tuple of numbers")
    if not all(type(value) is int and 0 <= value < 2**48 for value in values):
        raise _Refusal("a tensor's size or stride is no tuple of sensible numbers")
    return tuple(values)


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise _Refusal("a tensor without storage")
    shape, steps = _size(size), _size(stride)
    if len(shape) != len(steps):
        raise _Refusal(f"a tensor of size {shape} with stride {steps}")
    return StoredTensor(storage, _size((offset,))[0], shape, steps)


def _rebuild_parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise _Refusal("a parameter that is no tensor")
    return data


def _load_from_bytes(data: Any) -> Storage:
    if not isinstance(data, memoryview):
        raise _Refusal("a storage that is no byte string")
    storage = read_torch_container(data, nested=True)
    if not isinstance(storage, Storage):
        raise _Refusal("a storage that holds something else")
    return storage


def _persistent(meta: Any) -> Persistent:
    if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
        raise _Refusal("a persistent object without state")
    name = meta.get("class_name")
    return Persistent(name if isinstance(name, str) else "?", meta["state"])


def _key(value: Any) -> Any:
    """`value`, if it may stand in a set or as a key: the hash of nested tuples can take for ever."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Global | memoryview):  # A class as a key (Lightning's callbacks), or bytes.
        return value.name if isinstance(value, Global) else bytes(value[:256])
    raise _Refusal(f"a set or the keys of a dictionary hold a {type(value).__name__}")


def _dict(cls: type[dict]) -> Callable[..., dict]:
    def make(*items: Any) -> dict:
        made = cls()
        for pair in items[0] if items else ():
            key, value = pair
            made[_key(key)] = value
        return made

    return make


def _numpy_dtype(code: Any, *_: Any) -> Record:
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[fiub][1248]", code):
        raise _Refusal("a numpy number of an unknown type")
    return Record("numpy.dtype", {"code": code})


def _numpy_scalar(dtype: Any, data: Any) -> float | int | bool:
    code = _dtype_of(dtype)
    if not isinstance(data, memoryview) or len(data) != code.itemsize:
        raise _Refusal("a numpy number of another length than its type")
    return np.frombuffer(data, code)[0].item()


def _dtype_of(record: Any) -> np.dtype:
    if not isinstance(record, Record) or record.class_name != "numpy.dtype":
        raise _Refusal("a numpy array without type")
    return np.dtype(record.state["code"])


def _encode(text: Any, encoding: Any = "latin1") -> memoryview:
    # Protocol 2 has no byte strings, so Python 3 writes them as text to be encoded.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise _Refusal("a byte string in an unknown encoding")
    return memoryview(text.encode("latin1"))


_STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}

_CALLS: dict[str, Callable[..., Any]] = {
    "builtins.set": lambda items=(): set(map(_key, items)),
    "__builtin__.set": lambda items=(): set(map(_key, items)),
    "collections.OrderedDict": _dict(_Dict),
    "dnnlib.util.EasyDict": _dict(_Dict),
    "pytorch_lightning.utilities.parsing.AttributeDict": _dict(_Dict),
    "lightning_fabric.utilities.data.AttributeDict": _dict(_Dict),
    "lightning.fabric.utilities.data.AttributeDict": _dict(_Dict),
    "argparse.Namespace": lambda: Record("argparse.Namespace"),
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch.Size": lambda sizes=(): _size(sizes),
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "_codecs.encode": _encode,
}

GLOBALS: Mapping[str, Global] = {
    **{name: Global(name, call) for name, call in _CALLS.items()},
    **{
        f"torch.{name}Storage": Global(f"torch.{name}Storage", dtype=dtype)
        for name, dtype in _STORAGES.items()
    },
}
"""All names that a pickle may hold; every other one is refused, whatever the file does with it."""

_REMEDIES = {
    "dnnlib.tflib.network.Network": (
        "this is a TensorFlow pickle; convert it with legacy.py of stylegan2-ada-pytorch first"
    ),
    "torch.jit._pickle.restore_type_tag": "this is a TorchScript archive, which is code",
}


# ---- The machine

_MARK = object()
# Python writes lists and dictionaries in runs of 1000 items.
_DEEPEST = 100_000
_NO_CALL = "no known published file needs it; if you trust the file, export its tensors as safetensors"


class _Machine:
    """The opcodes of pickle protocols 2 to 5 over a view of the file."""

    def __init__(
        self, data: memoryview, position: int, storage: Callable[[Any], Storage] | None = None
    ) -> None:
        self.data, self.position, self.storage = data, position, storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.position:
            raise _Refusal(
                f"it claims {count:,} bytes at position {self.position:,} and "
                f"{len(self.data) - self.position:,} are left: the file is truncated, or made to harm"
            )
        taken = self.data[self.position : self.position + count]
        self.position += count
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, count: int) -> str:
        return str(self.take(count), "utf-8", "surrogatepass")

    def line(self) -> str:
        # Names are short, so a missing end of line is found at once.
        window = bytes(self.data[self.position : self.position + 512])
        end = window.find(b"\n")
        if end < 0:
            raise _Refusal("a line of text without end")
        self.position += end + 1
        return window[:end].decode("utf-8", "replace")

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise _Refusal(f"nothing to take from its stack at position {self.position:,}")
        return self.stack.pop()

    def pop_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise _Refusal(f"no mark on its stack at position {self.position:,}")

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise _Refusal(f"no {kind.__name__} on its stack at position {self.position:,}")
        return self.stack[-1]

    def find(self, module: Any, name: Any) -> Global:
        # Only text is put into a message: to print nested lists of a hostile file can take for ever.
        if not isinstance(module, str) or not isinstance(name, str):
            raise _Refusal("it makes a name out of something else than text")
        full = f"{module}.{name}"
        if full not in GLOBALS:
            raise _Refusal(f"it names {full[:120]!r}: {_REMEDIES.get(full, _NO_CALL)}")
        return GLOBALS[full]

    def call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, Global) or function.call is None or not isinstance(arguments, tuple):
            name = function.name if isinstance(function, Global) else type(function).__name__
            raise _Refusal(f"it calls {name!r}: {_NO_CALL}")
        try:
            return function.call(*arguments)
        except (TypeError, ValueError) as error:
            raise _Refusal(f"it calls {function.name} with arguments that do not fit ({error})") from error

    def build(self, state: Any) -> None:
        target = self.stack[-1] if self.stack else None
        if isinstance(target, Record) and target.class_name == "numpy.dtype":
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
            if order not in ("<", ">", "|", "="):
                raise _Refusal("a numpy type in an unknown byte order")
            target.state["code"] = order + target.state["code"].lstrip("<>|=")
        elif isinstance(target, Record) and isinstance(state, dict):
            target.state.update(state)
        elif isinstance(target, _Dict) and (state is None or isinstance(state, dict)):
            pass  # Attributes of a dictionary, such as the `_metadata` of a state dict: nobody reads them.
        else:
            raise _Refusal(f"it changes the attributes of a {type(target).__name__}")

    def run(self) -> Any:
        while True:
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                result = self.pop()
                if self.stack:
                    raise _Refusal("it stops with a full stack")
                return result
            step = _OPCODES.get(code)
            if step is None:
                raise _Refusal(
                    f"it uses the opcode {bytes([code])!r} at position {self.position - 1:,}, which no known "
                    "published file needs"
                )
            step(self)
            if len(self.stack) > _DEEPEST:
                raise _Refusal(f"its lists are nested more than {_DEEPEST:,} deep: it is made to harm")


def _push(make: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    def step(machine: _Machine) -> None:
        machine.stack.append(make(machine))

    return step


def _memoize(machine: _Machine, index: int) -> None:
    if not machine.stack:
        raise _Refusal("it remembers the top of an empty stack")
    machine.memo[index] = machine.stack[-1]


def _recall(machine: _Machine, index: int) -> Any:
    if index not in machine.memo:
        raise _Refusal(f"it recalls number {index}, which it never stored")
    return machine.memo[index]


def _tuple(count: int) -> Callable[[_Machine], Any]:
    return lambda machine: tuple([machine.pop() for _ in range(count)][::-1])


def _long(machine: _Machine) -> int:
    return int.from_bytes(machine.take(machine.number("<B")), "little", signed=True)


def _global(machine: _Machine) -> Global:
    module = machine.line()
    return machine.find(module, machine.line())


def _inst(machine: _Machine) -> None:
    module = machine.line()
    machine.find(module, machine.line())
    raise _Refusal("it makes an object by an opcode of protocol 0, which no known published file needs")


def _stack_global(machine: _Machine) -> Global:
    name = machine.pop()
    return machine.find(machine.pop(), name)


def _reduce(machine: _Machine) -> Any:
    arguments = machine.pop()
    return machine.call(machine.pop(), arguments)


def _persistent_id(machine: _Machine) -> Storage:
    identity = machine.pop()
    if machine.storage is None:
        raise _Refusal("it refers to something outside itself")
    return machine.storage(identity)


def _append(machine: _Machine) -> None:
    item = machine.pop()
    machine.top(list).append(item)


def _appends(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.top(list).extend(items)


def _set_items(machine: _Machine, items: list[Any]) -> None:
    target = machine.top(dict)
    if len(items) % 2:
        raise _Refusal("a key without value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value


def _set_item(machine: _Machine) -> None:
    value = machine.pop()
    _set_items(machine, [machine.pop(), value])


def _add_items(machine: _Machine) -> None:
    items = machine.pop_mark()
    machine.top(set).update(map(_key, items))


def _dup(machine: _Machine) -> Any:
    item = machine.pop()
    machine.stack.append(item)
    return item


def _proto(machine: _Machine) -> None:
    version = machine.number("<B")
    if not 2 <= version <= 5:
        raise _Refusal(f"it is of pickle protocol {version}, and 2 to 5 are read")


def _frame(machine: _Machine) -> None:
    length = machine.number("<Q")
    if length > len(machine.data) - machine.position:
        machine.take(length)


_OPCODES: Mapping[int, Callable[[_Machine], Any]] = {
    ord(code): step
    for code, step in {
        "\x80": _proto,
        "\x95": _frame,
        "(": _push(lambda m: _MARK),
        "0": _Machine.pop,
        "1": _Machine.pop_mark,
        "2": _push(_dup),
        "N": _push(lambda m: None),
        "\x88": _push(lambda m: True),
        "\x89": _push(lambda m: False),
        "J": _push(lambda m: m.number("<i")),
        "K": _push(lambda m: m.number("<B")),
        "M": _push(lambda m: m.number("<H")),
        "\x8a": _push(_long),
        "G": _push(lambda m: m.number(">d")),
        "\x8c": _push(lambda m: m.text(m.number("<B"))),
        "X": _push(lambda m: m.text(m.number("<I"))),
        "\x8d": _push(lambda m: m.text(m.number("<Q"))),
        "C": _push(lambda m: m.take(m.number("<B"))),
        "B": _push(lambda m: m.take(m.number("<I"))),
        "\x8e": _push(lambda m: m.take(m.number("<Q"))),
        "\x96": _push(lambda m: m.take(m.number("<Q"))),
        "]": _push(lambda m: []),
        "}": _push(lambda m: _Dict()),
        "\x8f": _push(lambda m: set()),
        ")": _push(lambda m: ()),
        "t": _push(lambda m: tuple(m.pop_mark())),
        "\x85": _push(_tuple(1)),
        "\x86": _push(_tuple(2)),
        "\x87": _push(_tuple(3)),
        "\x91": _push(lambda m: frozenset(map(_key, m.pop_mark()))),
        "a": _append,
        "e": _appends,
        "s": _set_item,
        "u": lambda m: _set_items(m, m.pop_mark()),
        "\x90": _add_items,
        "q": lambda m: _memoize(m, m.number("<B")),
        "r": lambda m: _memoize(m, m.number("<I")),
        "\x94": lambda m: _memoize(m, len(m.memo)),
        "h": _push(lambda m: _recall(m, m.number("<B"))),
        "j": _push(lambda m: _recall(m, m.number("<I"))),
        "c": _push(_global),
        "i": _inst,
        "\x93": _push(_stack_global),
        "R": _push(_reduce),
        # cls.__new__(cls, *arguments) makes the same record as cls(*arguments).
        "\x81": _push(_reduce),
        "b": lambda m: m.build(m.pop()),
        "Q": _push(_persistent_id),
    }.items()
}


# ---- Files


def _storage_id(identity: Any) -> tuple[torch.dtype, str, int]:
    """The type, key and number of entries in ("storage", type, key, device, entries[, view])."""
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise _Refusal("it refers to something that is no storage")
    _, kind, key, _, count = identity[:5]
    if not isinstance(kind, Global) or kind.dtype is None or not isinstance(key, str):
        raise _Refusal("it refers to a storage of unknown type")
    return kind.dtype, key, _size((count,))[0]


def read_pickle(data: memoryview) -> Any:
    """The tree in one pickle. Raises PublishedError for everything that is not plain data of known kinds."""
    return _explained(lambda: _Machine(data, 0).run())


def read_torch_container(data: memoryview, *, nested: bool = False) -> Any:
    """The tree in torch's container of before version 1.6: three headers, one pickle, then the storages."""
    if nested:
        return _read_torch_container(data)
    return _explained(lambda: _read_torch_container(data))


def _read_torch_container(data: memoryview) -> Any:
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        dtype, key, count = _storage_id(identity)
        return storages.setdefault(key, Storage(dtype, count))

    position = 0

    def pickled(with_storages: bool = False) -> Any:
        nonlocal position
        machine = _Machine(data, position, storage if with_storages else None)
        result = machine.run()
        position = machine.position
        return result

    if pickled() != TORCH_MAGIC:
        raise _Refusal("it does not begin as a file of torch")
    pickled()  # the protocol
    system = pickled()
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise _Refusal("it was written on a big-endian machine")
    tree = pickled(with_storages=True)
    keys = pickled()
    raw = _Machine(data, position)
    for key in keys if isinstance(keys, list) else ():
        held = storages.get(key) if isinstance(key, str) else None
        if held is None:
            raise _Refusal("it holds a storage that nothing refers to")
        count = raw.number("<q")
        if count != held.count:
            raise _Refusal(f"a storage claims {held.count} numbers and holds {count}")
        held.data = raw.take(count * held.itemsize)
    return tree


def read_torch_zip(pickled: memoryview, record: Callable[[str], memoryview]) -> Any:
    """The tree in torch's container of since version 1.6; `record(key)` gives the bytes of one storage."""
    storages: dict[str, Storage] = {}

    def storage(identity: Any) -> Storage:
        dtype, key, count = _storage_id(identity)
        if key not in storages:
            data = record(key)
            if len(data) != count * dtype.itemsize:
                raise _Refusal(f"a storage claims {count} numbers and holds {len(data) // dtype.itemsize}")
            storages[key] = Storage(dtype, count, data)
        return storages[key]

    return _explained(lambda: _Machine(pickled, 0, storage).run())


def _explained(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except _Refusal as refusal:
        raise PublishedError(f"refused: {refusal}") from None
    except (struct.error, UnicodeDecodeError, TypeError, RecursionError) as error:
        raise PublishedError(f"refused: no readable pickle ({error})") from error
