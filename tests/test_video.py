"""Videos: every frame goes through, times and sound stay, and a broken file is one line."""

from fractions import Fraction

import numpy as np
import pytest

from mambastyle import video
from mambastyle.video import VideoError

av = pytest.importorskip("av")


def save_clip(path, colours, *, height=34, width=48, rate=12, sound=True):
    """A clip of flat frames, with a tone as long."""
    with av.open(str(path), "w") as output:
        pictures = output.add_stream("libx264", rate=rate)
        pictures.width, pictures.height, pictures.pix_fmt = width, height, "yuv420p"
        tone = output.add_stream("aac", rate=16000) if sound else None
        for index, colour in enumerate(colours):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), colour, np.uint8), format="rgb24")
            frame.pts = index
            output.mux(pictures.encode(frame))
        output.mux(pictures.encode(None))
        if tone is not None:
            samples = (np.sin(np.arange(16000 * len(colours) // rate) / 10) * 8000).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.rate, frame.pts = 16000, 0
            output.mux(tone.encode(frame))
            output.mux(tone.encode(None))
    return path


def contents(path):
    """Mean colour and time of every frame, and the encoded sound."""
    with av.open(str(path)) as container:
        frames = [
            (frame.to_ndarray(format="rgb24").mean((0, 1)), frame.time) for frame in container.decode(video=0)
        ]
    with av.open(str(path)) as container:
        sound = [
            bytes(packet) for packet in container.demux() if packet.stream.type == "audio" and packet.size
        ]
    return np.array([colour for colour, _ in frames]), [time for _, time in frames], sound


COLOURS = [(200, 30, 60), (20, 180, 60), (90, 90, 220), (240, 240, 240)]


def test_frames_are_changed_and_keep_their_times_and_the_sound(tmp_path):
    source = save_clip(tmp_path / "a.mp4", COLOURS)
    assert video.inspect(source) == video.Video(34, 48, Fraction(12), 4)
    shown = []
    target = tmp_path / "out" / "b.mp4"
    count = video.transform(source, target, lambda picture: -picture, progress=lambda: shown.append(1))
    assert count == len(shown) == 4
    colours, times, sound = contents(target)
    # Eight bits of luma and chroma, twice.
    np.testing.assert_allclose(colours, 255 - np.array(COLOURS), atol=4)
    assert times == contents(source)[1]
    assert sound == contents(source)[2] != []
    assert [path.name for path in target.parent.iterdir()] == ["b.mp4"]


def test_odd_sizes_and_silent_clips(tmp_path):
    source = save_clip(tmp_path / "a.mp4", COLOURS[:2], sound=False)
    target = tmp_path / "b.mkv"
    video.transform(source, target, lambda picture: picture[:, :33, :47])
    found = video.inspect(target)
    assert (found.height, found.width) == (33, 47)
    np.testing.assert_allclose(contents(target)[0], COLOURS[:2], atol=4)


def test_a_frame_is_turned_as_the_container_says():
    pixels = np.arange(6).reshape(2, 3, 1)
    assert video._upright(pixels, 0)[..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert video._upright(pixels, 90)[..., 0].tolist() == [[2, 5], [1, 4], [0, 3]]
    assert video._upright(pixels, -90)[..., 0].tolist() == [[3, 0], [4, 1], [5, 2]]
    assert video._upright(pixels, -180)[..., 0].tolist() == [[5, 4, 3], [2, 1, 0]]


def test_what_is_no_video_is_one_line_and_nothing_is_written(tmp_path):
    silent = tmp_path / "sound.mp4"
    with av.open(str(silent), "w") as output:
        tone = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4000), np.int16), format="s16", layout="mono")
        frame.rate = 16000
        output.mux(tone.encode(frame))
        output.mux(tone.encode(None))
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(b"\x00\x01nothing" * 100)
    with open(save_clip(tmp_path / "a.mp4", COLOURS, sound=False), "rb") as file:
        whole = file.read()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    for path, message in (
        (silent, "holds no video"),
        (noise, "no video that can be read"),
        (cut, "no video"),
    ):
        with pytest.raises(VideoError, match=message):
            video.transform(path, tmp_path / "out.mp4", lambda picture: picture)
    with pytest.raises(VideoError, match=r"its suffix is \.txt, use \.mp4"):
        video.check_writable("out.txt")

    def fail(picture):
        raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        video.transform(tmp_path / "a.mp4", tmp_path / "out.mp4", fail)
    assert not list(tmp_path.glob("*out*"))
    assert not list(tmp_path.glob(".*"))


def test_a_video_without_frames_is_named(tmp_path):
    empty = tmp_path / "empty.mkv"
    with av.open(str(empty), "w") as output:
        stream = output.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        output.start_encoding()
    with pytest.raises(VideoError, match=r"empty\.mkv holds no frames"):
        video.inspect(empty)
