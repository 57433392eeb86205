"""A plan that `ditas-build` wrote, run on a GPU by TensorRT or TensorRT for RTX.

The first call with a batch size sets it up: buffers, a context bound to them, a CUDA graph. Later
calls copy the inputs into the buffers, launch, and copy the output out, all on the GPU. Where
inputs have other dynamic dimensions than the batch, each of their sizes is set up as well.

All work is on one stream, one call after another. So the contexts of all batch sizes can have one
block of memory for their activations, that of the largest batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditas_export.artifact_files import sha256_of_file
from ditas_export.engine.metadata import metadata_of, require_matching
from ditas_export.engine.products import PRODUCTS
from ditas_export.errors import RunnerError
from ditas_export.families.base import ModelInputs, output_shape
from ditas_export.families.registry import family_of
from ditas_export.paths import StrPath
from ditas_export.runtime.cache import Cache, Key
from ditas_export.runtime.checked_runner import CheckedRunner
from ditas_export.runtime.cuda_stream import CudaStream
from ditas_export.runtime.tensorrt_plan import (
    Block,
    LoadedPlan,
    block_bytes,
    bound_context,
    compiled_kernels,
    enqueue,
    extreme_shapes,
    layer_information,
    load_plan,
    load_product,
)

if TYPE_CHECKING:
    from ditas_export.engine.tensorrt_api import IExecutionContext

OUTPUT = "model_output"

MOST_BATCH_SIZES = 8
"""Batch sizes that stay set up; of others the one that was used longest ago makes room."""

Sizes = tuple[tuple[int, ...], ...]
"""Shapes of all inputs, in the order of the file's."""

_KERNELS_NAME = "kernels"
"""The file in a cache entry that holds what TensorRT for RTX compiled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedBatch:
    """One batch size, ready, and all that its launches use: a captured graph keeps none of it."""

    inputs: Mapping[str, Tensor]  # by the file's names
    output: Tensor  # written by every launch
    activations: Tensor  # the block, shared with other batch sizes
    context: IExecutionContext  # bound to all of these
    launch: Callable[[], None]

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Copy inputs in, launch, and return the buffer that the output will be in.

        The host waits only where it could change an input's memory meanwhile.
        """
        for name, buffer in self.inputs.items():
            buffer.copy_(inputs[name], non_blocking=not inputs[name].is_pinned())
        self.launch()
        return self.output


class TensorRTRunner(CheckedRunner):
    """Runs a plan on a GPU; its memory lives until the runner is closed.

    Every batch size has a context and buffers of its own, set up when it is first met;
    `MOST_BATCH_SIZES` of them stay. Threads take turns.

    Args:
        plan: written by `ditas-build`, its metadata beside it.
        device: "cuda:N".
        cache: folder that keeps the kernels which TensorRT for RTX compiles for this GPU; None
            compiles them at every start.

    Raises:
        RunnerError: there is no such plan or GPU, no memory for it, or the product does not take
            the plan.
        EngineError: the product is not installed, or the plan is for another product, version or
            GPU, or is not the one that its metadata describe.
    """

    def __init__(
        self, plan: StrPath, *, device: str = "cuda:0", cache: StrPath | None = None
    ) -> None:
        plan = Path(plan)
        if not plan.is_file():
            raise RunnerError(f"there is no file {plan}; build it with ditas-build")
        self._cache = None if cache is None else Cache.at(cache)
        metadata = metadata_of(
            plan, hash_file=sha256_of_file if self._cache is None else self._cache.hash_of_file
        )
        product = PRODUCTS[metadata.product]
        product.require_installed()
        self._stream = CudaStream(device)
        trt = load_product(product)
        gpu, version = self._stream.gpu, trt.__version__
        require_matching(metadata, plan, product=product.name, version=version, gpu=gpu)
        super().__init__(metadata.model, one_at_a_time=True)
        self._title = f"{product.title} {version}"
        self._key = Key(
            kind="kernels",
            source=plan,
            sha256=metadata.plan_sha256,
            facts={"product": self._title, "gpu": [gpu.name, gpu.compute_capability]},
            hash_source=lambda: sha256_of_file(plan),
        )
        self._inputs = family_of(metadata.model).inputs(metadata.model)
        self._batches: OrderedDict[Sizes, PreparedBatch] = OrderedDict()  # used last, last
        with self._stream.faults_as_errors(), self._stream.ordered():
            loaded = load_plan(
                trt,
                plan.read_bytes(),
                title=self._title,
                kernels=self._kept_kernels(),
                trusts_code=metadata.options.version_compatible,
            )
            size = block_bytes(loaded.engine)
            self._block = torch.empty(size, dtype=torch.uint8, device=self._stream.device)
        extremes = [extreme_shapes(loaded.engine, each.name) for each in self._inputs]
        self._smallest: Sizes = tuple(smallest for smallest, _ in extremes)
        self._largest: Sizes = tuple(largest for _, largest in extremes)
        self._backend: LoadedPlan | None = loaded

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._stream.device

    @property
    def description(self) -> str:
        """Product, version and GPU."""
        return f"{self._title} ({self._stream.gpu.name})"

    def layer_information(self) -> str:
        """Return the engine inspector's JSON, for the batch size used last or else the smallest.

        Raises:
            RunnerError: the runner is closed, or an error that the product reports.
        """
        with self._turn, self._stream.faults_as_errors(), self._stream.ordered():
            loaded: LoadedPlan = self._open_backend()
            sizes = next(reversed(self._batches), self._smallest)
            return layer_information(loaded, self._prepared(loaded, sizes).context)

    def _infer(self, backend: LoadedPlan, inputs: ModelInputs) -> Tensor:
        """Return the output, in memory of the caller's stream that nothing writes to again.

        Raises:
            RunnerError: a batch that the plan was not built for, an error that the product reports,
                or a fault of the GPU.
        """
        sizes = tuple(tuple(tensor.shape) for tensor in inputs.values())
        self._require_sizes(sizes)
        with self._stream.faults_as_errors():
            latents = inputs.latents
            shape = (len(latents), *output_shape(self._config))
            answer = torch.empty(shape, device=latents.device)
            with self._stream.ordered():
                answer.copy_(self._prepared(backend, sizes).run(inputs))
            return answer

    def _require_sizes(self, sizes: Sizes) -> None:
        """Refuse a batch, or another dynamic dimension, that the plan has no shapes for."""
        smallest, rows, largest = self._smallest[0][0], sizes[0][0], self._largest[0][0]
        if not smallest <= rows <= largest:
            raise RunnerError(
                f"a batch of {rows} rows; the plan takes {smallest} to {largest} "
                f"(guidance doubles the images): change the batch, or build with ditas-build "
                f"--batch MIN,OPT,MAX"
            )
        for each, least, found, most in zip(
            self._inputs, self._smallest, sizes, self._largest, strict=True
        ):
            for name, *bounds in zip(each.shape, least[1:], found[1:], most[1:], strict=True):
                if not bounds[0] <= bounds[1] <= bounds[2]:
                    raise RunnerError(
                        f"{each.name} has {bounds[1]} {name}; the plan takes {bounds[0]} to "
                        f"{bounds[2]}"
                    )

    def _prepared(self, loaded: LoadedPlan, sizes: Sizes) -> PreparedBatch:
        """Return what runs inputs of some sizes, set up and warmed up when they are first met."""
        if sizes not in self._batches:
            while len(self._batches) >= MOST_BATCH_SIZES:
                self._stream.finish()  # a launch of it may be under way
                self._batches.popitem(last=False)
            self._batches[sizes] = self._prepare(loaded, sizes)
            self._keep_kernels(loaded)
        self._batches.move_to_end(sizes)
        return self._batches[sizes]

    def _prepare(self, loaded: LoadedPlan, sizes: Sizes) -> PreparedBatch:
        """Allocate, bind, run once, and capture where the product does not do so itself."""
        device, rows = self._stream.device, sizes[0][0]
        inputs = {
            each.name: torch.zeros(shape, dtype=each.dtype, device=device)
            for each, shape in zip(self._inputs, sizes, strict=True)
        }
        output = torch.zeros(rows, *output_shape(self._config), device=device)
        context = bound_context(
            loaded,
            {name: tuple(tensor.shape) for name, tensor in inputs.items()},
            {name: tensor.data_ptr() for name, tensor in (*inputs.items(), (OUTPUT, output))},
            Block(address=self._block.data_ptr(), size=self._block.numel()),
        )

        launch: Callable[[], None] = partial(enqueue, loaded, context, self._stream.handle)
        launch()
        if not loaded.captures_itself:
            launch = self._stream.capture(launch)
        return PreparedBatch(
            inputs=inputs,
            output=output,
            activations=self._block,
            context=context,
            launch=launch,
        )

    def _kept_kernels(self) -> bytes:
        """Return what TensorRT for RTX compiled in an earlier run, nothing if that is not kept."""
        entry = self._cache and self._cache.find(self._key)
        if not entry:
            return b""
        with entry:
            return (entry.path / _KERNELS_NAME).read_bytes()

    def _keep_kernels(self, loaded: LoadedPlan) -> None:
        """Keep what TensorRT for RTX has compiled so far."""
        if self._cache is not None and loaded.kernels is not None:
            kernels = compiled_kernels(loaded.kernels)
            self._cache.renew(
                self._key, lambda folder: (folder / _KERNELS_NAME).write_bytes(kernels)
            )

    def close(self) -> None:
        """Free the GPU's memory, once nothing uses it."""
        with self._turn:
            if self._backend is None:
                return
            try:
                with self._stream.faults_as_errors():
                    self._stream.finish()
            finally:
                self._batches.clear()
                self._block = torch.empty(0)
                self._backend = None
