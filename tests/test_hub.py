"""save_pretrained and from_pretrained: the same model, a card that says what it is, no request unasked."""

import http.server
import json
import shutil
import threading

import pytest
import torch
import yaml

import mambastyle as ms
from mambastyle import checkpoints, hub
from mambastyle.checkpoints import CheckpointError

pytest.importorskip("huggingface_hub")


@pytest.fixture
def saved(tiny_model_folder, tmp_path):
    return ms.load(tiny_model_folder, device="cpu").save_pretrained(tmp_path / "saved")


def test_what_is_saved_is_the_same_model(tiny_model_folder, saved, faces):
    inverter, again = (
        ms.load(tiny_model_folder, device="cpu"),
        ms.Inverter.from_pretrained(saved, device="cpu"),
    )
    # Byte for byte, so that inversions saved with the one are the other's too.
    assert again.model_hash == inverter.model_hash
    assert list(again.directions) == list(inverter.directions)
    for name in ("generator.safetensors", "inversion.safetensors"):
        assert (saved / name).exists()
    edited = inverter.edit(faces[0], {"gender": 1.0})
    assert torch.equal(inverter.render(edited, output="tensor"), again.render(edited, output="tensor"))


def test_changed_weights_are_saved_as_they_are(tiny_model_folder, tmp_path, faces):
    inverter = ms.load(tiny_model_folder, device="cpu")
    inverter.generator.mapping.w_avg += 1
    again = ms.Inverter.from_pretrained(inverter.save_pretrained(tmp_path / "saved"), device="cpu")
    assert again.model_hash != inverter.model_hash
    expected = inverter.render(inverter.invert(faces[0]), output="tensor")
    assert torch.equal(again.render(again.invert(faces[0]), output="tensor"), expected)
    card = checkpoints.read_header(tmp_path / "saved" / "inversion.safetensors").card
    assert (
        card["generator_sha256"]
        == checkpoints.read_header(tmp_path / "saved" / "generator.safetensors").sha256
    )


def test_a_stylizer_too(tiny_stylizer_folder, tmp_path, faces):
    stylizer = ms.load(tiny_stylizer_folder, device="cpu")
    again = ms.Stylizer.from_pretrained(stylizer.save_pretrained(tmp_path / "saved"), device="cpu")
    one, other = (model.stylize(faces[0], faces[1], output="tensor") for model in (stylizer, again))
    assert torch.equal(one, other)
    assert "Stylizer.from_pretrained" in (tmp_path / "saved" / "README.md").read_text()


def test_the_card_and_the_config_say_what_it_is(tmp_path):
    folder = ms.load("kaokore64", device="cpu").save_pretrained(tmp_path / "saved")
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["license"] == "cc-by-sa-4.0"
    assert (front["library_name"], front["pipeline_tag"]) == ("mambastyle", "image-to-image")
    for part in ("KaoKore", "## inversion.safetensors", "## generator.safetensors", "from_pretrained"):
        assert part in text
    config = json.loads((folder / "config.json").read_text())
    assert config["files"]["generator.safetensors"]["config"]["resolution"] == 64
    # What somebody wrote into the card stays.
    (folder / "README.md").write_text("mine")
    ms.load(folder, device="cpu").save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, and a hub that does not answer; gives the list of its requests."""
    import huggingface_hub.constants

    asked = []

    class Closed(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield asked
    server.shutdown()
    server.server_close()


def test_a_hub_id_reaches_the_network_only_when_it_is_told_to(cache, saved, tmp_path):
    remedy = r"no such model in the cache of huggingface_hub: from_pretrained\('owner/name', download=True\)"
    with pytest.raises(CheckpointError, match=remedy):
        ms.Inverter.from_pretrained("owner/name", device="cpu")
    # As huggingface_hub leaves what it fetched.
    model = tmp_path / "cache" / "models--owner--name"
    shutil.copytree(saved, model / "snapshots" / ("0" * 40))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    cached = ms.Inverter.from_pretrained("owner/name", device="cpu")
    assert cached.model_hash == ms.load(saved, device="cpu").model_hash
    assert cache == []
    with pytest.raises(CheckpointError, match=r"owner/none.*check the id and the connection"):
        ms.Inverter.from_pretrained("owner/none", download=True, device="cpu")
    assert any("owner/none" in path for path in cache)


def test_presets_and_folders_stay_what_they_are(saved, monkeypatch):
    assert hub.locate("kaokore64") == "kaokore64"
    assert hub.locate(saved) == saved
    shutil.copytree(saved, saved.parent / "owner" / "name")
    monkeypatch.chdir(saved.parent)
    assert hub.locate("owner/name") == "owner/name"
    with pytest.raises(CheckpointError, match="no preset or folder named 'kaokore46'"):
        ms.Inverter.from_pretrained("kaokore46")
