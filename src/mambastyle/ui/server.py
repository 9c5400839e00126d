"""Serve the page: a socket, a folder for uploads that goes when the server does, and uvicorn."""

import os
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path

import uvicorn
from PIL import Image

from mambastyle.api import Inverter, Stylizer
from mambastyle.ui.runs import Runs


def serve(
    inverter: Inverter,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    stylizers: Mapping[str, Callable[[], Stylizer]],
    runs: Path,
    recipes: Path,
    examples: Path | None = None,
    max_upload: str = "20mb",
    open_browser: bool = False,
    announce: Callable[[str], None] = print,
) -> None:
    """Serve until interrupted; `announce` is told the address. Port 0 takes a free one.

    `stylizers` load a model by its name when it is first used. Trainings started here, which only a page on
    loopback offers, lie in `runs`; they save and end when the server does.
    Raises OSError with a remedy when the address cannot be had.
    """
    listener = _listen(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    with tempfile.TemporaryDirectory(prefix="mambastyle-") as folder:
        # Gradio reads this when components are made: uploads never outlive the server.
        os.environ["GRADIO_TEMP_DIR"] = folder
        from mambastyle.ui.page import LOOPBACK, build, make_app

        # The first call compiles the scan or reads it from its cache: before the first visitor.
        gray = Image.new("RGB", (64, 64), "gray")
        inverter.render(inverter.edit(gray, dict.fromkeys(list(inverter.directions)[:1], 1.0)))
        trainings = Runs(runs) if host in LOOPBACK else None
        page = build(inverter, stylizers=stylizers, runs=trainings, recipes=recipes, examples=examples)
        app = make_app(
            page,
            host=host,
            port=listener.getsockname()[1],
            max_upload=max_upload,
            examples=examples,
        )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3))
        announce(address)
        if open_browser:
            webbrowser.open(address)
        # Uvicorn ends gently and then raises the signal anew: it must unwind, so that the folder goes.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            server.run(sockets=[listener])
        finally:
            if trainings is not None:
                trainings.stop_all()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): choose another --port, "
            "or 0 for a free one"
        ) from error
