"""Images over HTTP: a small FastAPI application over `Sampler`.

    pip install 'ditas-export[service]'
    python examples/service.py out.onnx --batch 8
    curl -s localhost:8000/images -H 'content-type: application/json' \
        -d '{"label": 3, "seed": 1}' -o three.png

One thread runs the model. It takes the oldest request and with it those that are waiting with equal
steps, sampler and guidance, and fills the batch up to one size: so an image depends on its own
request, not on who else asks. A client that leaves is dropped, and a batch that nobody waits for is
stopped. A full queue answers 503.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from collections import Counter, deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from threading import Condition, Event, Thread
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from pydantic import BaseModel, Field

from ditas_export.diffusion.runner import Runner
from ditas_export.errors import CancelledError, DitasExportError, RunnerError
from ditas_export.generation.sampler import PICTURE_CHANNELS, Sampler, SamplingSettings
from ditas_export.runtime.open_runner import open_runner
from ditas_export.vae.decoder import Decoder, open_decoder

POLL_SECONDS = 0.1
"""How often it is looked at whether a client is still there."""


class Wanted(BaseModel):
    """One image."""

    label: int = Field(ge=0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    steps: int = Field(default=50, ge=2, le=1000)
    sampler: str | None = None  # the model's own
    cfg_scale: float | None = None

    @property
    def kind(self) -> tuple[int, str | None, float | None]:
        """What requests of one batch have in common."""
        return self.steps, self.sampler, self.cfg_scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Waiting:
    """A request, and where its picture goes."""

    wanted: Wanted
    picture: Future[bytes] = field(default_factory=Future)


class FullError(Exception):
    """The queue takes no more."""


class Batcher:
    """A bounded queue, and the thread that makes batches of it.

    Args:
        runner: an open runner.
        decoder: of its latents, if it needs one.
        batch: rows of every batch, filled up where fewer wait.
        places: requests that may wait.
    """

    def __init__(
        self, runner: Runner, *, decoder: Decoder | None = None, batch: int = 8, places: int = 64
    ) -> None:
        self.runner = runner
        self.decoder = decoder
        self.batch = batch
        self.places = places
        self.made: Counter[int] = Counter()  # images in a batch -> batches
        self._waiting: deque[Waiting] = deque()
        self._changed = Condition()
        self._stopped = False
        self._thread = Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many wait; clients that left do not."""
        return sum(not entry.picture.cancelled() for entry in list(self._waiting))

    def submit(self, wanted: Wanted) -> Waiting:
        """Put a request into the queue.

        Raises:
            RunnerError: settings that the model or the sampler does not take.
            FullError: the queue is full, or the service is stopping.
        """
        Sampler(self.runner, self._settings([wanted]), decoder=self.decoder)
        entry = Waiting(wanted=wanted)
        with self._changed:
            if self._stopped or len(self) >= self.places:
                raise FullError
            self._waiting.append(entry)
            self._changed.notify()
        return entry

    def stop(self) -> None:
        """Take no more, finish what waits, and return."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def _settings(self, requests: list[Wanted]) -> SamplingSettings:
        """Return a batch of requests, filled up with the last."""
        filled = requests + [requests[-1]] * (self.batch - len(requests))
        first: Any = filled[0]
        return SamplingSettings(
            classes=tuple(wanted.label for wanted in filled),
            seeds=tuple(wanted.seed for wanted in filled),
            steps=first.steps,
            sampler=first.sampler,
            cfg_scale=first.cfg_scale,
            batch=self.batch,
        )

    def _take(self) -> list[Waiting]:
        """Wait for requests; return those of the oldest's kind, none when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._stopped)
            while self._waiting and self._waiting[0].picture.cancelled():
                self._waiting.popleft()
            taken: list[Waiting] = []
            left: deque[Waiting] = deque()
            for entry in self._waiting:
                fits = not taken or entry.wanted.kind == taken[0].wanted.kind
                if entry.picture.cancelled():
                    continue
                (taken if fits and len(taken) < self.batch else left).append(entry)
            self._waiting = left
            return taken

    def _work(self) -> None:
        """Make batches until stopped and nothing waits."""
        while True:
            taken = self._take()
            if taken:
                self._make(taken)
            elif self._stopped:
                return

    def _make(self, taken: list[Waiting]) -> None:
        """Sample one batch and hand its pictures out."""
        cancel = Event()

        def after_step(*_: object) -> None:
            if all(entry.picture.cancelled() for entry in taken):
                cancel.set()

        try:
            settings = self._settings([entry.wanted for entry in taken])
            sampler = Sampler(self.runner, settings, decoder=self.decoder)
            made = sampler.run(0, on_step=after_step, cancel=cancel)
            self.made[len(taken)] += 1
            for index, entry in enumerate(taken):
                _settle(entry, as_png(made.pixels[index]))  # type: ignore[index]
        except CancelledError:
            return
        except Exception as error:  # the thread goes on: the next batch may be fine
            for entry in taken:
                _settle(entry, error)


def _settle(entry: Waiting, result: bytes | Exception) -> None:
    """Give a request its picture or its error, unless its client has left."""
    if entry.picture.set_running_or_notify_cancel():
        if isinstance(result, Exception):
            entry.picture.set_exception(result)
        else:
            entry.picture.set_result(result)


def as_png(pixels: Any) -> bytes:
    """Return the PNG of a picture, (H, W, 1 or 3) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def create_app(batcher: Batcher) -> FastAPI:
    """Return the application; it stops the batcher when it ends."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(batcher.stop)

    app = FastAPI(title="ditas-export", lifespan=lifespan)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {
            "status": "ok",
            "runtime": batcher.runner.description,
            "waiting": len(batcher),
            "batches": {str(size): count for size, count in sorted(batcher.made.items())},
        }

    @app.post("/images")
    async def images(wanted: Wanted, request: Request) -> Response:
        try:
            entry = batcher.submit(wanted)
        except FullError:
            raise HTTPException(503, "busy; try again", headers={"Retry-After": "1"}) from None
        except DitasExportError as error:
            raise HTTPException(422, str(error)) from error
        try:
            return Response(await _picture(entry, request), media_type="image/png")
        except RunnerError as error:
            raise HTTPException(500, str(error)) from error

    return app


async def _picture(entry: Waiting, request: Request) -> bytes:
    """Wait for a picture, and let go of it when the client leaves."""
    waiting = asyncio.wrap_future(entry.picture)
    while not waiting.done():
        await asyncio.wait([waiting], timeout=POLL_SECONDS)
        if not waiting.done() and await request.is_disconnected():
            entry.picture.cancel()
            raise HTTPException(499, "the client has left")
    return await waiting


def _positive(text: str) -> int:
    """Return a number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; give 1 or more")
    return int(text)


def main() -> None:
    """Open the model and serve it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="what ditas-sample takes")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vae", help="for models of latents")
    parser.add_argument("--batch", type=_positive, default=8)
    parser.add_argument("--places", type=_positive, default=64, help="requests that may wait")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    opened = open_runner(args.model, runtime=args.runtime, device=args.device)
    with opened.runner as runner:
        channels = runner.config.in_channels
        if args.vae is None and channels not in PICTURE_CHANNELS:
            parser.error(f"{args.model} makes latents; pass its --vae")
        decoder = open_decoder(args.vae, config=runner.config, device=args.device)
        batcher = Batcher(runner, decoder=decoder, batch=args.batch, places=args.places)
        try:
            uvicorn.run(create_app(batcher), host=args.host, port=args.port)
        finally:
            batcher.stop()  # also where it never began to serve


if __name__ == "__main__":
    main()
