"""The stream of plans: its order with the caller's, by doubles of what torch has of CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from ditas_export.engine.metadata import Gpu
from ditas_export.errors import RunnerError
from ditas_export.runtime.cuda_stream import CudaStream

Log = list[tuple[str, ...]]
BEFORE, AFTER = ("ours", "waits for", "caller"), ("caller", "waits for", "ours")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """Put doubles in place that note what waits for what, and where work is enqueued."""
    events: Log = []

    class Stream:
        cuda_stream = 7

        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "ours"

        def wait_stream(self, other: Any) -> None:
            events.append((self.name, "waits for", other.name))

        def synchronize(self) -> None:
            events.append((self.name, "is done"))

    @contextmanager
    def current(stream: Any) -> Iterator[None]:
        events.append(("on", stream.name))
        yield
        events.append(("off", stream.name))

    caller = Stream("caller")
    gpu = Gpu(name="a GPU", compute_capability="8.9")
    for name, double in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "Stream": Stream,
        "current_stream": lambda device: caller,
        "stream": current,
    }.items():
        monkeypatch.setattr(torch.cuda, name, double)
    monkeypatch.setattr(Gpu, "at", lambda device: gpu)
    return events


def test_work_is_between_the_callers_earlier_and_later_work(log: Log) -> None:
    stream = CudaStream("cuda:0")
    assert stream.handle == 7
    with stream.ordered():
        log.append(("work",))
    assert log == [BEFORE, ("on", "ours"), ("work",), ("off", "ours"), AFTER]


def test_the_caller_waits_for_what_was_enqueued_before_an_error(log: Log) -> None:
    with pytest.raises(ValueError, match="no"), CudaStream("cuda").ordered():
        raise ValueError("no")
    assert log[-1] == AFTER


def test_finished_is_waited_for(log: Log) -> None:
    CudaStream("cuda").finish()
    assert log == [("ours", "is done")]


@pytest.mark.usefixtures("log")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            RuntimeError("CUDA error: device-side assert\nmore"),
            r"a GPU \(cuda:0\): CUDA error: .*rt$",
        ),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory. Tried$"),
        (RuntimeError(""), "RuntimeError$"),
    ],
)
def test_what_torch_raises_is_one_line(fault: RuntimeError, message: str) -> None:
    stream = CudaStream("cuda:0")
    with pytest.raises(RunnerError, match=message), stream.faults_as_errors():
        raise fault
