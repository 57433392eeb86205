"""A stand-in for TensorRT for RTX: that for TensorRT, with kernels that are compiled when run."""

from __future__ import annotations

import enum

import tensorrt
from tensorrt import *  # noqa: F403
from tensorrt import BEHAVIOUR, Context, record

__version__ = "1.7.1.116"


class CudaGraphStrategy(enum.IntEnum):
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    EAGER = 1


class IRuntimeCache:
    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        record("deserialize kernels", blob.decode())
        if BEHAVIOUR == "other driver":
            return False
        self.content = blob
        return True

    def serialize(self) -> bytes:
        return self.content + b"+compiled"


class RuntimeConfig:
    def __setattr__(self, name: str, value: enum.IntEnum) -> None:
        record("set", name, value.name)

    def set_execution_context_allocation_strategy(self, strategy: enum.IntEnum) -> None:
        record("set", "allocation", strategy.name)

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        record("set kernels", cache.content.decode())
        return BEHAVIOUR != "no cache"


class Engine(tensorrt.Engine):
    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, config: RuntimeConfig) -> Context | None:
        assert isinstance(config, RuntimeConfig)
        return super().create_execution_context(
            tensorrt.ExecutionContextAllocationStrategy.USER_MANAGED
        )


class Runtime(tensorrt.Runtime):
    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
        engine = super().deserialize_cuda_engine(serialized_engine)
        return None if engine is None else Engine(engine.recorder)
