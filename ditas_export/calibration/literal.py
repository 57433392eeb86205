"""The published recipe with the paper's own quantizers, as PyTorch-only presets.

For comparison: what these models compute cannot be exported, because no runtime has kernels for
per-tensor asymmetric activations and weight scales along the summed dimension. Each preset comes in
two readings, `paper` as the paper states it and `published` as its code computes it, and in the
steps of the paper's ablation (Table 4).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.calibrate import WIDTH_PER_RANK
from ditas_export.calibration.methods import ALPHA_GRID, FIXED_ALPHA
from ditas_export.calibration.states import CalibrationStates
from ditas_export.diffusion.guidance import model_inputs
from ditas_export.errors import CalibrationError
from ditas_export.families.base import FamilyModel, ModelInputs
from ditas_export.families.registry import conditions_of, linear_names
from ditas_export.quantization.literal import (
    WeightQuantizer,
    alternate_lora,
    fake_quantize_input_channels,
    fake_quantize_strided_blocks,
)
from ditas_export.quantization.ranges import fake_quantize_tensor_asymmetric
from ditas_export.quantization.smoothing import channel_maxima, smoothing_scale

Grid = Literal["input-channel", "strided-blocks"]

SEARCH_TOKENS = 256
"""Tokens of each time step on which an α is judged; ranges are always of the whole tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiteralPreset:
    """Which of the paper's levers are pulled, on which weight grid."""

    name: str
    grid: Grid
    smoothing: bool = False
    alpha_search: bool = False
    low_rank: bool = False


def _ablation(name: str, grid: Grid) -> tuple[LiteralPreset, ...]:
    """Return the rows of the paper's Table 4, the full recipe last and named `name`."""
    return (
        LiteralPreset(name=f"{name}-linear", grid=grid),
        LiteralPreset(name=f"{name}-tas", grid=grid, smoothing=True),
        LiteralPreset(name=f"{name}-tas-search", grid=grid, smoothing=True, alpha_search=True),
        LiteralPreset(name=name, grid=grid, smoothing=True, alpha_search=True, low_rank=True),
    )


LITERAL_PRESETS = {
    preset.name: preset
    for preset in (*_ablation("paper", "input-channel"), *_ablation("published", "strided-blocks"))
}
"""By name; `paper-linear` is the paper's LinearQuant baseline."""


def literal_preset_named(name: str) -> LiteralPreset:
    """Return the preset `name`; CalibrationError lists the names there are."""
    try:
        return LITERAL_PRESETS[name]
    except KeyError:
        raise CalibrationError(
            f"no preset {name!r}; pick one of {', '.join(LITERAL_PRESETS)}"
        ) from None


class LiteralLinear(nn.Module):
    """y = Q(x / s) (Ŵ · s)ᵀ + b with a per-tensor dynamic asymmetric Q.

    An output depends on everything in the same batch, because the range does.
    """

    smoothing_scale: Tensor
    smoothed_weight: Tensor
    bias: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor, smoothing_scale: Tensor, *, activation_bits: int
    ) -> None:
        """Take Ŵ (N, K), unsmoothed, b (N,) and s (K,)."""
        super().__init__()
        self.activation_bits = activation_bits
        self.register_buffer("smoothing_scale", smoothing_scale)
        self.register_buffer("smoothed_weight", weight * smoothing_scale)
        self.register_buffer("bias", bias)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return Q(x / s), same shape."""
        return fake_quantize_tensor_asymmetric(x / self.smoothing_scale, bits=self.activation_bits)

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, N) for x (…, K)."""
        return functional.linear(self.quantize_input(x), self.smoothed_weight, self.bias)


@torch.no_grad()
def literal_dit(
    model: FamilyModel,
    states: CalibrationStates,
    preset: LiteralPreset,
    *,
    weight_bits: int = 4,
    activation_bits: int = 8,
    rank: int | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> FamilyModel:
    """Return a copy of a model whose block linears are `LiteralLinear`.

    LoRA-AO works on the unsmoothed weight (eq. 10), and the α search judges the weight that ships,
    low-rank part included (section 4.5).

    Args:
        model: float32; left untouched.
        states: made with this model.
        preset: quantizer and levers.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
        rank: of LoRA-AO; None for the paper's share of the width, 32 of 1152.
        on_step: called with (time steps searched, time steps in all).

    Raises:
        QuantizationError: a rank or width that does not fit.
    """
    rank = round(model.config.hidden_size / WIDTH_PER_RANK) if rank is None else rank
    quantizer = _quantizer(preset.grid, weight_bits)
    names = linear_names(model.config)
    matrices = {}
    for name in names:
        weight = _linear(model, name).weight
        if preset.low_rank:
            matrices[name] = alternate_lora(weight, quantizer, rank=rank).matrix()
        else:
            matrices[name] = quantizer(weight)

    def candidate(name: str, alpha: float | None) -> LiteralLinear:
        """Return a site's linear for an α, None for no smoothing."""
        linear = _linear(model, name)
        s = torch.ones_like(linear.weight[0])
        if alpha is not None:
            input_max = states.input_maxima[name].amax(dim=0).to(s)
            s = smoothing_scale(input_max, channel_maxima(linear.weight), alpha)
        return LiteralLinear(matrices[name], linear.bias, s, activation_bits=activation_bits)

    alphas: dict[str, float | None] = dict.fromkeys(
        names, FIXED_ALPHA if preset.smoothing else None
    )
    if preset.alpha_search:
        alphas |= _search_alphas(model, states, candidate, on_step)
    quantized = copy.deepcopy(model)
    for name in names:
        quantized.set_submodule(name, candidate(name, alphas[name]))
    return quantized


def _quantizer(grid: Grid, bits: int) -> WeightQuantizer:
    """Return the weight quantizer of a grid."""
    if grid == "input-channel":
        return partial(fake_quantize_input_channels, bits=bits)
    return partial(fake_quantize_strided_blocks, bits=bits)


def _linear(model: FamilyModel, name: str) -> nn.Linear:
    """Return a block linear by name."""
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _search_alphas(
    model: FamilyModel,
    states: CalibrationStates,
    candidate: Callable[[str, float], LiteralLinear],
    on_step: Callable[[int, int], None] | None,
) -> dict[str, float]:
    """Return each site's α with the least Σ_t ‖Q(X_t / s)(Ŵ · s)ᵀ − X_t Wᵀ‖².

    X_t are the float model's inputs of all samples at one step, both guidance halves. One pass over
    the states judges every α of every site.

    Source: DiTAS, eq. 7 and Algorithm 1.
    """
    names = linear_names(model.config)
    losses = {name: [0.0] * len(ALPHA_GRID) for name in names}

    def judge(name: str, x: Tensor) -> None:
        weight = _linear(model, name).weight
        x = x.flatten(0, -2)
        chosen = slice(None, None, -(-x.shape[0] // SEARCH_TOKENS))
        wanted = x[chosen] @ weight.mT
        for index, alpha in enumerate(ALPHA_GRID):
            linear = candidate(name, alpha)
            got = linear.quantize_input(x)[chosen] @ linear.smoothed_weight.mT
            losses[name][index] += float(((got - wanted) ** 2).sum())

    with _observed_inputs(model, names, judge):
        for done, inputs in enumerate(_step_inputs(model, states), start=1):
            model(**inputs.to(model.device))
            if on_step is not None:
                on_step(done, len(states.timesteps))
    return {name: ALPHA_GRID[values.index(min(values))] for name, values in losses.items()}


def _step_inputs(model: FamilyModel, states: CalibrationStates) -> Iterator[ModelInputs]:
    """Yield what the model was called with at each step of the calibration run."""
    labels = torch.tensor(states.settings.classes)
    for latents, timestep in zip(states.latents, states.timesteps, strict=True):
        yield model_inputs(
            latents,
            timestep.item(),
            labels,
            cfg_scale=states.settings.cfg_scale,
            config=model.config,
            conditions=conditions_of(model.config),
        )


@contextmanager
def _observed_inputs(
    model: FamilyModel, names: Sequence[str], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `observe(name, x)` with the input of every named module while the model runs."""

    def observer(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _module, inputs: observe(name, inputs[0])

    handles = [
        model.get_submodule(name).register_forward_pre_hook(observer(name)) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
