"""What an error of an output channel counts downstream: the walk's formula against perturbation.

One output channel of one linear is disturbed by noise; how much the block's output then moves is
measured in float64. The formula is first order and takes root mean squares over tokens, so it holds
channel by channel to some ten per cent, and only up to a factor common to a linear's channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_fixture import TINY, tiny_dit
from torch import Tensor

from ditas_export.calibration import walk as walk_module
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_dit
from ditas_export.calibration.states import (
    CalibrationSettings,
    CalibrationStates,
    collect_states,
    walk_states,
)
from ditas_export.calibration.walk import WalkStates
from ditas_export.dit.identity import identity_of
from ditas_export.dit.model import DiT
from ditas_export.dit.sites import LINEAR_KINDS

WIDTH = TINY.hidden_size
CHANNELS = range(0, WIDTH, 4)
PARTS = {
    "q": ("attn.qkv", 0),
    "k": ("attn.qkv", WIDTH),
    "v": ("attn.qkv", 2 * WIDTH),
    "proj": ("attn.proj", 0),
    "fc1": ("mlp.fc1", 0),
    "fc2": ("mlp.fc2", 0),
}


def spread(seed: int, count: int) -> Tensor:
    """Factors over more than a decade."""
    return torch.exp(0.8 * torch.randn(count, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def model() -> DiT:
    """A model whose gates, readers and keys differ from channel to channel, each its own way."""
    model: Any = tiny_dit()
    with torch.no_grad():
        for block in model.blocks:
            gates = block.adaLN_modulation[1]
            for seed, chunk in ((1, 2), (2, 5)):
                rows = slice(chunk * WIDTH, (chunk + 1) * WIDTH)
                gates.bias[rows] += spread(seed, WIDTH)
                gates.weight[rows] *= 0.1
            block.mlp.fc2.weight *= spread(3, block.mlp.fc2.weight.shape[1])
            block.attn.proj.weight *= spread(4, WIDTH)
            block.attn.qkv.weight[:WIDTH] *= spread(5, WIDTH)[:, None] * 3  # sharper attention
            block.attn.qkv.weight[WIDTH : 2 * WIDTH] *= spread(6, WIDTH)[:, None] * 3
    return model


@pytest.fixture(scope="module")
def states(model: DiT) -> CalibrationStates:
    settings = CalibrationSettings(steps=4, classes=(3, 7))
    return collect_states(model, settings, identity=identity_of(model))


@pytest.fixture(scope="module")
def weights(model: DiT, states: CalibrationStates) -> dict[str, Tensor]:
    """What `solve_linear` is told, linear by linear of the first block."""
    told: list[Tensor] = []
    solve = walk_module.solve_linear
    patch = pytest.MonkeyPatch()

    def spy(*arguments: Any, **named: Any) -> Any:
        told.append(arguments[4])
        return solve(*arguments, **named)

    patch.setattr(walk_module, "solve_linear", spy)
    quantize_dit(model, states, QuantizationSettings(rank=2, alpha_grid=(0.5,)))
    patch.undo()
    return dict(zip(LINEAR_KINDS, told[: len(LINEAR_KINDS)], strict=True))


def moved(model: DiT, inputs: WalkStates, kind: str, channel: int) -> float:
    """How far the first block's output moves when one output channel of a linear is disturbed."""
    hidden, conditioning = model.embed(inputs.latents, inputs.timesteps, inputs.class_labels)
    block: Any = model.blocks[0]
    noise = torch.randn(hidden.shape[:2], generator=torch.Generator().manual_seed(channel))

    def disturb(_module: object, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., channel] += 1e-3 * noise.to(output.dtype)
        return output

    with torch.no_grad():
        hidden, conditioning = hidden.double(), conditioning.double()
        block = block.double()
        before = block(hidden, conditioning)
        handle = block.get_submodule(kind).register_forward_hook(disturb)
        after = block(hidden, conditioning)
        handle.remove()
        block.float()
    return float((after - before).norm()) / 1e-3


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_what_a_disturbance_does(
    model: DiT, states: CalibrationStates, weights: dict[str, Tensor], part: str
) -> None:
    kind, first = PARTS[part]
    channels = [first + channel for channel in CHANNELS]
    inputs = walk_states(states, count=8)
    measured = torch.tensor([moved(model, inputs, kind, channel) for channel in channels]).log()
    told = weights[kind][channels].log()
    pairs = torch.stack([measured, told])
    # The gates' own spread is exact; the MLP behind proj, GELU's slope behind fc1 and the softmax
    # behind q and k are not in the formula.
    assert float(torch.corrcoef(pairs)[0, 1]) > {"q": 0.85, "k": 0.85, "fc1": 0.9}.get(part, 0.95)
    assert told.std() > 0.4  # ones would tell nothing
    slope = float((measured - measured.mean()) @ (told - told.mean()))
    slope /= float((told - told.mean()).square().sum())
    assert 0.75 < slope < 1.3


def test_the_three_of_qkv_are_levelled(weights: dict[str, Tensor]) -> None:
    """An error of q, of k and of v, each in proportion to its size, counts about the same."""
    q, k, v = weights["attn.qkv"].chunk(3)
    assert all(0.1 < float(part.log().mean().exp() / q.log().mean().exp()) < 10 for part in (k, v))
