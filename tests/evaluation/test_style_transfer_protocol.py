"""The style-transfer protocol on tiny networks: the rows to compare with, the products, what is left out."""

import json
import mmap
import zipfile

import pytest
import torch

import mambastyle as ms
from mambastyle import images
from mambastyle.evaluation import metrics, style_transfer
from mambastyle.evaluation.judges import Judges
from mambastyle.evaluation.memory import peak_memory
from mambastyle.evaluation.style_transfer import Pairs, PublishedJudges, load_pairs
from mambastyle.features.inception import FIDInception
from mambastyle.features.lpips import LPIPS
from mambastyle.features.small import SmallFeatures, SmallFeaturesConfig
from mambastyle.features.vgg import VGG19


@pytest.fixture
def judges() -> Judges:
    config = SmallFeaturesConfig(resolution=16, widths=(4, 6), blocks=(1, 1))
    return Judges(small=SmallFeatures(config).eval().requires_grad_(False))


@pytest.fixture
def pairs() -> Pairs:
    contents, styles = torch.rand(2, 3, 48, 48) * 2 - 1, torch.rand(3, 3, 48, 48) - 0.8
    return Pairs(contents, styles, tuple((c, s) for c in range(2) for s in range(3)))


def test_every_method_stands_between_the_content_and_the_style(tiny_stylizer_folder, pairs, judges):
    stylizer = ms.load(tiny_stylizer_folder, device="cpu")
    seen = []
    table = style_transfer.compare({"tiny": stylizer}, pairs, judges, progress=lambda: seen.append(1))
    assert len(seen) == 3 * 6
    content, style, tiny = table.rows
    assert table.title == "Style transfer: 6 pairs of 2 contents and 3 styles, 48 px"
    assert style["fd_small"] == pytest.approx(0, abs=1e-4)
    assert style["histogram"] == pytest.approx(0, abs=1e-4)
    assert content["fd_small"] > 0.01
    with torch.inference_mode():
        made = torch.stack(
            [stylizer.stylize(pairs.contents[c], pairs.styles[s], output="tensor") for c, s in pairs.pairs]
        )
        features = judges.pooled(pairs.styles)["small"][[s for _, s in pairs.pairs]]
        expected = metrics.frechet_distance(features, judges.pooled(made)["small"])
    assert tiny["fd_small"] == pytest.approx(expected, rel=0.02)  # the pictures have 8 bits there
    assert tiny["seam"] == pytest.approx(float(metrics.seam_ratio(made, 4).mean()), rel=0.02)
    assert tiny["milliseconds"] > 0
    # What needs SqueezeNet, or weights that nobody gave, is no column.
    assert set(table.columns) == {
        *("method", "fd_small", "histogram", "seam", "milliseconds"),
        *({"peak_megabytes"} if "peak_megabytes" in tiny else ()),
    }
    low, high = tiny["seam_interval"]
    assert low <= tiny["seam"] <= high
    json.dumps(table.to_dict())


class Means(FIDInception):
    """In place of 2048 features, whose covariance takes seconds."""

    def __init__(self):
        torch.nn.Module.__init__(self)

    def forward(self, image, *, resize=True):
        assert not resize
        return image.mean((2, 3))


def test_published_networks_add_their_columns(pairs, judges):
    torch.manual_seed(0)
    lpips, vgg19 = LPIPS("alex"), VGG19()
    for linear in lpips.linear:
        linear.weight.data.abs_()
    extra = PublishedJudges(lpips, Means(), vgg19)
    table = style_transfer.compare({}, pairs, judges, extra)
    content, style = table.rows
    assert content["lpips"] == pytest.approx(0, abs=1e-6)
    assert content["cfsd_vgg19"] == pytest.approx(0, abs=1e-6)
    assert style["art_fid"] == pytest.approx(0, abs=1e-6)
    assert content["artfid"] == pytest.approx(1 + content["art_fid"])
    assert style["artfid"] == pytest.approx(1 + style["lpips"])
    assert style["lpips"] > 0
    assert {"lpips", "art_fid", "artfid", "cfsd_vgg19"} <= set(table.columns)


def test_pairs_are_read_from_zip_and_folder_and_drawn_alike(tmp_path):
    folder = tmp_path / "pairs"
    rows = ["content,style"]
    for index in range(3):
        images.write(folder / f"c{index}.png", torch.full((3, 20, 16), index / 4))
        images.write(folder / f"s{index}.png", torch.full((3, 8, 8), -index / 4))
        rows += [f"c{index}.png,s{other}.png" for other in range(3)]
    (folder / "pairs.csv").write_text("\n".join(rows))
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    whole = load_pairs(folder, size=12)
    assert whole.contents.shape == whole.styles.shape == (3, 3, 12, 12)
    assert whole.pairs == tuple((c, s) for c in range(3) for s in range(3))
    some, again = (load_pairs(source, size=12, count=4) for source in (folder, tmp_path / "pairs.zip"))
    assert some.pairs == again.pairs
    assert len(some) == 4
    assert torch.equal(some.contents, again.contents)
    (folder / "s1.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read s1\.png"):
        load_pairs(folder)
    with pytest.raises(ValueError, match="no pairs at"):
        load_pairs(tmp_path / "none.zip")


def test_peak_memory_sees_what_is_held_for_a_moment():
    # A map of its own: torch's memory may be pages that an earlier test left with the process.
    with peak_memory() as peak, mmap.mmap(-1, 2**25) as held:
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    if peak.bytes is None:
        pytest.skip("this system cannot reset its high-water mark")
    assert 30e6 < peak.bytes < 60e6
