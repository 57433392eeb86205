"""Headless Chromium over its debugging pipe: no driver, no port."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import pytest


def require(*, found: bool, what: str) -> None:
    """Skip where a tool is missing; fail where tests are meant to have all of them."""
    if not found:
        reason = f"no {what}; .ci/browser-tools installs it"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


def find_chromium() -> str:
    """Return the system's Chromium; see `require`."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    require(found=found is not None, what="chromium")
    return str(found)


class Page:
    """One page; expressions are evaluated in it and awaited."""

    def __init__(self, send: IO[bytes], answers: Iterator[dict[str, Any]], address: str) -> None:
        self._send, self._answers, self._count, self._session = send, answers, 0, ""
        self.events: list[dict[str, Any]] = []  # of what was enabled, as they came between answers
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        size = {"width": 1000, "height": 560, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        for domain in ("Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command of the DevTools protocol and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        self._send.flush()
        for answer in self._answers:
            if "method" in answer:
                self.events.append(answer)
            if answer.get("id") == self._count:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
        raise AssertionError(f"Chromium ended before it answered {method}")

    def evaluate(self, expression: str) -> Any:
        """Return the JSON value of an expression in the page, awaited where it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def prefer(self, colours: str, media: str = "screen") -> None:
        """Have the page believe that its reader prefers light or dark, and reads it on a medium."""
        features = [{"name": "prefers-color-scheme", "value": colours}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def screenshot(self, width: int, height: int | None = None) -> bytes:
        """Return the page as a PNG, `width` pixels wide, all of it where no height is given."""
        size = {"width": width, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", height=height or 1000, **size)
        if height is None:
            height = self.evaluate("document.documentElement.scrollHeight")
            self.call("Emulation.setDeviceMetricsOverride", height=height, **size)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true in the page; a minute at most."""
        end = time.monotonic() + 60
        while not self.evaluate(condition):
            assert time.monotonic() < end, (condition, self.evaluate("document.body.innerText"))
            time.sleep(0.02)


@contextmanager
def opened(program: str, address: str) -> Iterator[Page]:
    """Yield a page at an address; the browser ends with it."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run"
        # The protocol's pipe is descriptors 3 and 4; a shell puts ours there.
        start = f'exec "$@" 3<&{command_read} 4>&{answer_write}'
        pipe = ["--remote-debugging-pipe", f"--user-data-dir={profile}"]
        browser = subprocess.Popen(
            ["bash", "-c", start, "bash", program, *flags.split(), *pipe],
            pass_fds=(command_read, answer_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        try:
            with os.fdopen(command_write, "wb") as send, os.fdopen(answer_read, "rb") as received:
                yield Page(send, _messages(received), address)
        finally:
            browser.kill()
            browser.wait()


def _messages(pipe: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yield what comes through the pipe, messages that each end in a zero byte."""
    rest = b""
    while block := os.read(pipe.fileno(), 1 << 16):
        *whole, rest = (rest + block).split(b"\0")
        for message in whole:
            yield json.loads(message)
