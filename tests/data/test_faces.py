"""Faces: FFHQ's square, alignment, the soft seam, and the detector on a real photograph.

astronaut.webp is NASA's portrait of Eileen Collins, in the public domain.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambastyle.data import faces
from mambastyle.data.faces import Face, FaceError

PORTRAIT = Path(__file__).with_name("astronaut.webp")
# Two eyes, nose, two corners of the mouth, in pixels of a 240 x 200 picture.
UPRIGHT = np.array([[100.0, 80], [140, 80], [120, 100], [104, 120], [136, 120]])


@pytest.fixture(scope="module")
def portrait() -> Image.Image:
    return Image.open(PORTRAIT).convert("RGB")


def pattern(width: int = 240, height: int = 200) -> Image.Image:
    """A smooth picture in which every place has its own colour."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x / width, y / height, 0.5 + 0.5 * np.sin(x / 9) * np.cos(y / 7)], axis=2)
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def turned(points: np.ndarray, degrees: float, scale: float = 1.0) -> np.ndarray:
    angle = np.deg2rad(degrees)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points - points.mean(0)) @ matrix.T + points.mean(0)


def test_the_square_is_that_of_ffhq():
    """By hand: x = (40, 0) + (40, 0), made max(2 * 40, 1.8 * 40) long; centre 80 + 0.1 * 40."""
    square = faces.ffhq_square(UPRIGHT)
    np.testing.assert_allclose(square, [[40, 4], [40, 164], [200, 164], [200, 4]])
    # 68 points whose means are the same five.
    many = np.zeros((68, 2))
    many[36:42], many[42:48], many[30] = UPRIGHT[0], UPRIGHT[1], UPRIGHT[2]
    many[48], many[54] = UPRIGHT[3], UPRIGHT[4]
    np.testing.assert_allclose(faces.ffhq_square(many), square)


@pytest.mark.parametrize("degrees", [0, 20, -75, 180])
def test_the_square_turns_and_grows_with_the_face(degrees):
    points = turned(UPRIGHT, degrees, 1.3)
    square = faces.ffhq_square(points)
    assert faces.side_of(square) == pytest.approx(1.3 * 160)
    # In the square's own coordinates the landmarks lie where they lie upright.
    axes = np.stack([square[3] - square[0], square[1] - square[0]], axis=1)
    expected = (UPRIGHT - [40, 4]) / 160
    np.testing.assert_allclose(np.linalg.solve(axes, (points - square[0]).T).T, expected, atol=1e-9)


@pytest.mark.parametrize("degrees", [0, 30])
def test_aligning_and_pasting_back_leaves_the_picture_as_it_was(degrees):
    picture = pattern()
    square = faces.ffhq_square(turned(UPRIGHT, degrees, 0.7))
    size = 2 * round(faces.side_of(square))
    aligned = faces.align(picture, square, size)
    assert aligned.size == (size, size)
    back = faces.paste_back(picture, aligned, square)
    difference = np.abs(np.asarray(back, dtype=int) - np.asarray(picture))
    assert difference.max() <= 6
    # Half a pixel aside would be ten times that.
    assert difference.mean() < 0.25
    low, high = np.floor(square.min(0)).astype(int), np.ceil(square.max(0)).astype(int)
    difference[low[1] : high[1], low[0] : high[0]] = 0
    assert not difference.any(), "pixels outside the square changed"


def test_the_seam_is_soft():
    picture = Image.new("RGB", (240, 200))
    white = Image.new("RGB", (160, 160), "white")
    pasted = np.asarray(faces.paste_back(picture, white, faces.ffhq_square(UPRIGHT)))[:, :, 0].astype(int)
    assert pasted[84, 120] == 255
    assert pasted[84, 41] < 10
    # No step between neighbours is larger than the steepest of a cosine over the seam.
    steepest = 255 * np.pi / 2 / (faces.SEAM * 160)
    for axis in (0, 1):
        assert np.abs(np.diff(pasted, axis=axis)).max() <= steepest + 2


def test_a_square_that_fills_the_picture_has_no_seam_there():
    """A square picture, cropped to its middle, comes back wholly edited."""
    white = Image.new("RGB", (64, 64), "white")
    whole = faces.paste_back(Image.new("RGB", (100, 100)), white, faces.center_square(100, 100))
    assert np.asarray(whole).min() == 255
    wide = np.asarray(faces.paste_back(Image.new("RGB", (200, 100)), white, faces.center_square(200, 100)))
    assert wide[:, 100].min() == 255
    assert wide[:, :50].max() == 0
    assert 0 < wide[50, 53, 0] < 255


def test_a_face_at_the_border_is_mirrored_and_pasted_inside():
    picture = pattern()
    square = faces.ffhq_square(UPRIGHT - [90, 70])
    assert square.min() < 0
    aligned = faces.align(picture, square, 96)
    assert aligned.size == (96, 96)
    # What lies inside of the picture is the picture.
    back = faces.paste_back(picture, faces.align(picture, square, 320), square)
    assert back.size == picture.size
    assert np.abs(np.asarray(back, dtype=int) - np.asarray(picture)).mean() < 0.5


def test_real_faces_are_found_and_aligned(portrait):
    pytest.importorskip("yuface", reason='needs the detector: pip install "mambastyle[faces]"')
    (face,) = faces.frontal_faces(portrait)
    # Pupils, tip of the nose and corners of the mouth, read off this portrait enlarged eight times.
    expected = np.array([[203.2, 101.3], [246.8, 102.8], [225.6, 125.6], [204.5, 141.3], [243.6, 141.7]])
    # A tenth of the distance of the eyes.
    assert np.abs(face.landmarks - expected).max() < 4.5
    # Two of them, one four times as wide: the larger comes first, in pixels of the whole picture.
    both = Image.new("RGB", (2560, 2048), "gray")
    both.paste(portrait.resize((2048, 2048)), (0, 0))
    both.paste(portrait, (2048, 0))
    large, small = faces.frontal_faces(both)
    assert np.abs(large.landmarks / 4 - expected).max() < 4.5
    assert np.abs(small.landmarks - [2048, 0] - expected).max() < 4.5


def test_no_face_and_a_profile_say_what_to_do(portrait, monkeypatch):
    pytest.importorskip("yuface", reason='needs the detector: pip install "mambastyle[faces]"')
    with pytest.raises(FaceError, match="no face was found: give a picture with a larger"):
        faces.frontal_faces(pattern())
    aside = Face(np.array([[100.0, 80], [112, 80], [96, 100], [100, 120], [110, 120]]))
    assert aside.in_profile
    assert not Face(UPRIGHT).in_profile
    monkeypatch.setattr(faces, "find_faces", lambda picture: [aside])
    with pytest.raises(FaceError, match="in profile, and the alignment needs both eyes"):
        faces.frontal_faces(portrait)


@pytest.mark.parametrize(
    ("landmarks", "message"),
    [
        ("eyes", "no table of numbers"),
        ([[1, 2, 3]], "give 5 or 68 pairs"),
        (np.zeros((0, 5, 2)), "give 5 or 68 pairs"),
        (np.full((5, 2), np.nan), "NaN"),
    ],
)
def test_bad_landmarks_are_refused(landmarks, message):
    with pytest.raises(FaceError, match=message):
        faces.faces_from(landmarks)


def test_landmarks_outside_the_picture_are_refused():
    square = faces.ffhq_square(UPRIGHT + 5000)
    with pytest.raises(FaceError, match="outside the picture"):
        faces.align(pattern(), square, 64)
    with pytest.raises(FaceError, match="outside the picture"):
        faces.paste_back(pattern(), Image.new("RGB", (64, 64)), square)
    with pytest.raises(FaceError, match="in one point"):
        faces.ffhq_square(np.full((5, 2), 7.0))
