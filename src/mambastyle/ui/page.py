"""The page as a whole: its tabs, its looks, and the app that serves it."""

import contextlib
import html
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import fastapi
import gradio as gr
from gradio.themes import Base, Soft
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mambastyle import PRESETS
from mambastyle.api import Inverter, Stylizer
from mambastyle.ui import doctor, edit, parts, stylize, train
from mambastyle.ui.runs import Runs

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Whatever a component would fetch from elsewhere, the browser refuses.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
# Gradio applies STYLE below its container; this is the container itself. Clipped, not hidden: a hidden
# overflow would keep the picture from staying in view on a phone.
HEAD = f"""<style>
.gradio-container {{ max-width: 1320px !important; margin: 0 auto !important; overflow: clip !important; }}
@media (max-width: 640px) {{ .gradio-container > .main {{ padding: 0.5rem !important; }} }}
</style>
<script>
{Path(__file__).with_name("stream.js").read_text(encoding="utf-8")}</script>"""
STYLE = Path(__file__).with_name("page.css")


def theme() -> Base:
    """Fonts of the reader's own system: none is fetched."""
    return Soft(
        primary_hue="indigo",
        secondary_hue="amber",
        neutral_hue="stone",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )


def build(
    inverter: Inverter,
    *,
    stylizers: Mapping[str, Callable[[], Stylizer]],
    runs: Runs | None,
    recipes: Path,
    examples: Path | None,
) -> gr.Blocks:
    """The page over one model that inverts and some that stylize; uploads are cleared after a day."""
    found = parts.examples(examples)
    with gr.Blocks(
        title="MambaStyle", analytics_enabled=False, fill_width=True, delete_cache=(3600, 86400)
    ) as page:
        gr.HTML(_header(inverter))
        with gr.Tabs():
            with gr.Tab("Edit", id="edit"):
                edit.tab(inverter, found)
            with gr.Tab("Stylize", id="stylize"):
                contents, styles = (
                    parts.examples(examples and examples / kind) or found for kind in ("contents", "styles")
                )
                stylize.tab(stylizers, contents, styles)
            with gr.Tab("Train", id="train") as selected:
                train.tab(runs, recipes, selected)
            with gr.Tab("Doctor", id="doctor") as selected:
                doctor.tab(selected)
    # One place per kind of work; 64 may wait for it.
    page.queue(max_size=64, default_concurrency_limit=1, api_open=False)
    return page


def _header(inverter: Inverter) -> str:
    preset = PRESETS.get(inverter.name)
    about = f"{preset.description}. {preset.data}, {preset.licence}" if preset else "a model of your own"
    return (
        '<header class="masthead"><h1>MambaStyle</h1>'
        f"<p><b>{html.escape(inverter.name)}</b> {html.escape(about)}</p></header>"
    )


def make_app(page: gr.Blocks, *, host: str, port: int, max_upload: str, examples: Path | None) -> ASGIApp:
    """The page as an ASGI app: guarded, and on loopback without foreign host names (DNS rebinding)."""
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,
        allowed_paths=[] if examples is None else [str(examples.resolve())],
        show_error=True,
        max_file_size=max_upload,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css_paths=STYLE,
        head=HEAD,
    )
    if host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    app.add_middleware(Guard)
    return app


class Guard:
    """Adds the content policy to every answer, and refuses what a page of another site sends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
                headers.append((b"x-content-type-options", b"nosniff"))
                message = {**message, "headers": headers}
            await send(message)

        headers = dict(scope.get("headers", []))
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and urlsplit(origin).netloc != headers.get(b"host", b"").decode("latin-1"):
            refusal = PlainTextResponse("requests from other sites are refused", status_code=403)
            await refusal(scope, receive, send)
            return
        # Who closes the page while it uploads has left no error behind, and nobody to answer.
        with contextlib.suppress(ClientDisconnect):
            await self.app(scope, receive, with_policy)
