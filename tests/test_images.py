"""Every picture that comes in becomes (3 height width) in [-1, 1], or one line says why not."""

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from mambastyle import images
from mambastyle.images import ImageError, ImageWarning


def gradient(mode: str = "RGB", size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A picture without two equal pixels in a row, (width, height) = size."""
    width, height = size
    values = np.arange(width * height * 3).reshape(height, width, 3) % 251
    return Image.fromarray(values.astype(np.uint8)).convert(mode)


def encoded(picture: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def as_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_grey_palette_and_bilevel_become_rgb(mode):
    picture = gradient(mode)
    close(images.read(encoded(picture)), as_tensor(picture))


def test_a_path_bytes_pil_array_and_tensor_read_the_same(tmp_path):
    picture = gradient()
    path = tmp_path / "face.png"
    picture.save(path)
    expected = as_tensor(picture)
    array = np.array(picture)
    sources = [path, str(path), path.read_bytes(), picture, array, array.astype(np.float32) / 255, expected]
    sources += [expected[None], torch.from_numpy(array).permute(2, 0, 1)]
    for source in sources:
        read = images.read(source)
        assert read.shape == (3, 8, 12)
        close(read, expected)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_keep_their_precision(form):
    values = np.linspace(0, 65535, 96, dtype=np.uint16).reshape(8, 12)
    read = images.read(encoded(Image.fromarray(values), form))
    expected = torch.from_numpy(values.astype(np.float32)) / 65535 * 2 - 1
    close(read, expected.expand(3, -1, -1))
    close(images.read(values), expected.expand(3, -1, -1))


def test_cmyk_becomes_rgb():
    white = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    cyan = Image.new("CMYK", (4, 4), (255, 0, 0, 0))
    close(images.read(encoded(white, "TIFF")), torch.ones(3, 4, 4))
    read = images.read(encoded(cyan, "JPEG", quality=100))
    assert read[0].max() < -0.9
    assert read[1:].min() > 0.9


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_on_white_and_said(mode):
    picture = gradient(mode)
    picture.putalpha(Image.new("L", picture.size, 0))
    with pytest.warns(ImageWarning, match="composited on white"):
        read = images.read(encoded(picture))
    close(read, torch.ones(3, 8, 12))


def test_half_transparent_is_half_white():
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    with pytest.warns(ImageWarning):
        read = images.read(picture)
    close(read, torch.full((3, 4, 4), 1 - 2 * 128 / 255), 0.01)


def test_a_transparent_palette_colour_is_white():
    picture = gradient("P")
    picture.info["transparency"] = picture.getpixel((0, 0))
    with pytest.warns(ImageWarning):
        read = images.read(encoded(picture, transparency=picture.getpixel((0, 0))))
    close(read[:, 0, 0], torch.ones(3))


def test_an_opaque_alpha_channel_changes_nothing_and_says_nothing():
    picture = gradient()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(images.read(encoded(picture.convert("RGBA"))), as_tensor(picture))


@pytest.mark.parametrize(
    ("orientation", "turned"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)]
)
def test_exif_rotation_is_applied(orientation, turned):
    picture = gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    close(images.read(encoded(picture, exif=exif)), as_tensor(picture.transpose(turned)))


def test_damaged_exif_is_passed_over():
    close(images.read(encoded(gradient(), exif=b"Exif\0\0II*\0\x08\0\0\0\xff")), as_tensor(gradient()))


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_passed_over():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    close(images.read(encoded(gradient(), icc_profile=profile)), as_tensor(gradient()), 0.02)
    close(images.read(encoded(gradient(), icc_profile=b"no profile")), as_tensor(gradient()))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (20_000, 3)])
def test_tiny_and_wide_pictures_are_read(size):
    read = images.read(encoded(gradient(size=size)), at_least=64)
    square = images.resize(images.center_crop_square(read), 64, 64)
    assert square.shape == (3, 64, 64)
    assert torch.isfinite(square).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_a_large_picture_is_reduced_before_it_costs_memory(form):
    picture = gradient(size=(64, 48)).resize((2560, 1920), Image.Resampling.BICUBIC)
    read = images.read(encoded(picture, form), at_least=64)
    assert 128 <= min(read.shape[1:]) < 4 * 128
    reduced = images.resize(read, 48, 64)
    expected = images.resize(as_tensor(picture), 48, 64)
    assert (reduced - expected).abs().mean() < 0.05


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels that says so in its header alone."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")
    )


BAD = {
    "text.png": (b"this is no picture", "is not a picture that can be read: give PNG"),
    "empty.png": (b"", r"is empty \(0 bytes\): copy or download it again"),
    "cut.png": (encoded(gradient(size=(64, 64)))[:200], "truncated or damaged"),
    "cut.jpg": (encoded(gradient(size=(64, 64)), "JPEG")[:700], "truncated or damaged"),
    "cut.webp": (encoded(gradient(size=(64, 64)), "WEBP")[:60], "truncated or damaged|not a picture"),
    "header.png": (encoded(gradient())[:20], "truncated or damaged|not a picture"),
    "bomb.png": (bomb(), "more than 179 million pixels: scale it down first"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_line_with_their_name(tmp_path, name):
    data, message = BAD[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ImageError, match=message) as caught:
        images.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    (tmp_path / "face.png").write_bytes(encoded(gradient()))
    with pytest.raises(ImageError, match=r"no such file: .*fase.png; did you mean .*face.png"):
        images.read(tmp_path / "fase.png")
    with pytest.raises(ImageError, match="is a folder"):
        images.read(tmp_path)
    with pytest.raises(TypeError, match="cannot read a picture from int"):
        images.read(3)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 3, 5), np.uint8), "of shape"),
        (np.zeros((0, 3), np.uint8), "of shape"),
        (np.full((4, 4), 255.0), r"from 255 to 255 is no picture: expected \[0, 1\]"),
        (np.full((4, 4), np.nan), "from nan"),
        (np.zeros((4, 4), np.int64), "int64"),
        (torch.zeros(4, 4), "of shape"),
        (torch.zeros(2, 3, 4, 4), "of shape"),
        (torch.full((3, 4, 4), 255.0), r"expected \[-1, 1\]"),
        (torch.full((3, 4, 4), float("nan")), "from nan"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "int64"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(source, message):
    with pytest.raises(ImageError, match=message):
        images.read(source)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_what_is_written_reads_back(tmp_path, suffix):
    smooth = torch.linspace(-1, 1, 24).expand(3, 16, 24).contiguous()
    path = images.write(tmp_path / "new" / f"face{suffix}", smooth)
    close(images.read(path), smooth, 1 / 255 + 1e-6 if suffix == ".png" else 0.06)


def test_writing_clamps_and_refuses(tmp_path):
    assert images.to_pil(torch.full((3, 2, 2), 1.3)).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ImageError, match="NaN"):
        images.write(tmp_path / "x.png", torch.full((3, 2, 2), float("nan")))
    with pytest.raises(ImageError, match=r"its suffix is \.bmpp, use one of \.png"):
        images.write(tmp_path / "x.bmpp", torch.zeros(3, 2, 2))
    assert not list(tmp_path.iterdir())


def test_find_expands_files_folders_and_globs(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt", "deep/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [path.name for path in images.find(tmp_path)]
    assert names == ["a.JPG", "b.png"]
    assert [path.name for path in images.find([tmp_path / "b.png", tmp_path])] == ["b.png", "a.JPG"]
    assert [path.name for path in images.find(tmp_path / "**" / "*")] == ["a.JPG", "b.png", "c.png"]
    assert images.find(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_find_says_what_is_missing(tmp_path):
    (tmp_path / "deep").mkdir()
    with pytest.raises(ImageError, match="no pictures in the folder"):
        images.find(tmp_path)
    (tmp_path / "deep" / "c.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"there are some below it: give .*\*\*"):
        images.find(tmp_path)
    with pytest.raises(ImageError, match="no pictures match"):
        images.find(tmp_path / "*.png")
    with pytest.raises(ImageError, match="no such file"):
        images.find(tmp_path / "c.png")


@pytest.mark.parametrize(("height", "width"), [(30, 45), (32, 48), (2, 3), (1, 1)])
def test_crop_undoes_pad_to_multiple(height, width):
    image = torch.rand(2, 3, height, width)
    padded = images.pad_to_multiple(image, 16)
    assert padded.shape[-2] % 16 == padded.shape[-1] % 16 == 0
    torch.testing.assert_close(images.crop(padded, height, width), image, rtol=0, atol=0)


def test_the_middle_square_is_kept():
    image = torch.arange(35.0).reshape(1, 5, 7)
    torch.testing.assert_close(images.center_crop_square(image), image[:, :, 1:6])


def test_resize_averages_and_treats_a_batch_as_its_pictures():
    image = torch.rand(2, 3, 40, 60) * 2 - 1
    small = images.resize(image, 10, 15)
    assert small.shape == (2, 3, 10, 15)
    close(small[1], images.resize(image[1], 10, 15))
    # Antialiased: noise of deviation 0.58 averages out.
    assert small.std() < 0.35
    assert images.resize(image, 40, 60) is image
    with pytest.raises(ValueError, match="cannot resize"):
        images.resize(image, 0, 4)


def test_a_grid_holds_every_picture_enlarged():
    tiles = [torch.full((3, 16, 20), value) for value in (-1.0, 0.0, 0.5, -0.5, 0.2)]
    sheet = images.grid(tiles, 3, scale=2, gap=4)
    assert sheet.shape == (3, 2 * 32 + 4, 3 * 40 + 2 * 4)
    close(sheet[:, 10, 10], torch.full((3,), -1.0))
    close(sheet[:, 36 + 10, 44 + 10], torch.full((3,), 0.2), 0.005)
    close(sheet[:, 36 + 10, 88 + 10], torch.ones(3))
    labelled = images.grid(tiles, 3, list("abcde"), column_labels=list("xyz"), row_labels=["one", "two"])
    assert labelled.shape[1] > 2 * 16
    assert labelled.shape[2] > 3 * 20
    with pytest.raises(ValueError, match="2 labels for 5"):
        images.grid(tiles, 3, ["a", "b"])
    with pytest.raises(ValueError, match="several sizes"):
        images.grid([torch.zeros(3, 4, 4), torch.zeros(3, 4, 5)], 2)
    with pytest.raises(ValueError, match="0 pictures"):
        images.grid([], 2)


def test_fit_scales_down_to_the_long_side_and_never_up():
    photo = torch.rand(2, 3, 48, 40)
    assert images.fit(photo, 24).shape == (2, 3, 24, 20)
    assert torch.equal(images.fit(photo, 48), photo)


def test_grain_is_noise_of_its_deviation_from_a_generator():
    flat = torch.full((2, 3, 100, 100), 0.3)
    noisy = images.add_grain(flat, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, images.add_grain(flat, 0.1, torch.Generator().manual_seed(0)))
    assert float((noisy - flat).std()) == pytest.approx(0.1, rel=0.02)
    assert float((noisy - flat).mean()) == pytest.approx(0, abs=1e-3)
    assert images.add_grain(flat, 0, torch.Generator()) is flat


def test_blur_keeps_a_constant_and_spreads_a_point_as_a_gaussian():
    torch.testing.assert_close(images.blur(torch.full((1, 9, 12), 0.3), 2.0), torch.full((1, 9, 12), 0.3))
    point = torch.zeros(1, 41, 41)
    point[0, 20, 20] = 1
    spread = images.blur(point, 3.0)[0]
    offsets = torch.arange(41) - 20.0
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    bell = torch.exp(-offsets.square() / 18) * (offsets.abs() <= 9)
    torch.testing.assert_close(spread.sum(0), bell / bell.sum(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(spread, spread.T)


def test_a_picture_in_the_bars_of_its_frame_comes_back():
    picture = torch.rand(3, 30, 64) * 2 - 1  # wider than 3 : 4
    square = images.to_framed_square(picture, 384, 512)
    assert square.shape == (3, 40, 40)
    assert (square[:, :5] == -1).all()
    assert (square[:, 35:] == -1).all()
    torch.testing.assert_close(images.crop_middle(square, 30, 40), picture[:, :, 12:52])
    assert images.to_framed_square(torch.zeros(3, 80, 40), 384, 512).shape == (3, 40, 40)
    with pytest.raises(ValueError, match="cannot crop 8 x 8 to 9 x 4"):
        images.crop_middle(torch.zeros(3, 8, 8), 9, 4)
    with pytest.raises(ValueError, match="cannot pad 8 x 8 to 9 x 4"):
        images.pad_middle(torch.zeros(3, 8, 8), 9, 4)


def test_reading_in_threads_leaves_the_process_its_warnings():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    transparent = io.BytesIO()
    Image.new("RGBA", (64, 64)).save(transparent, "PNG")
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(images.read, [buffer.getvalue()] * 300))
    assert list(warnings.filters) == before
    # Pillow's own are passed over, ours and the caller's are not.
    with images._quiet_pillow, pytest.warns(images.ImageWarning):
        images.read(transparent.getvalue())
    with images._quiet_pillow, pytest.warns(UserWarning, match="the caller's"):
        warnings.warn("the caller's", stacklevel=1)


def test_16_bits_are_reduced_like_8():
    grey = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
    small, whole = (
        images.read(Image.fromarray(grey.astype(np.uint16)), at_least=at_least) for at_least in (8, None)
    )
    assert small.shape == (3, 16, 22)
    torch.testing.assert_close(small[:, :, :21], images.resize(whole[:, :, :63], 16, 21), rtol=0, atol=0.02)
