"""Whole photographs: edited where the model can, and as they were elsewhere."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mambastyle
from mambastyle.data import faces
from mambastyle.data.faces import FaceError

PORTRAIT = Path(__file__).parents[1] / "data" / "astronaut.webp"
EYES = [[203.2, 101.3], [246.8, 102.8], [225.6, 125.6], [204.5, 141.3], [243.6, 141.7]]
EDITS = {"gender": 3.0}


@pytest.fixture(scope="module")
def inverter(tiny_model_folder):
    return mambastyle.load(tiny_model_folder, device="cpu")


@pytest.fixture(scope="module")
def portrait():
    return np.asarray(Image.open(PORTRAIT).convert("RGB")).astype(int)


def changed(picture, original) -> np.ndarray:
    return np.abs(np.asarray(picture).astype(int) - original).max(2) > 0


def test_the_face_alone_changes_and_the_picture_keeps_its_size(inverter, portrait):
    edited = inverter.edit_photo(PORTRAIT, EDITS, landmarks=EYES)
    assert edited.size == (512, 512)
    where = changed(edited, portrait)
    square = faces.ffhq_square(np.array(EYES))
    (left, top), (right, bottom) = np.floor(square.min(0)).astype(int), np.ceil(square.max(0)).astype(int)
    assert where[100:140, 200:250].mean() > 0.9
    where[top : bottom + 1, left : right + 1] = False
    assert not where.any()


def test_what_is_pasted_is_what_the_model_makes_of_the_aligned_face(inverter):
    """Pasted without a seam around, the middle of the photo is the render enlarged."""
    photo = Image.open(PORTRAIT).convert("RGB")
    edited = inverter.edit_photo(photo, EDITS)
    aligned = faces.align(photo, faces.center_square(*photo.size), 2 * inverter.model.config.image_size)
    render = inverter.render(inverter.edit(aligned, EDITS))
    enlarged = render.resize(photo.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(edited).astype(int) - np.asarray(enlarged)).max() <= 1


def test_several_faces_are_edited_at_once(inverter, portrait):
    pair = np.concatenate([portrait, portrait[:, ::-1]], axis=1).astype(np.uint8)
    mirrored = [[1023 - x, y] for x, y in EYES]
    order = [1, 0, 2, 4, 3]
    where = changed(
        inverter.edit_photo(pair, EDITS, landmarks=[EYES, [mirrored[i] for i in order]]), pair.astype(int)
    )
    assert where[100:140, 200:250].mean() > 0.9
    assert where[100:140, 774:824].mean() > 0.9
    assert not where[300:].any()


def test_the_detector_finds_the_face_and_its_absence_is_told(inverter, portrait):
    pytest.importorskip("yuface", reason='needs the detector: pip install "mambastyle[faces]"')
    where = changed(inverter.edit_photo(PORTRAIT, EDITS, find_faces=True), portrait)
    assert where[100:140, 200:250].mean() > 0.9
    assert not where[300:].any()
    with pytest.raises(FaceError, match="no face was found"):
        inverter.edit_photo(np.zeros((64, 64, 3), dtype=np.uint8), EDITS, find_faces=True)


def test_a_turned_photograph_is_edited_upright(inverter, tmp_path):
    """Landmarks are in pixels of the picture as it is seen."""
    upright = Image.open(PORTRAIT).convert("RGB")
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    edited = inverter.edit_photo(tmp_path / "turned.png", EDITS, landmarks=EYES)
    np.testing.assert_array_equal(
        np.asarray(edited), np.asarray(inverter.edit_photo(upright, EDITS, landmarks=EYES))
    )
