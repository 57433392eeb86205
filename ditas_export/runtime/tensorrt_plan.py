"""A plan in TensorRT or TensorRT for RTX: deserialized, bound to memory, enqueued. No torch here.

TensorRT for RTX compiles kernels when it meets a batch size. It is told to compile them at once:
by default it answers with stand-ins meanwhile, and the bytes of an image would depend on timing.
It also captures CUDA graphs by itself; a capture from outside would keep the stand-ins for good.
"""

from __future__ import annotations

import importlib
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

LATENTS = "latents"
"""The input whose profile tells the batch sizes."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedPlan:
    """A deserialized plan, and all that has to live as long."""

    title: str  # product and version
    runtime: Runtime
    engine: ICudaEngine
    config: IRuntimeConfig | None  # of TensorRT for RTX
    kernels: IRuntimeCache | None  # what TensorRT for RTX compiled, or was given
    errors: list[str]  # what the product has reported and nobody has raised yet

    @property
    def captures_itself(self) -> bool:
        """Whether the product captures CUDA graphs inside `execute_async_v3`."""
        return self.config is not None


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


def load_plan(trt: Module, plan: bytes, *, title: str, kernels: bytes) -> LoadedPlan:
    """Deserialize a plan on the current CUDA device.

    Args:
        trt: the product's module.
        plan: what the builder wrote.
        title: names the product in errors.
        kernels: of an earlier run, as `compiled_kernels` gave them; empty if there are none. The
            product leaves those of another GPU, driver or version aside.

    Raises:
        RunnerError: the product does not take the plan; with its reason.
    """
    errors: list[str] = []
    with _reported(title, errors):
        runtime = trt.Runtime(_logger(trt, errors))
        runtime.error_recorder = _recorder(trt, errors)
        engine = _engine(runtime, plan)
        if engine is None:
            raise RunnerError(f"{title} does not take the plan: {_reason(errors)}")
    config, cache = _rtx_settings(trt, engine, kernels)
    errors.clear()  # of kernels that were left aside
    return LoadedPlan(
        title=title, runtime=runtime, engine=engine, config=config, kernels=cache, errors=errors
    )


def batch_sizes(engine: ICudaEngine) -> tuple[int, int]:
    """Return the smallest and the largest batch that an engine was built for."""
    smallest, _, largest = engine.get_tensor_profile_shape(LATENTS, 0)
    return smallest[0], largest[0]


def bound_context(
    loaded: LoadedPlan, inputs: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
) -> IExecutionContext:
    """Return a context for one batch size, its tensors at fixed addresses.

    Args:
        loaded: the plan.
        inputs: shape of every input.
        addresses: of every input and output, in the GPU's memory.

    Raises:
        RunnerError: the product refuses a shape or an address; with its reason.
    """
    with _reported(loaded.title, loaded.errors):
        context = _new_context(loaded.engine, loaded.config)
        done = context is not None and _bind(context, inputs, addresses)
        if context is None or not done:
            raise RunnerError(
                f"{loaded.title} cannot prepare a batch of {inputs[LATENTS][0]}: "
                f"{_reason(loaded.errors)}"
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


def layer_information(trt: Module, engine: ICudaEngine) -> str:
    """Return the engine inspector's JSON."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _engine(runtime: Runtime, plan: bytes) -> ICudaEngine | None:
    """Deserialize a plan, None if the product refuses it."""
    return cast("ICudaEngine | None", runtime.deserialize_cuda_engine(plan))


def _rtx_settings(
    trt: Module, engine: ICudaEngine, kernels: bytes
) -> tuple[IRuntimeConfig, IRuntimeCache] | tuple[None, None]:
    """Return how TensorRT for RTX is to run an engine; TensorRT has none of it."""
    if not hasattr(trt, "IRuntimeCache"):
        return None, None
    config = engine.create_runtime_config()
    config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    strategies = trt.DynamicShapesKernelSpecializationStrategy
    config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
    cache = config.create_runtime_cache()
    if kernels:
        cache.deserialize(kernels)
    config.set_runtime_cache(cache)
    return config, cache


def _new_context(engine: ICudaEngine, config: IRuntimeConfig | None) -> IExecutionContext | None:
    """Return a context, None if there is no memory for it."""
    if config is None:
        return engine.create_execution_context()
    return engine.create_execution_context(config)


def _bind(
    context: IExecutionContext, inputs: Mapping[str, tuple[int, ...]], addresses: Mapping[str, int]
) -> bool:
    """Set shapes and addresses; return whether the product takes all of them."""
    shaped = [context.set_input_shape(name, shape) for name, shape in inputs.items()]
    placed = [context.set_tensor_address(name, address) for name, address in addresses.items()]
    return all(shaped + placed)


def _execute(context: IExecutionContext, stream: int) -> bool:
    """Enqueue a context; return whether the product took it."""
    return context.execute_async_v3(stream)


@contextmanager
def _reported(title: str, errors: list[str]) -> Iterator[None]:
    """Raise RunnerError for what the product reports or the bindings raise inside."""
    errors.clear()
    try:
        yield
    except RunnerError:
        raise
    except Exception as error:  # whatever the bindings raise is their refusal
        raise RunnerError(f"{title} failed: {_reason([*errors, str(error)])}") from error
    if errors:
        raise RunnerError(f"{title} reports: {_reason(errors)}")


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
