"""Faces in whole photographs: find them, align them as FFHQ does, and paste them back with a soft seam.

The alignment is that of FFHQ (Karras et al., 2019, recreate_aligned_images), which pixel2style2pixel and the
other inverters use: a square that turns and scales with eyes and mouth. A model that was trained on aligned
faces needs it; others take `center_square`. Detection needs the extra [faces].
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageFilter

# The detector was made for pictures up to this size; larger ones are reduced for it.
DETECTOR_SIDE = 960
CONFIDENCE = 0.6
# At which a face, with as much around it, is looked at again.
REFINE_SIDES = (128, 160, 200, 240)
# Where the nose lies between the eyes, 0 at one and 1 at the other: beyond this the face is in profile.
FRONTAL = (0.1, 0.9)
# Width of the soft seam over the side of the square.
SEAM = 0.12
_POINTS = {5: ([0], [1], (3, 4)), 68: (range(36, 42), range(42, 48), (48, 54))}


class FaceError(ValueError):
    """No face that can be aligned; the message says what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture.

    landmarks: (5, 2), x and y in pixels of eye, eye, nose, mouth corner, mouth corner, from left to right as
    seen; or the 68 of iBUG 300-W.
    """

    landmarks: Float[np.ndarray, "points 2"]
    confidence: float = 1.0

    @property
    def in_profile(self) -> bool:
        """Whether it is turned so far that one eye hides: by where the nose lies between the eyes."""
        left, right, nose = (
            self.landmarks[i] for i in ((0, 1, 2) if len(self.landmarks) == 5 else (39, 42, 30))
        )
        axis = right - left
        return not FRONTAL[0] <= float((nose - left) @ axis) / max(float(axis @ axis), 1e-6) <= FRONTAL[1]


def find_faces(picture: Image.Image) -> list[Face]:
    """The faces of an RGB picture, the largest first, by libfacedetection (5 landmarks each)."""
    picture = picture.convert("RGB")
    found = _detect(picture, max(1.0, max(picture.size) / DETECTOR_SIDE))
    found.sort(key=lambda face: face[0], reverse=True)
    return [_refined(picture, width, face) for width, face in found]


def _detect(picture: Image.Image, factor: float) -> list[tuple[float, Face]]:
    """The faces of the picture reduced by `factor`, with the widths of their boxes, in its own pixels."""
    try:
        import yuface
    except ModuleNotFoundError as error:
        raise FaceError(
            "finding faces needs yuface, which is for Python 3.11 on Linux x86-64 and Windows: pip install "
            '"mambastyle[faces]", or give landmarks'
        ) from error

    size = (max(1, round(picture.width / factor)), max(1, round(picture.height / factor)))
    resized = picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    # It takes BGR, and gives whole pixels.
    pixels = np.ascontiguousarray(np.asarray(resized)[:, :, ::-1])
    confidences, boxes, landmarks = yuface.detect(pixels, CONFIDENCE)
    scale = np.array(picture.size) / size
    return [
        (float(box[2] * scale[0]), Face((points.reshape(5, 2) + 0.5) * scale, float(confidence) / 100))
        for confidence, box, points in zip(confidences, boxes, landmarks, strict=True)
    ]


def _refined(picture: Image.Image, width: float, face: Face) -> Face:
    """The mean of what the detector says of this face alone at several sizes.

    One size may err by a sixth of the distance of the eyes, their mean by less than a tenth.
    """
    center = face.landmarks.mean(0)
    low = (center - 1.2 * width).round().clip(0)
    high = np.minimum((center + 1.2 * width).round(), picture.size)
    part = picture.crop((*low.astype(int).tolist(), *high.astype(int).tolist()))
    opinions = []
    for side in REFINE_SIDES:
        again = _detect(part, max(part.size) / side)
        near = [
            other for _, other in again if np.hypot(*(other.landmarks.mean(0) + low - center)) < width / 2
        ]
        if near:
            opinions.append(near[0].landmarks + low)
    return dataclasses.replace(face, landmarks=np.mean(opinions, axis=0)) if opinions else face


def frontal_faces(picture: Image.Image) -> list[Face]:
    """The faces that can be aligned; FaceError when there is none, or only faces in profile."""
    faces = find_faces(picture)
    if not faces:
        raise FaceError(
            "no face was found: give a picture with a larger, unhidden face, or landmarks, or edit the "
            "middle square without looking for faces"
        )
    frontal = [face for face in faces if not face.in_profile]
    if not frontal:
        raise FaceError(
            "the face is in profile, and the alignment needs both eyes: give a picture from the front, or "
            "landmarks"
        )
    return frontal


def faces_from(landmarks: Any) -> list[Face]:
    """Faces from landmarks, 5 or 68 each: (points, 2) for one, (faces, points, 2) for several."""
    try:
        points = np.asarray(landmarks, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise FaceError("the landmarks are no table of numbers: give 5 or 68 pairs of x and y") from error
    if points.ndim == 2:
        points = points[None]
    if points.ndim != 3 or points.shape[1] not in _POINTS or points.shape[2] != 2 or not len(points):
        raise FaceError(f"landmarks of shape {points.shape}: give 5 or 68 pairs of x and y for each face")
    if not np.isfinite(points).all():
        raise FaceError("the landmarks hold NaN or infinity: give pixels")
    return [Face(face) for face in points]


def ffhq_square(landmarks: Float[np.ndarray, "points 2"]) -> Float[np.ndarray, "4 2"]:
    """The corners of FFHQ's square around a face: top left, bottom left, bottom right, top right.

    x = eyes - turned(eyes to mouth), as long as the larger of 2 eye distances and 1.8 eye-mouth distances;
    the square reaches x and its normal from a centre a tenth of the way from the eyes to the mouth.
    """
    left, right, mouth = _POINTS[len(landmarks)]
    eyes = [landmarks[list(part)].mean(0) for part in (left, right)]
    middle = (eyes[0] + eyes[1]) / 2
    eye_to_eye = eyes[1] - eyes[0]
    eye_to_mouth = landmarks[list(mouth)].mean(0) - middle
    x = eye_to_eye - eye_to_mouth[::-1] * [-1, 1]
    length = float(np.hypot(*x))
    if length < 1e-3:
        raise FaceError("the landmarks lie in one point: give pixels of the picture, x before y")
    x *= max(np.hypot(*eye_to_eye) * 2.0, np.hypot(*eye_to_mouth) * 1.8) / length
    y = x[::-1] * [-1, 1]
    center = middle + 0.1 * eye_to_mouth
    return np.stack([center - x - y, center - x + y, center + x + y, center + x - y])


def center_square(width: int, height: int) -> Float[np.ndarray, "4 2"]:
    """The corners of the largest upright square in the middle, as `ffhq_square` gives them."""
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    corners = [(left, top), (left, top + side), (left + side, top + side), (left + side, top)]
    return np.array(corners, dtype=np.float64)


def side_of(square: Float[np.ndarray, "4 2"]) -> float:
    """The side of a square in pixels."""
    return float(np.hypot(*(square[3] - square[0])))


def align(picture: Image.Image, square: Float[np.ndarray, "4 2"], size: int) -> Image.Image:
    """What lies in the square, upright, `size` pixels wide; beyond the picture it is mirrored and blurred."""
    # Reduced first, so that the turning below does not skip pixels.
    factor = max(1, int(side_of(square) / size / 2))
    if factor > 1:
        picture, square = picture.reduce(factor), square / factor
    picture, square = _padded(picture, square)
    # One and a half times the size, then down to it: as sharp as FFHQ's own detour over 4096 pixels.
    wide = -(-size * 3 // 2)
    turned = picture.transform(
        (wide, wide), Image.Transform.QUAD, square.flatten().tolist(), Image.Resampling.BICUBIC
    )
    return turned.resize((size, size), Image.Resampling.LANCZOS)


def paste_back(
    picture: Image.Image, face: Image.Image, square: Float[np.ndarray, "4 2"], *, seam: float = SEAM
) -> Image.Image:
    """The picture with `face` where `align` took it from, fading out over `seam` of the square's side."""
    side = max(1, round(side_of(square)))
    # To its size first: the turning below neither skips pixels nor has to invent any.
    face = face.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    left, top = np.floor(square.min(0)).astype(int).clip(0)
    right, bottom = np.minimum(np.ceil(square.max(0)).astype(int), picture.size)
    if right <= left or bottom <= top:
        raise FaceError(
            "the face lies outside the picture: give landmarks in pixels of the picture, x before y"
        )
    # From pixels of the region to those of the face: the inverse of the square's two edges.
    edges = np.stack([square[3] - square[0], square[1] - square[0]], axis=1) / face.width
    inverse = np.linalg.inv(edges)
    offset = inverse @ (np.array([left, top]) - square[0])
    affine = [*inverse[0], offset[0], *inverse[1], offset[1]]
    region = (int(right - left), int(bottom - top))

    def placed(image: Image.Image) -> Image.Image:
        return image.transform(region, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)

    result = picture.convert("RGB")
    # An upright square that fills a side of the picture needs no seam along that side.
    inside = _margins(square, picture.size)
    mask = placed(_soft_square(face.width, seam, inside))
    result.paste(placed(face), (int(left), int(top)), mask)
    return result


def _margins(square: Float[np.ndarray, "4 2"], size: tuple[int, int]) -> Bool[np.ndarray, "4"]:
    """For left, top, right, bottom of the square: whether there is picture beyond it to blend into."""
    middles = (square + np.roll(square, -1, axis=0)) / 2
    left, bottom, right, top = middles
    beyond = [left + (left - right) * 0.02, top + (top - bottom) * 0.02]
    beyond += [right + (right - left) * 0.02, bottom + (bottom - top) * 0.02]
    return np.array([(0 <= x <= size[0]) and (0 <= y <= size[1]) for x, y in beyond])


def _soft_square(side: int, seam: float, inside: Sequence[bool] | Bool[np.ndarray, "4"]) -> Image.Image:
    """White in the middle, and a raised cosine down to black over `seam` at the edges that lie inside."""
    width = max(1.0, seam * side)
    pixels = np.arange(side) + 0.5
    rise = 0.5 - 0.5 * np.cos(np.pi * np.clip(pixels / width, 0, 1))
    one = np.ones(side)
    left, top, right, bottom = (rise if edge else one for edge in inside)
    mask = np.minimum(left, right[::-1])[None, :] * np.minimum(top, bottom[::-1])[:, None]
    return Image.fromarray((mask * 255).round().astype(np.uint8))


def _padded(
    picture: Image.Image, square: Float[np.ndarray, "4 2"]
) -> tuple[Image.Image, Float[np.ndarray, "4 2"]]:
    """The part of the picture that the square needs, mirrored where it reaches out, and the square in it.

    As FFHQ does, what was mirrored is blurred and drawn towards the median colour with its distance.
    """
    border = max(3, round(side_of(square) * 0.1))
    low = np.floor(square.min(0)).astype(int) - border
    high = np.ceil(square.max(0)).astype(int) + border
    crop_low, crop_high = low.clip(0), np.minimum(high, picture.size)
    if (crop_high - crop_low < 1).any():
        raise FaceError(
            "the face lies outside the picture: give landmarks in pixels of the picture, x before y"
        )
    part = picture.convert("RGB").crop((*crop_low.tolist(), *crop_high.tolist()))
    before, after = crop_low - low, high - crop_high
    if not (before.any() or after.any()):
        return part, square - low
    widths = ((int(before[1]), int(after[1])), (int(before[0]), int(after[0])), (0, 0))
    pixels = np.pad(
        np.asarray(part, dtype=np.float32), widths, mode="reflect" if min(part.size) > 1 else "edge"
    )
    height, width = pixels.shape[:2]
    y, x = np.ogrid[:height, :width]
    # 0 at the picture's edge and within it, growing outwards, by the distance each side was padded.
    depth = np.maximum(
        np.maximum((before[0] - x) / max(before[0], 1), (x - (width - 1 - after[0])) / max(after[0], 1)),
        np.maximum((before[1] - y) / max(before[1], 1), (y - (height - 1 - after[1])) / max(after[1], 1)),
    )[:, :, None].clip(0, 1)
    padded = Image.fromarray(pixels.round().astype(np.uint8))
    blurred = np.asarray(padded.filter(ImageFilter.GaussianBlur(side_of(square) * 0.02)), dtype=np.float32)
    pixels += (blurred - pixels) * np.clip(depth * 3 + 1e-6, 0, 1) * (depth > 0)
    pixels += (np.median(pixels, axis=(0, 1)) - pixels) * depth
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), square - low
