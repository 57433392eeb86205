"""A plan in TensorRT or TensorRT for RTX: deserialized, bound to memory, enqueued. No torch here.

TensorRT for RTX compiles kernels when it meets a batch size. It is told to compile them at once:
by default it answers with stand-ins meanwhile, and the bytes of an image would depend on timing.
It also captures CUDA graphs by itself; a capture from outside would keep the stand-ins for good.

A context has no memory of its own for activations: it is given a block, and contexts that run one
after another on one stream share it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ditas_export.engine.products import Product
from ditas_export.errors import RunnerError

if TYPE_CHECKING:
    from ditas_export.engine.tensorrt_api import (
        ICudaEngine,
        IErrorRecorder,
        IExecutionContext,
        ILogger,
        IRuntimeCache,
        IRuntimeConfig,
        Module,
        Runtime,
    )

SMALLEST_BLOCK = 256
"""Bytes: what a product aligns memory to; an engine that needs none is given so much."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedPlan:
    """A deserialized plan, and all that has to live as long."""

    title: str  # product and version
    trt: Module
    runtime: Runtime
    engine: ICudaEngine
    config: IRuntimeConfig | None  # of TensorRT for RTX
    kernels: IRuntimeCache | None  # what TensorRT for RTX compiled, or was given
    errors: list[str]  # what the product has reported and nobody has raised yet

    @property
    def captures_itself(self) -> bool:
        """Whether the product captures CUDA graphs inside `execute_async_v3`."""
        return self.config is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Memory on the GPU: an address, aligned to 256 bytes, and a size."""

    address: int
    size: int


def load_product(product: Product) -> Module:
    """Import a product.

    Raises:
        EngineError: it is not installed.
        RunnerError: its libraries do not load.
    """
    product.require_installed()
    try:
        return cast("Module", importlib.import_module(product.module))
    except (ImportError, OSError) as error:
        raise RunnerError(
            f"the libraries of {product.title} do not load ({error}); install it again"
        ) from error


def load_plan(
    trt: Module, plan: bytes, *, title: str, kernels: bytes, trusts_code: bool = False
) -> LoadedPlan:
    """Deserialize a plan on the current CUDA device.

    Args:
        trt: the product's module.
        plan: what the builder wrote.
        title: names the product in errors.
        kernels: of an earlier run, as `compiled_kernels` gave them; empty if there are none. Those
            of another GPU, driver or version are left aside, with a warning.
        trusts_code: run the code that a version-compatible plan carries: a runtime of its own.

    Raises:
        RunnerError: the product does not take the plan; with its reason.
    """
    errors: list[str] = []
    with _reported(title, errors):
        runtime = _runtime(trt, errors, trusts_code=trusts_code)
        engine = _engine(runtime, plan)
        if engine is None:
            raise RunnerError(f"{title} does not take the plan: {_reason(errors)}")
    with _reported(title, errors):
        config, cache = _rtx_settings(trt, engine, kernels, title)
        errors.clear()  # of kernels that were left aside, as was said
    return LoadedPlan(
        title=title,
        trt=trt,
        runtime=runtime,
        engine=engine,
        config=config,
        kernels=cache,
        errors=errors,
    )


def extreme_shapes(engine: ICudaEngine, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the smallest and the largest shape of an input that an engine was built for."""
    smallest, _, largest = engine.get_tensor_profile_shape(name, 0)
    return tuple(smallest), tuple(largest)


def block_bytes(engine: ICudaEngine) -> int:
    """Return the size of a block that the activations of any batch fit in."""
    return max(int(engine.device_memory_size_v2), SMALLEST_BLOCK)


def bound_context(
    loaded: LoadedPlan,
    inputs: Mapping[str, tuple[int, ...]],
    addresses: Mapping[str, int],
    block: Block,
) -> IExecutionContext:
    """Return a context for one shape of every input, its tensors at fixed addresses.

    Args:
        loaded: the plan.
        inputs: shape of every input.
        addresses: of every input and output, in the GPU's memory.
        block: for the activations, of `block_bytes(engine)`; contexts that never run at the same
            time may have the same.

    Raises:
        RunnerError: the product refuses a shape or an address; with its reason.
    """
    with _reported(loaded.title, loaded.errors):
        context = _new_context(loaded.trt, loaded.engine, loaded.config)
        done = context is not None and _bind(context, inputs, addresses, block)
        if context is None or not done:
            rows = next(iter(inputs.values()))[0]
            raise RunnerError(
                f"{loaded.title} cannot prepare a batch of {rows}: {_reason(loaded.errors)}"
            )
        return context


def enqueue(loaded: LoadedPlan, context: IExecutionContext, stream: int) -> None:
    """Enqueue the engine on a CUDA stream.

    Raises:
        RunnerError: the product reports an error.
    """
    with _reported(loaded.title, loaded.errors):
        if not _execute(context, stream):
            raise RunnerError(f"{loaded.title} failed: {_reason(loaded.errors)}")


def compiled_kernels(cache: IRuntimeCache) -> bytes:
    """Return the kernels that were compiled so far, for the next start."""
    return bytes(cache.serialize())


def layer_information(loaded: LoadedPlan, context: IExecutionContext) -> str:
    """Return the engine inspector's JSON.

    Args:
        loaded: the plan.
        context: one whose shapes are set; without it types that depend on shapes are not told.

    Raises:
        RunnerError: the product reports an error.
    """
    with _reported(loaded.title, loaded.errors):
        return _inspect(loaded.trt, loaded.engine, context)


def _runtime(trt: Module, errors: list[str], *, trusts_code: bool) -> Runtime:
    """Return a runtime that keeps its errors in a list of ours."""
    runtime = trt.Runtime(_logger(trt, errors))
    runtime.error_recorder = _recorder(trt, errors)
    if trusts_code:
        runtime.engine_host_code_allowed = True
    return runtime


def _engine(runtime: Runtime, plan: bytes) -> ICudaEngine | None:
    """Deserialize a plan, None if the product refuses it."""
    return cast("ICudaEngine | None", runtime.deserialize_cuda_engine(plan))


def _rtx_settings(
    trt: Module, engine: ICudaEngine, kernels: bytes, title: str
) -> tuple[IRuntimeConfig, IRuntimeCache | None] | tuple[None, None]:
    """Return how TensorRT for RTX is to run an engine; TensorRT has none of it."""
    if not hasattr(trt, "IRuntimeCache"):
        return None, None
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(
        trt.ExecutionContextAllocationStrategy.USER_MANAGED
    )
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    cache = config.create_runtime_cache()
    if kernels and not cache.deserialize(kernels):
        _warn(f"{title} leaves the kept kernels aside (another GPU or driver) and compiles anew")
    if not config.set_runtime_cache(cache):
        _warn(f"{title} keeps no kernels here: it will compile them at every start")
        return config, None
    return config, cache


def _new_context(
    trt: Module, engine: ICudaEngine, config: IRuntimeConfig | None
) -> IExecutionContext | None:
    """Return a context without memory for activations; None if there is no room for it."""
    if config is not None:
        return engine.create_execution_context(config)
    return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)


def _bind(
    context: IExecutionContext,
    inputs: Mapping[str, tuple[int, ...]],
    addresses: Mapping[str, int],
    block: Block,
) -> bool:
    """Set memory, shapes and addresses; return whether the product takes all of them."""
    context.set_device_memory(block.address, block.size)
    shaped = [context.set_input_shape(name, shape) for name, shape in inputs.items()]
    placed = [context.set_tensor_address(name, address) for name, address in addresses.items()]
    return all(shaped + placed)


def _execute(context: IExecutionContext, stream: int) -> bool:
    """Enqueue a context; return whether the product took it."""
    return context.execute_async_v3(stream)


def _inspect(trt: Module, engine: ICudaEngine, context: IExecutionContext) -> str:
    """Ask the inspector of an engine, under the shapes of a context."""
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


@contextmanager
def _reported(title: str, errors: list[str]) -> Iterator[None]:
    """Give the reason of a RunnerError inside, raise one for what the bindings raise, else warn.

    What is reported in a call that succeeded is no failure of it.
    """
    errors.clear()
    try:
        yield
    except RunnerError:
        raise
    except Exception as error:  # whatever the bindings raise is their refusal
        raise RunnerError(f"{title} failed: {_reason([*errors, str(error)])}") from error
    if errors:
        _warn(f"{title} reports, and goes on: {_reason(errors)}")


def _warn(message: str) -> None:
    """Tell what does no harm to the numbers."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _reason(errors: list[str]) -> str:
    """Return the first line of what was reported first; what follows are its consequences."""
    lines = errors[0].strip().splitlines() if errors else []
    return lines[0] if lines else "it gave no reason"


def _logger(trt: Module, errors: list[str]) -> ILogger:
    """Return a logger that keeps errors and drops the rest."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # which module, is only known now
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                errors.append(msg)

    return Logger()


def _recorder(trt: Module, errors: list[str]) -> IErrorRecorder:
    """Return an error recorder that keeps what it is told in a list of ours."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self._told: list[tuple[Any, str]] = []

        def report_error(self, code: Any, description: str) -> bool:
            self._told.append((code, description))
            errors.append(description)
            return False  # the call that failed says whether it is fatal

        def num_errors(self) -> int:
            return len(self._told)

        def get_error_code(self, index: int) -> Any:
            return self._told[index][0]

        def get_error_desc(self, index: int) -> str:
            return self._told[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self._told.clear()

    return Recorder()
