"""The page in a real browser: a server as `mambastyle serve` starts it, and headless Chromium.

Without Chromium the tests are skipped; with MAMBASTYLE_REQUIRE_BROWSER=1 its absence is a failure.
MAMBASTYLE_PICTURES=docs/pictures writes the screenshots of the README.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mambastyle

pytest.importorskip("gradio", reason='needs the page: pip install "mambastyle[ui]"')
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra [dev]")
expect = playwright.expect

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PICTURE = EXAMPLES / "kaokore_00007421.webp"
PORTRAIT = ROOT / "tests" / "data" / "astronaut.webp"
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
# Generous: the machine may be busy. A test waits for what it needs and no longer.
PATIENCE = 120_000
# Put before the server: every connection that it would make to another machine is refused and written down.
GUARD = """
import os, sys
ALLOWED = {None, "", "127.0.0.1", "localhost", "::1", "0.0.0.0"}

def refuse(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if (host.decode() if isinstance(host, bytes) else host) not in ALLOWED:
        with open(os.environ["GUARD_LOG"], "a") as file:
            file.write(f"{event} {host}\\n")
        raise ConnectionRefusedError(f"the test allows no connection to {host}")

sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def style_source(tiny_samam_folder):
    """The preset where it is installed, else a tiny network with random weights."""
    return str(tiny_samam_folder) if mambastyle.PRESETS["samam-small"].missing() else "samam-small"


@pytest.fixture(scope="module")
def server(tmp_path_factory, style_source):
    """The address of a running page, and the log of what it tried to reach outside."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "sitecustomize.py").write_text(GUARD)
    log = folder / "connections.txt"
    path = os.pathsep.join([str(folder), str(Path(mambastyle.__file__).parents[1])])
    environment = os.environ | {"PYTHONPATH": path, "GUARD_LOG": str(log), "TMPDIR": str(folder)}
    command = [sys.executable, "-u", "-m", "mambastyle", "serve", "--port", "0", "--max-upload", "1mb"]
    command += ["--stylizer", style_source, "--recipes", str(folder / "recipes")]
    write_recipe(folder / "recipes")
    errors = folder / "errors.txt"
    with (
        errors.open("wb") as stderr,
        subprocess.Popen(
            [*command, "--examples", str(EXAMPLES)],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        line = process.stdout.readline() if process.stdout else ""
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert match, f"{line}{errors.read_text()}"
        yield match[0], log
        process.terminate()
        process.wait(PATIENCE / 1000)
    assert not errors.read_text()
    assert not list(folder.glob("mambastyle-*")), "uploads outlived the server"


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("MAMBASTYLE_REQUIRE_BROWSER") == "1":
            pytest.fail("no Chromium here: apt-get install chromium")
        pytest.skip("no Chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    """A photograph, for pictures of the page the whole one: a browser without a GPU paints slowly."""
    if os.environ.get("MAMBASTYLE_PICTURES"):
        return PORTRAIT
    path = tmp_path_factory.mktemp("photo") / "astronaut.png"
    Image.open(PORTRAIT).convert("RGB").resize((160, 160)).save(path)
    return path


@pytest.fixture
def visit(server, browser):
    """Open the page as one more visitor; at the end nobody's browser has asked any other machine."""
    contexts, requests, errors = [], [], []

    def open_page(width: int = 1280, height: int = 900, before: str = ""):
        context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(before)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server[0])
        return page

    expect.set_options(timeout=PATIENCE)
    yield open_page
    for context in contexts:
        context.close()
    hosts = {
        urllib.request.urlparse(url).hostname for url in requests if not url.startswith(("data:", "blob:"))
    }
    assert hosts == {"127.0.0.1"}
    assert not errors


def write_recipe(folder: Path) -> None:
    """A tiny GAN on six pictures: a step takes a fraction of a second."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with zipfile.ZipFile(folder / "pack.zip", "w") as archive:
        archive.writestr("labels.csv", "file,split\n" + "".join(f"{n}.png,train\n" for n in range(6)))
        for number in range(6):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
            archive.writestr(f"{number}.png", buffer.getvalue())
    model = {"resolution": 32, "z_dim": 8, "w_dim": 8, "mapping_layers": 2, "widths": [8, 8, 8, 4]}
    recipe = {
        "name": "gan-tiny",
        "steps": 100_000,
        "batch": 4,
        "log_every": 1,
        "sample_every": 1,
        "checkpoint_every": 100_000,
        "model": model | {"feature_layer": 5},
        "data": {"pack": str(folder / "pack.zip")},
        "projected": {"weight": 0.0},
    }
    (folder / "gan-tiny.yaml").write_text(json.dumps(recipe))


@pytest.fixture(scope="module")
def inverter():
    return mambastyle.load("kaokore64", device="cpu")


def screenshot(page, name: str, **options) -> None:
    if folder := os.environ.get("MAMBASTYLE_PICTURES"):
        # Let the last transition end; a picture of the page is no part of any test.
        page.wait_for_timeout(1500)
        page.screenshot(path=ROOT / folder / f"{name}.png", **options)


def upload(page, path: Path | dict, field: str = "#edit-photo") -> None:
    page.set_input_files(f"{field} input[type=file]", path)


def edited(page):
    """The element of the edited picture."""
    return page.locator("#edit-result img").nth(1)


def pixels(page, image) -> np.ndarray:
    """The file that an <img> of the page shows, decoded."""
    response = page.request.get(image.get_attribute("src"))
    return np.asarray(Image.open(io.BytesIO(response.body())))


def move(page, direction: str, steps: int) -> None:
    """Move a slider by the keyboard, and wait until the picture has followed."""
    before = edited(page).get_attribute("src")
    slider = page.locator(f"#edit-{direction} input[type=range]")
    number = page.locator(f"#edit-{direction} input[type=number]")
    goal = round(float(number.input_value()) + steps / 10, 1)
    slider.focus()
    for _ in range(abs(steps)):
        slider.press("ArrowRight" if steps > 0 else "ArrowLeft")
    # On a busy machine the picture may follow before the last key has arrived.
    expect(number).to_have_value(f"{goal:g}")
    expect(edited(page)).not_to_have_attribute("src", before)


def download(page, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.locator(button).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def save(page, what: str, folder: Path) -> Path:
    return download(page, f"#edit-save-{what}", folder)


def test_a_slider_changes_the_picture_and_undo_brings_it_back(visit, inverter, tmp_path):
    page = visit()
    upload(page, PICTURE)
    expect(edited(page)).to_be_visible()
    inverted = inverter.invert(PICTURE)
    unedited = np.asarray(inverter.render(inverted))
    np.testing.assert_array_equal(pixels(page, edited(page)), unedited)
    expect(page.locator("#edit-strip img")).to_have_count(7)

    move(page, "noble", 10)
    expect(page.locator("#edit-noble input[type=number]")).to_have_value("1")
    picture = save(page, "picture", tmp_path)
    assert picture.name == "kaokore_00007421.noble+1.png"
    expected = np.asarray(inverter.render(inverter.edit(inverted, {"noble": 1.0})))
    assert np.abs(expected.astype(int) - unedited).mean() > 2
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), expected)
    saved = inverter.load_inversion(save(page, "inversion", tmp_path))
    np.testing.assert_array_equal(np.asarray(inverter.render(saved)), expected)
    screenshot(page, "page-edit", full_page=True)

    # A picture of the strip sets the slider.
    page.locator("#edit-strip button").nth(5).click()
    expect(page.locator("#edit-noble input[type=number]")).to_have_value("2")
    page.locator("#edit-undo").click()
    expect(page.locator("#edit-noble input[type=number]")).to_have_value("0")
    assert save(page, "picture", tmp_path).name == "kaokore_00007421.inversion.png"
    expect(page.locator("#edit-result img").nth(1)).to_be_visible()
    np.testing.assert_array_equal(pixels(page, edited(page)), unedited)


def test_a_whole_photo_comes_back_with_its_face_edited(visit, inverter, tmp_path):
    pytest.importorskip("yuface", reason='needs the detector: pip install "mambastyle[faces]"')
    page = visit()
    page.locator("#edit-find-face input").check()
    upload(page, PORTRAIT)
    expect(edited(page)).to_be_visible()
    move(page, "noble", 10)
    file = save(page, "whole-photo", tmp_path)
    assert file.name == "astronaut.noble+1.whole.png"
    expected = inverter.edit_photo(PORTRAIT, {"noble": 1.0}, find_faces=True)
    np.testing.assert_array_equal(np.asarray(Image.open(file)), np.asarray(expected))


def test_an_example_opens_by_keyboard(visit, inverter):
    page = visit()
    first = page.locator(".gallery-item, .gallery button").first
    first.focus()
    first.press("Enter")
    expect(edited(page)).to_be_visible()
    example = sorted(EXAMPLES.glob("*.webp"))[0]
    np.testing.assert_array_equal(pixels(page, edited(page)), np.asarray(inverter.render(example)))


def test_a_bad_upload_says_what_is_wrong_and_a_good_one_works_after_it(visit):
    page = visit()
    toast = page.locator(".toast-body")
    for name, data, message in (
        ("notes.png", b"no picture", "notes.png is not a picture that can be read: give PNG, JPEG"),
        ("cut.webp", PICTURE.read_bytes()[:900], "cut.webp is truncated or damaged"),
        ("empty.png", b"", "empty.png is empty (0 bytes)"),
        ("large.png", bytes(2**20 + 1), "exceed the maximum allowed size"),
    ):
        upload(page, {"name": name, "mimeType": "image/png", "buffer": data})
        expect(toast.filter(has_text=message)).to_be_visible()
    # Where the file lies on the server concerns nobody.
    expect(toast.filter(has_text="mambastyle-")).to_have_count(0)
    page.reload()
    upload(page, PICTURE)
    expect(edited(page)).to_be_visible()


def test_two_visitors_at_once_see_their_own_pictures(visit, inverter, tmp_path):
    pages = [visit(), visit()]
    pictures = [PICTURE, EXAMPLES / "kaokore_00002226.webp"]
    for page, picture in zip(pages, pictures, strict=True):
        upload(page, picture)
    for page in pages:
        expect(edited(page)).to_be_visible()
    # Both move a slider before either has looked at what came of it.
    edits = [("noble", 5), ("warrior", -5)]
    for _ in range(2):
        for page, (direction, steps) in zip(pages, edits, strict=True):
            move(page, direction, steps)
    for page, picture, (direction, steps) in zip(pages, pictures, edits, strict=True):
        strength = round(steps / 5, 1)
        expect(page.locator(f"#edit-{direction} input[type=number]")).to_have_value(f"{strength:g}")
        file = save(page, "picture", tmp_path)
        assert file.name == f"{picture.stem}.{direction}{strength:+g}.png"
        expected = np.asarray(inverter.render(inverter.edit(picture, {direction: strength})))
        np.testing.assert_array_equal(np.asarray(Image.open(file)), expected)


def test_on_a_phone_nothing_sticks_out_and_the_picture_stays_in_view(visit):
    page = visit(390, 844)
    upload(page, PICTURE)
    expect(page.locator("#edit-strip img")).to_have_count(7)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#edit-commoner").scroll_into_view_if_needed()
    box = page.locator("#edit-result").bounding_box()
    assert box["y"] >= -1
    assert box["y"] + box["height"] <= 844 / 2
    screenshot(page, "page-phone")


# Put before the page: what tells the browser that its stream of results is closed arrives late.
LATE_CLOSING = """
const original = window.fetch.bind(window);
window.fetch = async (resource, options) => {
    const response = await original(resource, options);
    if (!new URL(resource.url ?? resource, location.href).pathname.endsWith("/queue/data")) return response;
    const late = new TransformStream({
        async transform(chunk, controller) {
            if (new TextDecoder().decode(chunk).includes("close_stream")) {
                window.closings = (window.closings ?? 0) + 1;
                await new Promise((resolve) => setTimeout(resolve, 1000));
            }
            controller.enqueue(chunk);
        },
    });
    return new Response(response.body.pipeThrough(late), response);
};
"""


@pytest.mark.thorough
def test_what_is_asked_while_the_stream_of_results_closes_is_answered(visit):
    page = visit(before=LATE_CLOSING)
    upload(page, PICTURE)
    expect(page.locator("#edit-strip img")).to_have_count(7)
    for number in (1, 2):
        page.wait_for_function(f"window.closings >= {number}")
        move(page, "noble", 1)


def test_a_photo_is_stylized_where_it_is_painted(visit, style_source, photo, tmp_path):
    page = visit()
    page.get_by_role("tab", name="Stylize").click()
    page.locator("#stylize-start").click()
    expect(page.locator(".toast-body").filter(has_text="there is no photo yet")).to_be_visible()
    page.locator(".toast-close").click()
    upload(page, photo, "#stylize-photo")
    mosaic, waves = (EXAMPLES / "styles" / f"{name}.webp" for name in ("mosaic", "waves"))
    upload(page, mosaic, "#stylize-style-1")
    page.get_by_role("button", name="Mix in more styles").click()
    upload(page, waves, "#stylize-style-2")
    expect(page.locator("#stylize-style-1 img, #stylize-style-2 img, #stylize-photo img")).to_have_count(3)
    result = page.locator("#stylize-result img").nth(1)
    page.locator("#stylize-start").click()
    expect(result).to_be_visible()
    whole = download(page, "#stylize-save", tmp_path)
    assert whole.name == "astronaut.mosaic.waves.png"
    stylizer = mambastyle.load(style_source, device="cpu")
    mixed = stylizer.stylize(photo, styles=[mosaic, waves], weights=[0.5, 0.5])
    expected = np.asarray(mixed).astype(int)
    assert np.abs(np.asarray(Image.open(whole)) - expected).max() <= 1
    screenshot(page, "page-stylize")

    # One stroke across the middle of the photo: above and below it the photo stays as it was.
    page.get_by_role("button", name="Only a part of it: paint where").click()
    canvas = page.locator("#stylize-mask canvas").first
    expect(canvas).to_be_visible()
    page.locator("#stylize-mask").scroll_into_view_if_needed()  # the mouse reaches what is in view
    share = page.locator("#stylize-share")
    for _ in range(60):
        box = canvas.bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] * 0.4, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=2)
        page.mouse.up()
        # The editor takes no stroke before it is ready, and does not say when that is.
        page.wait_for_timeout(1000)
        if "%" in share.inner_text():
            break
    expect(share).to_contain_text("%")
    before = result.get_attribute("src")
    page.locator("#stylize-start").click()
    expect(result).not_to_have_attribute("src", before)
    part = np.asarray(Image.open(download(page, "#stylize-save", tmp_path))).astype(int)
    before = np.asarray(Image.open(photo).convert("RGB"))
    np.testing.assert_array_equal(part[[0, -1]], before[[0, -1]])
    middle = len(part) // 2
    assert np.abs(part - before)[middle - 4 : middle + 4, middle - 4 : middle + 4].max() > 2


def test_a_training_is_started_watched_and_stopped(visit):
    page = visit()
    page.get_by_role("tab", name="Train").click()
    report = page.locator("#train-report")
    page.locator("#train-settings textarea").fill("stepz=3")
    page.locator("#train-start").click()
    expect(report).to_contain_text("unknown key stepz: did you mean steps?")
    expect(report).to_contain_text("failed with exit code 1")
    page.locator("#train-settings textarea").fill("steps=50000")
    page.locator("#train-start").click()
    expect(report).to_contain_text("gan-tiny: running")
    expect(report.locator("svg").first).to_be_visible()
    expect(page.locator("#train-samples img").first).to_be_visible()
    page.locator("#train-stop").click()
    expect(report).to_contain_text("gan-tiny: ended")
    expect(report).to_contain_text("the same command goes on from there")


def test_the_doctor_tab_shows_what_the_command_shows(visit):
    page = visit()
    page.get_by_role("tab", name="Doctor").click()
    table = page.locator("#doctor-table")
    expect(table).to_contain_text("selective scan")
    for finding in mambastyle.api.examine():
        expect(table).to_contain_text(finding.detail)


def test_who_leaves_during_an_upload_leaves_no_error(server):
    """The server's fixture reads at the end what it wrote of errors."""
    url = urllib.request.urlparse(server[0])
    with socket.create_connection((url.hostname, url.port)) as connection:
        head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 100000\r\n"
        head += "Content-Type: multipart/form-data; boundary=edge\r\n\r\n"
        part = '--edge\r\nContent-Disposition: form-data; name="files"; filename="half.png"\r\n\r\n'
        connection.sendall((head + part).encode() + bytes(5000))
    with urllib.request.urlopen(server[0]) as response:
        assert response.status == 200


def test_the_page_answers_no_foreign_host_and_sends_its_policy(server):
    address, _ = server
    with urllib.request.urlopen(address) as response:
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
    foreign = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(foreign)


def test_the_server_reaches_for_no_other_machine(server):
    """Last: all the visits above have been made."""
    _, log = server
    assert not log.exists(), log.read_text()
