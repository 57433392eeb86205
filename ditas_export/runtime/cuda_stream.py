"""A CUDA stream of our own, and what a runner needs of torch on a GPU; nothing else touches it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ditas_export.engine.metadata import Gpu
from ditas_export.errors import RunnerError


class CudaStream:
    """A stream on one GPU that keeps order with the caller's: work goes in after it, out before.

    Args:
        device: such as "cuda:0".

    Raises:
        RunnerError: torch sees no such GPU.
    """

    def __init__(self, device: str) -> None:
        if not torch.cuda.is_available():
            raise RunnerError(
                f"device {device} was asked for, but this PyTorch ({torch.__version__}) sees no "
                f"CUDA GPU; engines run on GPUs alone, and need a CUDA build of torch"
            )
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise RunnerError(
                f"device {device} was asked for, but there are {torch.cuda.device_count()} GPUs, "
                f"from cuda:0 up"
            )
        self.device = torch.device("cuda", index)
        self.gpu = Gpu.at(self.device)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """The stream's address, as libraries take it."""
        return int(self._stream.cuda_stream)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Put what is enqueued inside between the caller's earlier and later work on the GPU."""
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            caller.wait_stream(self._stream)

    def finish(self) -> None:
        """Wait until all that was enqueued is done: nothing reads or writes its memory then."""
        self._stream.synchronize()

    @contextmanager
    def faults_as_errors(self) -> Iterator[None]:
        """Raise RunnerError for what torch raises of CUDA inside: faults, and no memory left."""
        try:
            yield
        except RuntimeError as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise RunnerError(f"{self.gpu.name} ({self.device}): {reason}") from error

    def capture(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Capture what a function enqueues on this stream; return what replays it.

        The function must have run once before, so that nothing is allocated or compiled now. The
        replay holds no Python object of the function's: whoever keeps it keeps those.

        Raises:
            RunnerError: something in it cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                launch()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise RunnerError(f"the engine cannot be captured as a CUDA graph: {reason}") from error
        return graph.replay
