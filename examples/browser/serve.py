"""A page that samples in the browser: a quantized file beside the float file, the same noise.

    npm install --prefix examples/browser
    ditas-export --reference fp32.onnx out.onnx
    python examples/browser/serve.py out.onnx fp32.onnx

It is served to this machine alone, and fetches nothing from elsewhere. All that computes is
onnxruntime-web in the page. For models of pictures: a VAE of latents is not decoded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ditas_export.errors import DitasExportError
from ditas_export.onnx_export.file_facts import read_config, read_identity

HERE = Path(__file__).parent
PICTURE_CHANNELS = (1, 3)
INSTALL = "npm install --prefix examples/browser"

OWN = ("index.html", "page.js", "model.js", "sampler.js")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".wasm": "application/wasm",
    ".json": "application/json",
}

Content = Path | bytes
"""What an address answers: a file, or bytes of JSON."""


class Handler(BaseHTTPRequestHandler):
    """Answers the addresses of a table, and no other."""

    def __init__(self, contents: Mapping[str, Content], *args: object) -> None:
        self.contents = contents
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        """Answer one address."""
        content = self.contents.get(self.path)
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        body = content if isinstance(content, bytes) else content.read_bytes()
        suffix = ".json" if isinstance(content, bytes) else content.suffix
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES.get(suffix, "application/octet-stream"))
        self.send_header("Content-Length", str(len(body)))
        # With these two a page may share memory between threads, which onnxruntime-web needs.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Say nothing of requests."""


def page_contents(model: Path, reference: Path) -> dict[str, Content]:
    """Return what the page is made of, by address.

    Raises:
        DitasExportError: files that are not exported ones, of two models, or of latents; or no
            onnxruntime-web.
    """
    config = read_config(model)
    own, other = read_identity(model), read_identity(reference)
    if own is None or other is None:
        raise DitasExportError(f"{model} or {reference} does not say which model it holds")
    own.require_same(other, what=str(model), remedy="Take the file that --reference wrote")
    if config.in_channels not in PICTURE_CHANNELS:
        raise DitasExportError(
            f"{model} makes latents of {config.in_channels} channels; the page shows models of 1 "
            f"or 3, which make pictures"
        )
    dist = HERE / "node_modules" / "onnxruntime-web" / "dist"
    if absent := [name for name in RUNTIME if not (dist / name).is_file()]:
        raise DitasExportError(f"{dist} has no {', '.join(absent)}; run: {INSTALL}")
    models = {"/models/quantized.onnx": model, "/models/float.onnx": reference}
    titles = ("quantized", "float")
    listed = [
        {"title": f"{title} ({path.name})", "url": address.removeprefix("/")}
        for title, (address, path) in zip(titles, models.items(), strict=True)
    ]
    description = {"config": dataclasses.asdict(config), "models": listed}
    return {
        "/": HERE / "index.html",
        **{f"/{name}": HERE / name for name in OWN},
        **{f"/ort/{name}": dist / name for name in RUNTIME},
        **models,
        "/models.json": json.dumps(description).encode(),
    }


def make_server(model: Path, reference: Path, *, port: int) -> ThreadingHTTPServer:
    """Return a server of the page on this machine's own address; port 0 takes a free one.

    Raises:
        DitasExportError: see `page_contents`.
    """
    return ThreadingHTTPServer(
        ("127.0.0.1", port), partial(Handler, page_contents(model, reference))
    )


def main() -> None:
    """Serve the page until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="what ditas-export wrote")
    parser.add_argument("reference", type=Path, help="what --reference wrote with it")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    try:
        server = make_server(args.model, args.reference, port=args.port)
    except DitasExportError as error:
        parser.error(str(error))
    print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C stops it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
