"""Videos frame by frame, through PyAV (the extra "video"): every picture changed, times and sound kept."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mambastyle import files, images

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
_CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
_BT709 = 1  # in the tables of H.273, for primaries, transfer and matrix alike
_QUALITY = "17"  # x264's constant rate factor; 18 counts as visually lossless


class VideoError(ValueError):
    """A video that cannot be read or written; the message says what to do."""


@dataclass(frozen=True)
class Video:
    """What a video holds, as it is shown: upright pixels, pictures a second, and about how many."""

    height: int
    width: int
    rate: Fraction
    frames: int


def inspect(path: str | os.PathLike[str]) -> Video:
    """Look at a video's first frame. Raises VideoError when it has none, or cannot be read."""
    import av

    with _reading(path) as container:
        stream = container.streams.video[0]
        first = next(container.decode(stream), None)
        if first is None:
            raise _empty(path)
        height, width = _upright(first.to_ndarray(format="rgb24"), first.rotation).shape[:2]
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        seconds = (container.duration or 0) / av.time_base
        return Video(height, width, Fraction(rate), stream.frames or round(seconds * float(rate)))


def check_writable(path: str | os.PathLike[str]) -> None:
    """VideoError when no video can be written under this name."""
    suffix = Path(path).suffix.lower()
    if suffix not in _CONTAINERS:
        known = ", ".join(_CONTAINERS)
        raise VideoError(f"cannot write the video {path}: its suffix is {suffix or 'missing'}, use {known}")


def transform(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    change: Callable[[Float[Tensor, "3 height width"]], Float[Tensor, "3 new_height new_width"]],
    *,
    progress: Callable[[], Any] = lambda: None,
) -> int:
    """Write a video (H.264) whose frames are those of `source`, changed; returns how many.

    change: a picture in [-1, 1] to one of the same size as all others it gives. Frames keep their times, so
    rate and length stay; sound is copied where the container holds its codec, else left out with a warning.
    progress is called after every frame. The target is written whole or not at all. Raises VideoError for a
    source without frames, files.WriteError when the target cannot be written.
    """
    import av

    check_writable(target)
    video = inspect(source)
    form = _CONTAINERS[Path(target).suffix.lower()]
    count = 0
    with (
        _reading(source) as container,
        files.whole(target) as part,
        av.open(str(part), "w", format=form) as output,
    ):
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        made = output.add_stream("libx264", rate=video.rate, options={"crf": _QUALITY})
        sound = next(iter(container.streams.audio), None)
        if sound is not None and sound.codec_context.name not in output.supported_codecs:
            warnings.warn(f"a {form} file cannot hold the sound of {source}: left out", stacklevel=2)
            sound = None
        copied = None if sound is None else output.add_stream_from_template(sound)
        waiting: list[av.Packet] = []
        for packet in container.demux(*(s for s in (stream, sound) if s is not None)):
            if packet.stream is stream:
                for frame in stream.decode(packet):
                    picture = images.read(_upright(frame.to_ndarray(format="rgb24"), frame.rotation))
                    encoded = _frame(change(picture))
                    if not count:
                        _begin(made, encoded, frame.time_base)
                    encoded.pts, encoded.time_base = frame.pts, frame.time_base
                    output.mux(made.encode(encoded))
                    count += 1
                    progress()
            # The last packet of a stream is empty and only ends it.
            elif packet.dts is not None and copied is not None:
                packet.stream = copied
                waiting.append(packet)
            # Not before the first picture: the file begins with its size.
            if count:
                output.mux(waiting)
                waiting.clear()
        output.mux(made.encode(None))
    return count


def _begin(made: "VideoStream", first: "VideoFrame", time_base: Fraction | None) -> None:
    """Tell the encoder what its pictures are like."""
    made.width, made.height, made.pix_fmt = first.width, first.height, first.format.name
    context = made.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    if time_base is not None:
        context.time_base = time_base


def _frame(picture: Tensor) -> "VideoFrame":
    """A picture as x264 takes it: half the chroma where sides are even, as players expect, else all of it."""
    import av

    pixels = np.asarray(images.to_pil(picture))
    even = pixels.shape[0] % 2 == 0 and pixels.shape[1] % 2 == 0
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    return frame.reformat(format="yuv420p" if even else "yuv444p", dst_colorspace="ITU709")


def _upright(pixels: np.ndarray, rotation: int) -> np.ndarray:
    """A frame turned as its container says: counterclockwise, in quarters."""
    return np.ascontiguousarray(np.rot90(pixels, round(rotation / 90)))


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator["InputContainer"]:
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path} holds no video: give a file with moving pictures")
            yield container
    except EOFError as error:
        # A file with a header alone ends before its first packet.
        raise _empty(path) from error
    except FFmpegError as error:
        raise VideoError(
            f"{path} is no video that can be read ({error.strerror}): copy it again, or convert it to MP4"
        ) from error


def _empty(path: str | os.PathLike[str]) -> VideoError:
    return VideoError(f"{path} holds no frames: give a video with pictures in it")
