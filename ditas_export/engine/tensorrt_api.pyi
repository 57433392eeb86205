"""What `builder_process.py` uses of TensorRT and TensorRT for RTX.

Written by scripts/record_tensorrt_api.py; do not edit. `Module` is either product's module.
"""

from collections.abc import Mapping
from typing import Any

class Builder:
    def __init__(self, *args: Any) -> None: ...
    def build_serialized_network(self, network: Any, config: Any) -> IHostMemory | None: ...
    def create_builder_config(self) -> IBuilderConfig: ...
    def create_network(self, flags: Any) -> INetworkDefinition: ...
    def create_optimization_profile(self) -> IOptimizationProfile: ...

class BuilderFlag:
    __members__: Mapping[str, BuilderFlag]
    def __int__(self) -> int: ...
    REFIT: BuilderFlag
    VERSION_COMPATIBLE: BuilderFlag

class ComputeCapability:
    __members__: Mapping[str, ComputeCapability]
    def __int__(self) -> int: ...

class IBuilderConfig:
    def __init__(self, *args: Any) -> None: ...
    def add_optimization_profile(self, profile: Any) -> int: ...
    builder_optimization_level: Any
    def create_timing_cache(self, serialized_timing_cache: Any) -> ITimingCache: ...
    def get_timing_cache(self) -> ITimingCache: ...
    num_compute_capabilities: Any
    profiling_verbosity: Any
    progress_monitor: Any
    def set_compute_capability(self, compute_capability: Any, index: Any) -> bool: ...
    def set_flag(self, flag: Any) -> None: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: Any) -> None: ...
    def set_timing_cache(self, cache: Any, ignore_mismatch: Any) -> bool: ...

class IHostMemory:
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __init__(self, *args: Any) -> None: ...

class ILogger:
    def __init__(self, *args: Any) -> None: ...
    def log(self, severity: Any, msg: Any) -> None: ...

class INetworkDefinition:
    def __init__(self, *args: Any) -> None: ...
    name: Any

class IOptimizationProfile:
    def __init__(self, *args: Any) -> None: ...
    def set_shape(self, input: Any, min: Any, opt: Any, max: Any) -> None: ...

class IProgressMonitor:
    def __init__(self, *args: Any) -> None: ...
    def phase_finish(self, phase_name: Any) -> None: ...
    def phase_start(self, phase_name: Any, parent_phase: Any, num_steps: Any) -> None: ...
    def step_complete(self, phase_name: Any, step: Any) -> bool: ...

class ITimingCache:
    def __init__(self, *args: Any) -> None: ...
    def serialize(self) -> IHostMemory: ...

class MemoryPoolType:
    __members__: Mapping[str, MemoryPoolType]
    def __int__(self) -> int: ...
    WORKSPACE: MemoryPoolType

class NetworkDefinitionCreationFlag:
    __members__: Mapping[str, NetworkDefinitionCreationFlag]
    def __int__(self) -> int: ...
    STRONGLY_TYPED: NetworkDefinitionCreationFlag

class OnnxParser:
    def __init__(self, *args: Any) -> None: ...
    def get_error(self, index: Any) -> Any: ...
    num_errors: Any
    def parse_from_file(self, model: Any) -> bool: ...
    def set_flag(self, flag: Any) -> None: ...

class ProfilingVerbosity:
    __members__: Mapping[str, ProfilingVerbosity]
    def __int__(self) -> int: ...
    DETAILED: ProfilingVerbosity

_Builder = Builder
_BuilderFlag = BuilderFlag
_ComputeCapability = ComputeCapability
_IBuilderConfig = IBuilderConfig
_IHostMemory = IHostMemory
_ILogger = ILogger
_INetworkDefinition = INetworkDefinition
_IOptimizationProfile = IOptimizationProfile
_IProgressMonitor = IProgressMonitor
_ITimingCache = ITimingCache
_MemoryPoolType = MemoryPoolType
_NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
_OnnxParser = OnnxParser
_ProfilingVerbosity = ProfilingVerbosity

class Module:
    __version__: str
    Builder: type[_Builder]
    BuilderFlag: type[_BuilderFlag]
    ComputeCapability: type[_ComputeCapability]
    IBuilderConfig: type[_IBuilderConfig]
    IHostMemory: type[_IHostMemory]
    ILogger: type[_ILogger]
    INetworkDefinition: type[_INetworkDefinition]
    IOptimizationProfile: type[_IOptimizationProfile]
    IProgressMonitor: type[_IProgressMonitor]
    ITimingCache: type[_ITimingCache]
    MemoryPoolType: type[_MemoryPoolType]
    NetworkDefinitionCreationFlag: type[_NetworkDefinitionCreationFlag]
    OnnxParser: type[_OnnxParser]
    ProfilingVerbosity: type[_ProfilingVerbosity]
