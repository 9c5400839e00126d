"""Picture packs: zip and folder, labels, cache, errors."""

import io
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mambastyle.data import packs
from mambastyle.data.packs import from_bytes, open_pack, to_bytes


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pack(tmp_path):
    path = tmp_path / "pack.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "labels.csv", "file,split,kind\na.png,train,red\nb.png,test,blue\nc.png,train,blue\n"
        )
        for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255)), ("c.png", (0, 0, 255))):
            buffer = io.BytesIO()
            Image.new("RGB", (20, 12), colour).save(buffer, "PNG")
            archive.writestr(name, buffer.getvalue())
    return path


def test_reads_selects_and_labels(pack):
    train = open_pack(pack).select(split="train")
    pixels = train.load(8, progress=False)
    assert pixels.shape == (2, 3, 8, 8)
    assert pixels[0, :, 4, 4].tolist() == [255, 0, 0]
    assert train.labels("kind", ["red", "blue"]).tolist() == [0, 1]


def test_a_folder_is_a_pack_too(pack, tmp_path):
    with zipfile.ZipFile(pack) as archive:
        archive.extractall(tmp_path / "folder")
    assert torch.equal(
        open_pack(tmp_path / "folder").load(8, progress=False), open_pack(pack).load(8, progress=False)
    )


def test_the_second_reading_comes_from_the_cache(pack, tmp_path):
    first = open_pack(pack).load(8, progress=False)
    files = list((tmp_path / "cache" / "mambastyle" / "packs").glob("*.npy"))
    assert len(files) == 1
    np.save(files[0], np.zeros_like(first.numpy()))
    assert open_pack(pack).load(8, progress=False).sum() == 0
    # Another selection or size is another file, and a damaged shape is read anew.
    np.save(files[0], np.zeros((1, 3, 8, 8), np.uint8))
    assert torch.equal(open_pack(pack).load(8, progress=False), first)


def test_a_picture_that_changes_in_a_folder_is_read_anew(pack, tmp_path):
    folder = tmp_path / "folder"
    with zipfile.ZipFile(pack) as archive:
        archive.extractall(folder)
    before = folder.stat().st_mtime_ns
    assert open_pack(folder).load(8, progress=False)[0, :, 4, 4].tolist() == [255, 0, 0]
    Image.new("RGB", (20, 12), (0, 255, 0)).save(folder / "a.png")
    os.utime(folder, ns=(before, before))
    assert open_pack(folder).load(8, progress=False)[0, :, 4, 4].tolist() == [0, 255, 0]


@pytest.mark.parametrize("name", ["../outside.png", "{absolute}", "link.png"])
def test_a_folder_gives_no_file_from_elsewhere(tmp_path, name):
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    Image.new("RGB", (4, 4)).save(outside)
    folder.mkdir()
    (folder / "link.png").symlink_to(outside)
    (folder / "labels.csv").write_text(f"file\n{name.format(absolute=outside)}\n")
    with pytest.raises(ValueError, match="lies outside of the pack"):
        list(open_pack(folder).read())


def test_a_small_zip_of_a_huge_file_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(packs, "MOST_BYTES", 1000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.csv", "file\na.png\n")
        archive.writestr("a.png", bytes(100_000))
    monkeypatch.setattr(zipfile.ZipFile, "open", _only("labels.csv"))
    with pytest.raises(ValueError, match=r"a\.png has 100,000 bytes"):
        list(open_pack(path).read())
    with pytest.raises(ValueError, match=r"has no b\.png"):
        list(replace(open_pack(path), rows=({"file": "b.png"},)).read())


def _only(allowed: str):
    opened = zipfile.ZipFile.open

    def open_member(self, name, *arguments, **options):
        assert getattr(name, "filename", name) == allowed
        return opened(self, name, *arguments, **options)

    return open_member


def test_errors_name_the_remedy(pack, tmp_path):
    with pytest.raises(ValueError, match=r"is it pack\.zip\?"):
        open_pack(tmp_path / "pak.zip")
    with pytest.raises(ValueError, match="no column 'colour'"):
        open_pack(pack).select(colour="red")
    with pytest.raises(ValueError, match="no picture with"):
        open_pack(pack).select(split="val")
    with pytest.raises(ValueError, match=r"a\.png has kind 'red'"):
        open_pack(pack).labels("kind", ["blue"])
    empty = tmp_path / "empty.zip"
    with zipfile.ZipFile(empty, "w") as archive:
        archive.writestr("readme", "nothing")
    with pytest.raises(ValueError, match=r"no labels\.csv"):
        open_pack(empty)


def test_bytes_round_trip():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(from_bytes(values)), values)
