"""A stand-in for TensorRT that builds nothing, runs a formula and records what it is asked for.

FAKE_TENSORRT_RECORD names the JSON file to write, FAKE_TENSORRT_BEHAVIOUR what goes wrong.
"""

from __future__ import annotations

import ctypes
import enum
import json
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np

BEHAVIOUR = os.environ.get("FAKE_TENSORRT_BEHAVIOUR", "")
RECORD = Path(os.environ["FAKE_TENSORRT_RECORD"])

__version__ = "10.2.1" if BEHAVIOUR == "old" else "10.13.3.9"

if BEHAVIOUR == "no libraries":
    raise OSError("libnvinfer.so.10: cannot open shared object file")

calls: list[list[object]] = []


def record(*call: object) -> None:
    calls.append(list(call))
    RECORD.write_text(json.dumps(calls))


class ILogger:
    class Severity(enum.Enum):
        ERROR = 1
        VERBOSE = 4


class IProgressMonitor:
    pass


class IErrorRecorder:
    pass


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.IntEnum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.IntEnum):
    DETAILED = 2


class BuilderFlag(enum.IntEnum):
    REFIT = 4
    TF32 = 6
    VERSION_COMPATIBLE = 13


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+timed"


class Config:
    def __init__(self) -> None:
        self.cache: TimingCache | None = None
        self.progress_monitor: object = None

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("cache", "progress_monitor"):
            record("set", name, value)
        super().__setattr__(name, value)

    def set_flag(self, flag: BuilderFlag) -> None:
        record("flag", flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None:
        record("no flag", flag.name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None:
        record("pool", pool.name, pool_size)

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        record("timing cache", cache.content.decode(), ignore_mismatch)
        self.cache = cache
        return BEHAVIOUR != "foreign cache"

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache

    def add_optimization_profile(self, profile: Profile) -> int:
        record("profile", profile.shapes)
        return 0


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, input: str, min: list[int], opt: list[int], max: list[int]) -> None:
        self.shapes[input] = [min, opt, max]


class Builder:
    def __init__(self, logger: ILogger) -> None:
        if BEHAVIOUR == "no GPU":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger

    def create_network(self, flags: int) -> object:
        record("network", flags)
        return object()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: object, config: Config) -> bytes | None:
        print("a library prints to standard output")
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 3)
        monitor.phase_start("Timing", "Building engine", 1000)
        monitor.phase_start("Too deep", "Timing", 5)
        monitor.phase_finish("Too deep")
        for step in range(1000 if BEHAVIOUR == "slow" else 3):
            time.sleep(0.15)
            if not monitor.step_complete("Timing", step):
                record("cancelled", step)
                return None
        if BEHAVIOUR == "deaf":
            record("sleeps", os.getpid())
            time.sleep(3600)
        monitor.phase_finish("Timing")
        monitor.phase_finish("Building engine")
        if BEHAVIOUR == "none":
            self.logger.log(ILogger.Severity.ERROR, "Error Code 10: Could not find\nany tactic")
            return None
        if BEHAVIOUR == "silent none":
            return None
        if BEHAVIOUR == "exits":
            sys.stderr.write("the library gave up\n")
            sys.stderr.flush()
            os._exit(7)
        return b"a plan"


class ParserError:
    def __str__(self) -> str:
        return "In node 3 (importTopK): UNSUPPORTED_NODE"


class OnnxParser:
    num_errors = 1

    def __init__(self, network: object, logger: ILogger) -> None:
        pass

    def parse_from_file(self, model: str) -> bool:
        record("parse", Path(model).name)
        return BEHAVIOUR != "parser"

    def get_error(self, index: int) -> ParserError:
        return ParserError()


class LayerInformationFormat(enum.IntEnum):
    JSON = 1


class ExecutionContextAllocationStrategy(enum.IntEnum):
    USER_MANAGED = 2


class Runtime:
    error_recorder: IErrorRecorder
    engine_host_code_allowed = False

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        if BEHAVIOUR == "refuses":
            self.error_recorder.report_error(4, "Error Code 1: the magic tag\ndoes not match")
            return None
        if BEHAVIOUR == "host code" and not self.engine_host_code_allowed:
            self.error_recorder.report_error(4, "Error Code 4: host code is not allowed")
            return None
        record("deserialize", serialized_engine.decode())
        return Engine(self.error_recorder)


class Inspector:
    execution_context: Context | None = None

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        context = self.execution_context
        rows = None if context is None else context.shapes["latents"][0]
        return json.dumps({"Layers": [], "format": format.name, "rows": rows})


class Engine:
    """Takes batches of 1 to 4 rows."""

    device_memory_size_v2 = 4096

    def __init__(self, recorder: IErrorRecorder) -> None:
        self.recorder = recorder

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return [[rows, 3, 8, 8] if name == "latents" else [rows] for rows in (1, 2, 4)]

    def create_execution_context(self, how: object) -> Context | None:
        record("context")
        assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        return None if BEHAVIOUR == "no memory" else Context(self.recorder)

    def create_engine_inspector(self) -> Inspector:
        return Inspector()


class Context:
    """Gives ε = latents + time step / 1000 and -ε, where it was told to write; -ε of no flow."""

    alive: ClassVar[weakref.WeakSet[Context]] = weakref.WeakSet()

    def __init__(self, recorder: IErrorRecorder) -> None:
        self.alive.add(self)
        self.recorder = recorder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.block = (0, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        record("memory", memory, size)
        self.block = (memory, size)

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        record("shape", name, list(shape))
        self.shapes[name] = tuple(shape)
        return BEHAVIOUR != "no shape"

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if BEHAVIOUR == "raises":
            raise TypeError("incompatible function arguments")
        if BEHAVIOUR in ("fails", "complains"):
            self.recorder.report_error(3, "Error Code 3: an illegal memory access")
            if BEHAVIOUR == "fails":
                return False
        if _captured is not None:
            _captured.append(_kernel(weakref.ref(self), stream_handle))
        else:
            self.compute(stream_handle)
        return True

    def compute(self, stream_handle: int) -> None:
        record("execute", stream_handle, self.shapes["latents"][0])
        address, size = self.block
        assert size >= Engine.device_memory_size_v2
        ctypes.memset(address, 0xAB, size)  # whatever shares the block cannot keep anything there
        latents = self._memory("latents", self.shapes["latents"], ctypes.c_float)
        is_flow = BEHAVIOUR == "flow"
        time_type = ctypes.c_float if is_flow else ctypes.c_int64
        timesteps = self._memory("timesteps", self.shapes["timesteps"], time_type)
        eps = latents + timesteps[:, None, None, None].astype(np.float32) / 1000
        answer = eps if is_flow else np.concatenate([eps, -eps], axis=1)
        output = self._memory("model_output", answer.shape, ctypes.c_float)
        output[:] = answer

    def _memory(self, name: str, shape: tuple[int, ...], kind: type) -> np.ndarray:
        pointer = ctypes.cast(self.addresses[name], ctypes.POINTER(kind))
        return np.ctypeslib.as_array(pointer, shape)


_captured: list[Callable[[], None]] | None = None


@contextmanager
def capturing() -> Iterator[list[Callable[[], None]]]:
    """Yield a list that gets what is enqueued inside, instead of its being run.

    As in a CUDA graph: addresses, and nothing that keeps a context.
    """
    global _captured
    _captured = []
    try:
        yield _captured
    finally:
        _captured = None


def _kernel(context: weakref.ref[Context], stream_handle: int) -> Callable[[], None]:
    def run() -> None:
        found = context()
        if found is None or BEHAVIOUR == "faults":
            raise RuntimeError(
                "CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA"
            )
        found.compute(stream_handle)

    return run
