"""The reference backend: a model in PyTorch, float or fake-quantized, on CPU or GPU."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ditas_export.errors import RunnerError
from ditas_export.families.base import FamilyModel, ModelInputs
from ditas_export.families.registry import family_of
from ditas_export.fast_matmul import fast_float32_matmul
from ditas_export.runtime.checked_runner import CheckedRunner


class TorchRunner(CheckedRunner):
    """Runs a model without gradients, in the float type of its own parameters.

    The model is moved to `device` and put into evaluation mode, in place. Inputs may lie on any
    device; outputs come back as float32 on the latents' device.
    """

    def __init__(self, model: FamilyModel, *, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RunnerError(
                f"device {device} was asked for, but this PyTorch ({torch.__version__}) sees no "
                f"CUDA GPU; use --device cpu, or install a CUDA build of torch"
            )
        self.dtype = model.dtype
        super().__init__(model.config)
        self._backend = model.to(self.device).eval()

    @property
    def model(self) -> FamilyModel:
        """The model; RunnerError once the runner is closed."""
        model: FamilyModel = self._open_backend()
        return model

    @property
    def description(self) -> str:
        """Backend, version, device and float type."""
        name = str(self.dtype).removeprefix("torch.")
        return f"PyTorch {torch.__version__} on {self.device}, {name}"

    def _infer(self, backend: FamilyModel, inputs: ModelInputs) -> Tensor:
        """Run the model."""
        fed = {
            each.name: inputs[each.name].to(self.device, self.dtype if each.is_feature else None)
            for each in family_of(self._config).inputs(self._config)
        }
        float32_on_cpu = self.device.type == "cpu" and self.dtype == torch.float32
        with fast_float32_matmul() if float32_on_cpu else nullcontext():
            output: Tensor = backend(**fed)
        # A copy always: the next pass of a CUDA graph writes over what this one returned.
        return output.to(inputs.latents.device, torch.float32, copy=True)
