"""Whole photographs: which squares of one a model takes."""

from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from mambastyle.data import faces


def find_squares(
    picture: Image.Image, *, find_faces: bool = False, landmarks: Any = None
) -> list[Float[np.ndarray, "4 2"]]:
    """What of a photograph a model takes: the square of each face, the largest first, or the middle one."""
    if landmarks is not None:
        found = faces.faces_from(landmarks)
    elif find_faces:
        found = faces.frontal_faces(picture)
    else:
        return [faces.center_square(*picture.size)]
    return [faces.ffhq_square(face.landmarks) for face in found]


def crop(picture: Image.Image, square: Float[np.ndarray, "4 2"], side: int) -> Image.Image:
    """A square of the photograph, upright, at twice the `side` that an encoder takes: it reduces itself."""
    return faces.align(picture, square, 2 * side)
