"""Planted outliers: the same function, harder activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ditas_export.dit.model import DiT
from ditas_export.errors import CalibrationError
from ditas_export.families.outliers import plant_outliers
from ditas_export.families.registry import linear_names


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, 4, 8, 8, generator=generator, dtype=dtype)
    return latents, torch.tensor([0, 10, 500, 999]), torch.tensor([0, 3, 9, 10])


def _relative(ours: Tensor, expected: Tensor) -> float:
    return float((ours - expected).norm() / expected.norm())


def test_the_function_is_unchanged_in_float64(tiny_dit: DiT) -> None:
    model = tiny_dit.double()
    inputs = _inputs(torch.float64)
    planted = plant_outliers(model, channels=5, gain=(20.0, 60.0), seed=3)
    # Exact in real arithmetic; a few roundings of 1e-16 per layer remain.
    assert _relative(planted(*inputs), model(*inputs)) < 1e-13


def test_the_function_is_unchanged_in_float32_to_rounding(tiny_dit: DiT) -> None:
    inputs = _inputs(torch.float32)
    assert _relative(plant_outliers(tiny_dit)(*inputs), tiny_dit(*inputs)) < 1e-5


def test_inputs_of_linears_grow_by_the_gains_in_the_chosen_channels(tiny_dit: DiT) -> None:
    model = tiny_dit.double()
    before = _channel_maxima(model)
    after = _channel_maxima(plant_outliers(model, channels=3, gain=(30.0, 30.0)))
    for name in linear_names(model.config):
        growth = after[name] / before[name]
        grown = growth > 2
        assert int(grown.sum()) == (0 if name.endswith("mlp.fc2") else 3), name
        # The same function, so every other value agrees to float64 rounding.
        expected = torch.where(grown, 30.0, 1.0).double()
        torch.testing.assert_close(growth, expected, rtol=1e-9, atol=0)


def _channel_maxima(model: DiT) -> dict[str, Tensor]:
    maxima: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        maxima[name] = x.abs().flatten(0, -2).amax(0)

    hooks = []
    for name in linear_names(model.config):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        hooks.append(
            linear.register_forward_pre_hook(lambda _, args, name=name: keep(name, args[0]))
        )
    model(*_inputs(torch.float64))
    for hook in hooks:
        hook.remove()
    return maxima


def test_the_model_is_left_alone_and_the_seed_decides(tiny_dit: DiT) -> None:
    before = copy.deepcopy(tiny_dit.state_dict())
    first, again, other = (plant_outliers(tiny_dit, seed=seed) for seed in (1, 1, 2))
    for name, tensor in tiny_dit.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert torch.equal(first.state_dict()[name], again.state_dict()[name]), name
    assert not torch.equal(first.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)


def test_no_channel_means_no_change(tiny_dit: DiT) -> None:
    planted = plant_outliers(tiny_dit, channels=0)
    for name, tensor in planted.state_dict().items():
        assert torch.equal(tensor, tiny_dit.state_dict()[name]), name


def test_too_many_channels_are_refused(tiny_dit: DiT) -> None:
    with pytest.raises(CalibrationError, match="cannot plant 49 outliers in 48 channels"):
        plant_outliers(tiny_dit, channels=49)


@pytest.mark.parametrize("gain", [(0.0, 1.0), (5.0, 2.0), (1.0, float("inf"))])
def test_gains_that_are_no_positive_range_are_refused(
    tiny_dit: DiT, gain: tuple[float, float]
) -> None:
    with pytest.raises(CalibrationError, match="is no range of positive numbers"):
        plant_outliers(tiny_dit, gain=gain)
