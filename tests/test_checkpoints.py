"""Checkpoints come back as they were saved, and say in one line why they cannot be used."""

import dataclasses
import errno
import os
from typing import Literal

import pytest
import safetensors.torch
import torch

from mambastyle import checkpoints
from mambastyle.checkpoints import CheckpointError
from mambastyle.files import WriteError


@dataclasses.dataclass(frozen=True)
class Inner:
    widths: tuple[int, ...] = (4, 8)
    pools: tuple[tuple[int, int], ...] = ((1, 2),)


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    rate: float = 1.0
    clamp: float | None = None
    mode: Literal["a", "b"] = "a"
    on: bool = True


@dataclasses.dataclass(frozen=True)
class Needy:
    size: int


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a.w": torch.randn(3, 2), "a.n": torch.tensor(2.0), "b": torch.randn(4).bfloat16()}
    checkpoints.save(path, tensors, kind="test", config=Outer(), card={"data": "none"})
    return path


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    shared = torch.randn(4, 3)
    tensors = {
        "m.w": shared,
        "m.t": shared.t(),
        "n": torch.arange(3),
        "e": torch.empty(0, 2),
        "h": shared.bfloat16(),
    }
    config = Outer(inner=Inner(widths=(1, 2, 3), pools=((1, 2), (3, 4))), clamp=256.0, mode="b", on=False)
    path = tmp_path / "new" / "model.safetensors"
    sha256 = checkpoints.save(path, tensors, kind="test", config=config, card={"licence": "x"})
    loaded = checkpoints.load(path, kind="test")
    assert loaded.sha256 == sha256
    assert (loaded.kind, loaded.card, loaded.path) == ("test", {"licence": "x"}, path)
    assert checkpoints.config_from_dict(Outer, loaded.config) == config
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded.tensors[name], tensor, rtol=0, atol=0)
    assert set(loaded.part("m.")) == {"w", "t"}
    header = checkpoints.read_header(path)
    assert (header.kind, header.config, header.tensors) == ("test", loaded.config, {})


def test_the_hash_sees_names_dtypes_shapes_and_values():
    tensor = torch.zeros(2, 2)
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.half()},
        {"a": tensor.flatten()},
        {"a": tensor + 1},
    ]
    assert len({checkpoints.tensors_hash(variant) for variant in variants}) == len(variants)
    pair = {"a": tensor, "b": tensor + 1}
    assert checkpoints.tensors_hash(pair) == checkpoints.tensors_hash(dict(reversed(pair.items())))


def test_a_changed_tensor_is_noticed(saved):
    data = bytearray(saved.read_bytes())
    data[-1] ^= 1
    saved.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"does not match its own hash.*again"):
        checkpoints.load(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -3])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"no readable safetensors file"):
        checkpoints.load(saved)


def test_files_of_others_are_refused(tmp_path, saved):
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, foreign)
    with pytest.raises(CheckpointError, match="no mambastyle checkpoint"):
        checkpoints.load(foreign)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoints.load(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        checkpoints.load(tmp_path)
    with pytest.raises(CheckpointError, match="holds a 'test' checkpoint, expected 'directions'"):
        checkpoints.load(saved, kind="directions")
    newer = {"format": "mambastyle", "version": "2", "kind": "test", "config": "{}", "sha256": ""}
    safetensors.torch.save_file({}, foreign, metadata=newer)
    with pytest.raises(CheckpointError, match="format version 2"):
        checkpoints.load(foreign)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Outer, {"rat": 1}, "unknown key 'rat' in Outer: did you mean 'rate'"),
        (Outer, {"inner": {"width": [1]}}, "unknown key 'width' in Inner: did you mean 'widths'"),
        (Outer, {"zzzzzz": 1}, "the keys are inner, rate"),
        (Outer, {"rate": "fast"}, "Outer.rate is 'fast', expected float"),
        (Outer, {"mode": "c"}, "Outer.mode is 'c'"),
        (Outer, {"on": 1}, "Outer.on is 1, expected bool"),
        (Outer, {"inner": {"widths": [1, True]}}, r"Inner.widths\[1\] is True, expected int"),
        (Outer, {"inner": {"pools": [[1, 2, 3]]}}, r"Inner.pools\[0\]"),
        (Needy, {}, "lacks the key 'size'"),
    ],
)
def test_a_wrong_config_names_the_key(cls, values, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoints.config_from_dict(cls, values)


def test_half_keeps_vectors_and_what_does_not_fit():
    tensors = {
        "conv": torch.randn(2, 3, 3, 3),
        "bias": torch.randn(5),
        "huge": torch.full((2, 2), 1e6),
        "index": torch.arange(4).reshape(2, 2),
        "empty": torch.empty(0, 2),
    }
    dtypes = {name: tensor.dtype for name, tensor in checkpoints.to_half(tensors).items()}
    half, full = torch.float16, torch.float32
    assert dtypes == {"conv": half, "bias": full, "huge": full, "index": torch.int64, "empty": half}


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(saved, monkeypatch):
    before = saved.read_bytes()
    written = []

    def full_after_100_bytes(descriptor, data):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(len(data))
        return real_write(descriptor, data[:100])

    real_write = os.write
    monkeypatch.setattr(os, "write", full_after_100_bytes)
    with pytest.raises(
        WriteError, match=r"cannot write .*model.safetensors: No space left on device; free some space"
    ):
        checkpoints.save(saved, {"w": torch.randn(999)}, kind="test", config={})
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


def test_a_file_in_the_place_of_a_folder_is_refused(saved):
    with pytest.raises(WriteError, match=r"is a file: choose another folder|File exists"):
        checkpoints.save(saved / "below" / "x.safetensors", {}, kind="test", config={})
