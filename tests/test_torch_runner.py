"""The PyTorch backend."""

from __future__ import annotations

import copy

import pytest
import torch

from ditas_export.dit.model import DiT
from ditas_export.errors import RunnerError
from ditas_export.runtime.torch_runner import TorchRunner

INPUTS = (torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10]))


def test_it_is_the_model_without_gradients(tiny_dit: DiT) -> None:
    expected = tiny_dit(*INPUTS)
    model = copy.deepcopy(tiny_dit).train().requires_grad_(requires_grad=True)
    with TorchRunner(model) as runner:
        out = runner(*INPUTS)
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert runner.config == tiny_dit.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_float_types_stay_inside(tiny_dit: DiT, dtype: torch.dtype) -> None:
    expected = tiny_dit(*INPUTS)
    out = TorchRunner(copy.deepcopy(tiny_dit).to(dtype))(*INPUTS)
    assert out.dtype == torch.float32
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5  # 8-bit mantissas; float32 rounding
    assert float((out - expected).norm() / expected.norm()) < bound


def test_description_names_backend_device_and_type(tiny_dit: DiT) -> None:
    description = TorchRunner(tiny_dit).description
    assert description == f"PyTorch {torch.__version__} on cpu, float32"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(tiny_dit: DiT) -> None:
    with pytest.raises(RunnerError, match=r"device cuda was asked for, but .* sees no CUDA GPU"):
        TorchRunner(tiny_dit, device="cuda")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers(tiny_dit: DiT) -> None:
    expected = tiny_dit(*INPUTS)
    out = TorchRunner(copy.deepcopy(tiny_dit), device="cuda")(*INPUTS)
    assert out.device.type == "cpu"
    # TF32 is off by default for matrix products; sums run in another order.
    assert float((out - expected).norm() / expected.norm()) < 1e-4
