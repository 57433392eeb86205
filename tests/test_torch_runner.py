"""The PyTorch backend."""

from __future__ import annotations

import copy

import pytest
import torch
from quantized_fixture import fed

from ditas_export.dit.model import DiT
from ditas_export.errors import RunnerError
from ditas_export.fast_matmul import fast_float32_matmul, onednn_keeps_float32
from ditas_export.runtime.torch_runner import TorchRunner

INPUTS = (torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10]))


def test_it_is_the_model_without_gradients(tiny_dit: DiT) -> None:
    with fast_float32_matmul():  # the sums' order, not their rounding
        expected = tiny_dit(*INPUTS)
    model = copy.deepcopy(tiny_dit).train().requires_grad_(requires_grad=True)
    with TorchRunner(model) as runner:
        out = runner(fed(*INPUTS))
    assert torch.equal(out, expected)
    assert not out.requires_grad
    assert runner.config == tiny_dit.config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_float_types_stay_inside(tiny_dit: DiT, dtype: torch.dtype) -> None:
    expected = tiny_dit(*INPUTS)
    out = TorchRunner(copy.deepcopy(tiny_dit).to(dtype))(fed(*INPUTS))
    assert out.dtype == torch.float32
    bound = 0.05 if dtype == torch.bfloat16 else 1e-5  # 8-bit mantissas; float32 rounding
    assert float((out - expected).norm() / expected.norm()) < bound


@pytest.mark.skipif(not onednn_keeps_float32(), reason="oneDNN rounds float32, or is not there")
@pytest.mark.parametrize(("dtype", "by_onednn"), [(torch.float32, True), (torch.float64, False)])
def test_float32_products_alone_are_made_by_onednn(
    tiny_dit: DiT, dtype: torch.dtype, by_onednn: bool
) -> None:
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    inside: list[str] = []
    model = copy.deepcopy(tiny_dit).to(dtype)
    model.final_layer.register_forward_hook(lambda *_: inside.append(setting.fp32_precision))
    TorchRunner(model)(fed(*INPUTS))
    assert inside == ["bf16" if by_onednn else before]
    assert setting.fp32_precision == before != "bf16"


def test_the_digits_of_float32_are_kept(tiny_dit: DiT) -> None:
    exact = copy.deepcopy(tiny_dit).double()(INPUTS[0].double(), *INPUTS[1:])
    out = TorchRunner(copy.deepcopy(tiny_dit))(fed(*INPUTS))
    # float32 rounding of some ten layers; products rounded to bfloat16 are off by 1e-3 and more.
    assert float((out - exact).norm() / exact.norm()) < 1e-5


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
    out = TorchRunner(copy.deepcopy(tiny_dit), device="cuda")(fed(*INPUTS))
    assert out.device.type == "cpu"
    # TF32, 2⁻¹¹, is off by default for matrix products, and on for the patches' convolution.
    assert float((out - expected).norm() / expected.norm()) < 1e-3
