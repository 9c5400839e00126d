"""Whole photographs: the faces or the middle square edited, and pasted back where they were."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from mambastyle.api.inputs import as_picture
from mambastyle.data import faces
from mambastyle.latents.directions import Edits

if TYPE_CHECKING:
    from mambastyle.api.inverter import Inverter


def edit_photo(
    inverter: "Inverter", photo: Any, edits: Edits, *, find_faces: bool = False, landmarks: Any = None
) -> Image.Image:
    """See `Inverter.edit_photo`."""
    # Before the encoder runs: a mistyped name should not cost a minute.
    resolved = inverter.directions.resolve(edits)
    picture = as_picture(photo)
    squares = find_squares(picture, find_faces=find_faces, landmarks=landmarks)
    crops = [crop(inverter, picture, square) for square in squares]
    for face, square in zip(inverter.render(inverter.edit(crops, resolved)), squares, strict=True):
        picture = faces.paste_back(picture, face, square)
    return picture


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


def crop(inverter: "Inverter", picture: Image.Image, square: Float[np.ndarray, "4 2"]) -> Image.Image:
    """A square of the photograph, upright, twice as wide as the encoder takes it: it reduces by itself."""
    return faces.align(picture, square, 2 * inverter.model.config.image_size)
