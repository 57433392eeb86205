"""A plan that `ditas-build` wrote, run on a GPU by TensorRT or TensorRT for RTX.

The first call with a batch size sets it up: buffers, a context bound to them, a CUDA graph. Later
calls copy the inputs into the buffers, launch, and copy the output out, all on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ditas_export.artifact_files import sha256_of_file
from ditas_export.diffusion.runner import Closing
from ditas_export.dit.model import DiTConfig
from ditas_export.engine.metadata import EngineMetadata, metadata_path, require_matching
from ditas_export.engine.products import PRODUCTS
from ditas_export.errors import RunnerError
from ditas_export.runtime.cache import Cache, Key
from ditas_export.runtime.cuda_stream import CudaStream
from ditas_export.runtime.inputs import require_fitting
from ditas_export.runtime.tensorrt_plan import (
    LoadedPlan,
    batch_sizes,
    bound_context,
    compiled_kernels,
    enqueue,
    layer_information,
    load_plan,
    load_product,
)

if TYPE_CHECKING:
    from ditas_export.engine.tensorrt_api import Module

OUTPUT = "model_output"

_KERNELS_NAME = "kernels"
"""The file in a cache entry that holds what TensorRT for RTX compiled."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedBatch:
    """One batch size, ready: its memory, and what runs the engine on it."""

    inputs: Mapping[str, Tensor]  # latents, timesteps, class_labels
    output: Tensor  # written by every launch
    launch: Callable[[], None]

    def fill(self, **inputs: Tensor) -> None:
        """Copy inputs in; the host does not wait, unless it could change the memory meanwhile."""
        for name, buffer in self.inputs.items():
            buffer.copy_(inputs[name], non_blocking=not inputs[name].is_pinned())


class TensorRTRunner(Closing):
    """Runs a plan on a GPU; its memory lives until the runner is closed.

    Every batch size has a context and buffers of its own, set up when it is first met.

    Args:
        plan: written by `ditas-build`, its metadata beside it.
        device: "cuda:N".
        cache: folder that keeps the kernels which TensorRT for RTX compiles for this GPU; None
            compiles them at every start.

    Raises:
        RunnerError: there is no such plan or GPU, or the product does not take the plan.
        EngineError: the product is not installed, or the plan is for another product, version or
            GPU, or is not the one that its metadata describe.
    """

    def __init__(self, plan: Path, *, device: str = "cuda:0", cache: Path | None = None) -> None:
        if not plan.is_file():
            raise RunnerError(f"there is no file {plan}; build it with ditas-build")
        metadata = EngineMetadata.load(metadata_path(plan))
        product = PRODUCTS[metadata.product]
        product.require_installed()
        self._stream = CudaStream(device)
        self._trt: Module = load_product(product)
        gpu, version = self._stream.gpu, self._trt.__version__
        self._cache = None if cache is None else Cache.at(cache)
        require_matching(
            metadata,
            plan,
            product=product.name,
            version=version,
            gpu=gpu,
            hash_file=sha256_of_file if self._cache is None else self._cache.hash_of_file,
        )
        self._config = metadata.dit
        self._title = f"{product.title} {version}"
        self._gpu_name = gpu.name
        self._key = Key(
            kind="kernels",
            source=plan,
            sha256=metadata.plan_sha256,
            facts={"product": self._title, "gpu": [gpu.name, gpu.compute_capability]},
            hash_source=lambda: sha256_of_file(plan),
        )
        self._batches: dict[int, PreparedBatch] = {}
        with self._stream.ordered():
            self._plan: LoadedPlan | None = load_plan(
                self._trt, plan.read_bytes(), title=self._title, kernels=self._kept_kernels()
            )
        self._smallest, self._largest = batch_sizes(self._plan.engine)

    @property
    def config(self) -> DiTConfig:
        """Shape of the model behind the runner."""
        return self._config

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._stream.device

    @property
    def description(self) -> str:
        """Product, version and GPU."""
        return f"{self._title} ({self._gpu_name})"

    def layer_information(self) -> str:
        """Return the engine inspector's JSON.

        Raises:
            RunnerError: the runner is closed.
        """
        return layer_information(self._trt, self._open_plan().engine)

    def __call__(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Return ε and the learned variance, (N, 2C, H, W) float32 on the latents' device.

        Labels that lie on a GPU are not read back to check their range.

        Raises:
            RunnerError: inputs that do not fit the model, a batch that the plan was not built for,
                a closed runner, or an error that the product reports.
        """
        loaded = self._open_plan()
        require_fitting(self._config, latents, timesteps, class_labels)
        self._require_batch(len(latents))
        with self._stream.ordered():
            batch = self._prepared(loaded, len(latents))
            batch.fill(latents=latents, timesteps=timesteps, class_labels=class_labels)
            batch.launch()
        return batch.output.to(latents.device, copy=True)

    def _open_plan(self) -> LoadedPlan:
        """Return the plan; RunnerError once the runner is closed."""
        if self._plan is None:
            raise RunnerError("this runner is closed; open the plan again")
        return self._plan

    def _require_batch(self, rows: int) -> None:
        """Refuse a batch that the plan has no shapes for."""
        if not self._smallest <= rows <= self._largest:
            raise RunnerError(
                f"a batch of {rows} rows; the plan takes {self._smallest} to {self._largest} "
                f"(guidance doubles the images): change the batch, or build with ditas-build "
                f"--batch MIN,OPT,MAX"
            )

    def _prepared(self, loaded: LoadedPlan, rows: int) -> PreparedBatch:
        """Return what runs a batch size, set up and warmed up when it is first met."""
        if rows not in self._batches:
            self._batches[rows] = self._prepare(loaded, rows)
            self._keep_kernels(loaded)
        return self._batches[rows]

    def _prepare(self, loaded: LoadedPlan, rows: int) -> PreparedBatch:
        """Allocate, bind, run once, and capture where the product does not do so itself."""
        side, device = self._config.input_size, self._stream.device
        inputs = {
            "latents": torch.zeros(rows, self._config.in_channels, side, side, device=device),
            "timesteps": torch.zeros(rows, dtype=torch.int64, device=device),
            "class_labels": torch.zeros(rows, dtype=torch.int64, device=device),
        }
        output = torch.zeros(rows, self._config.out_channels, side, side, device=device)
        context = bound_context(
            loaded,
            {name: tuple(tensor.shape) for name, tensor in inputs.items()},
            {name: tensor.data_ptr() for name, tensor in (*inputs.items(), (OUTPUT, output))},
        )

        launch: Callable[[], None] = partial(enqueue, loaded, context, self._stream.handle)
        launch()
        if not loaded.captures_itself:
            launch = self._stream.capture(launch)
        return PreparedBatch(inputs=inputs, output=output, launch=launch)

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
        """Free the GPU's memory."""
        self._batches.clear()
        self._plan = None
