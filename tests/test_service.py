"""The service of examples/: batches of strangers' requests, each picture as if asked for alone."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from quantized_fixture import quantized_tiny_dit, tiny_dit
from torch import Tensor

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.errors import RunnerError
from ditas_export.families.base import ModelInputs
from ditas_export.families.load import load_model
from ditas_export.onnx_export.export import export_onnx
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.torch_runner import TorchRunner

uvicorn = pytest.importorskip("uvicorn", reason="extra [service]")


def load_service() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "service.py"
    spec = importlib.util.spec_from_file_location("service", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["service"] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module


service = load_service()


class Slow(TorchRunner):
    """Waits in every step until it may go on."""

    def __init__(self) -> None:
        super().__init__(tiny_dit())
        self.gate, self.entered = threading.Event(), threading.Event()
        self.steps = 0

    def _infer(self, backend: Any, inputs: ModelInputs) -> Tensor:
        self.entered.set()
        assert self.gate.wait(60)
        self.steps += 1
        return super()._infer(backend, inputs)


@contextmanager
def served(batcher: Any) -> Iterator[str]:
    """Yield the address of a running service; it is stopped as SIGTERM stops it."""
    config = uvicorn.Config(service.create_app(batcher), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


def ask(address: str, timeout: float = 60, **wanted: Any) -> bytes:
    """Return the picture that a request is answered with."""
    request = urllib.request.Request(
        f"{address}/images",
        data=json.dumps(wanted).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        picture: bytes = answer.read()
    return picture


def health(address: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_strangers_share_batches_and_get_what_they_would_get_alone(tmp_path: Path) -> None:
    path = tmp_path / "digits.onnx"
    export_onnx(fold_smoothing(quantized_tiny_dit(load_model("digits").model)), path)
    seeds = range(8)
    with (
        OnnxRuntimeRunner(path, threads=1) as runner,
        served(service.Batcher(runner, batch=8)) as address,
        ThreadPoolExecutor(8) as pool,
    ):
        together = list(pool.map(lambda seed: ask(address, label=seed, seed=seed, steps=6), seeds))
        sizes = {int(size) for size in health(address)["batches"]}
        alone = [ask(address, label=seed, seed=seed, steps=6) for seed in seeds]
    assert max(sizes) >= 3
    assert together == alone
    assert len(set(together)) == 8
    assert all(picture.startswith(b"\x89PNG") for picture in together)


def test_a_full_queue_says_so_and_requests_that_do_not_fit_are_refused() -> None:
    runner = Slow()
    batcher = service.Batcher(runner, batch=1, places=1)
    with served(batcher) as address, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, address, label=1, steps=2)
        assert runner.entered.wait(60)  # the thread has taken it
        second = pool.submit(ask, address, label=2, steps=2)
        deadline = time.monotonic() + 20
        while not len(batcher):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(urllib.error.HTTPError) as full:
            ask(address, label=3, steps=2)
        assert full.value.code == 503
        for wanted in ({"label": 99}, {"label": 1, "cfg_scale": 0.5}, {"label": 1, "sampler": "x"}):
            with pytest.raises(urllib.error.HTTPError) as refused:
                ask(address, **wanted)
            assert refused.value.code == 422
        runner.gate.set()
        assert first.result() != second.result()


def test_a_batch_that_nobody_waits_for_is_stopped() -> None:
    runner = Slow()
    batcher = service.Batcher(runner, batch=2)
    with served(batcher) as address:
        with pytest.raises(TimeoutError):
            ask(address, timeout=0.5, label=1, steps=50)
        time.sleep(0.5)  # until the service has looked whether the client is there
        runner.gate.set()
        ask(address, label=2, steps=2)
    assert runner.steps < 50


def test_what_waits_is_finished_before_the_end() -> None:
    runner = Slow()
    batcher = service.Batcher(runner, batch=1)
    with ThreadPoolExecutor(3) as pool:
        with served(batcher) as address:
            answers = [pool.submit(ask, address, label=label, steps=2) for label in range(3)]
            deadline = time.monotonic() + 20
            while len(batcher) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            runner.gate.set()
        assert len({answer.result() for answer in answers}) == 3
    with pytest.raises(service.FullError):
        batcher.submit(service.Wanted(label=1, steps=2))


def test_a_fault_of_one_batch_is_an_answer_and_the_next_is_made() -> None:
    class Broken(TorchRunner):
        broken = True

        def _infer(self, backend: Any, inputs: ModelInputs) -> Tensor:
            if self.broken:
                raise torch.OutOfMemoryError("no memory")
            return super()._infer(backend, inputs)

    runner = Broken(tiny_dit())
    batcher = service.Batcher(runner, batch=1)
    try:
        with pytest.raises(RunnerError, match="no memory"):
            batcher.submit(service.Wanted(label=1, steps=2)).picture.result(30)
        runner.broken = False
        assert batcher.submit(service.Wanted(label=1, steps=2)).picture.result(30)
    finally:
        batcher.stop()


def test_the_command_opens_a_model_and_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[dict[str, Any]] = []
    monkeypatch.setattr(service.uvicorn, "run", lambda _app, **how: served.append(how))
    monkeypatch.setattr(sys, "argv", ["service.py", "digits", "--port", "8123"])
    service.main()  # ends, though nothing was served
    assert served == [{"host": "127.0.0.1", "port": 8123}]
    monkeypatch.setattr(sys, "argv", ["service.py", "digits", "--batch", "0"])
    with pytest.raises(SystemExit):
        service.main()


def test_clients_that_left_keep_no_place() -> None:
    release = threading.Event()

    class Slow(TorchRunner):
        def __call__(self, inputs: ModelInputs) -> Any:
            release.wait(30)
            return super().__call__(inputs)

    batcher = service.Batcher(Slow(load_model("digits").model), batch=1, places=1)
    wanted = service.Wanted(label=3, seed=0, steps=2)
    try:
        batcher.submit(wanted)
        while len(batcher):  # the thread has taken it
            time.sleep(0.01)
        batcher.submit(wanted).picture.cancel()
        batcher.submit(wanted)
        with pytest.raises(service.FullError):
            batcher.submit(wanted)
    finally:
        release.set()
        batcher.stop()
