"""What an error of an output channel counts downstream: backward passes against perturbation.

One output channel of one linear is disturbed by noise; how much the block's output then moves is
measured in float64. The weights are of one backward pass of random signs: a few hundredths of a
channel's, from 768 tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_fixture import TINY, tiny_dit
from torch import Tensor

from ditas_export.calibration.output_weights import output_weights
from ditas_export.calibration.row_shares import Share
from ditas_export.calibration.states import (
    CalibrationSettings,
    CalibrationStates,
    collect_states,
    walk_states,
)
from ditas_export.distributed import SINGLE
from ditas_export.dit.model import DiT
from ditas_export.families.base import ModelInputs
from ditas_export.families.identity import identity_of
from ditas_export.families.registry import family_of

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
    settings = CalibrationSettings(steps=6, classes=(3, 7, 1, 4))
    return collect_states(model, settings, identity=identity_of(model))


@pytest.fixture(scope="module")
def weights(model: DiT, states: CalibrationStates) -> dict[str, Tensor]:
    """The weights of the first block's linears."""
    family, inputs = family_of(model.config), walk_states(states, count=24)
    block = family.blocks(model.config)[0]
    share = Share.of(len(inputs.latents), model.config.num_tokens, SINGLE)
    return output_weights(
        model.get_submodule(block.path), block, *family.enter(model, inputs), share
    )


def moved(model: DiT, inputs: ModelInputs, kind: str, channel: int) -> float:
    """How far the first block's output moves when one output channel of a linear is disturbed."""
    hidden, conditioning = model.embed(*inputs.values())
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


@pytest.fixture(scope="module")
def measured(model: DiT, states: CalibrationStates) -> dict[str, Tensor]:
    """How far the output moves, part by part and channel by channel, all on one scale."""
    inputs = walk_states(states, count=24)
    return {
        part: torch.tensor([moved(model, inputs, kind, first + channel) for channel in CHANNELS])
        for part, (kind, first) in PARTS.items()
    }


@pytest.mark.parametrize("part", PARTS)
def test_weights_are_what_a_disturbance_does(
    weights: dict[str, Tensor], measured: dict[str, Tensor], part: str
) -> None:
    kind, first = PARTS[part]
    told = weights[f"blocks.0.{kind}"][[first + channel for channel in CHANNELS]].log()
    found = measured[part].log()
    assert float(torch.corrcoef(torch.stack([found, told]))[0, 1]) > 0.97
    assert told.std() > 0.4  # ones would tell nothing
    slope = float((found - found.mean()) @ (told - told.mean()))
    slope /= float((told - told.mean()).square().sum())
    assert 0.9 < slope < 1.1


def test_the_three_of_qkv_count_as_three_linears(weights: dict[str, Tensor]) -> None:
    parts = weights["blocks.0.attn.qkv"].chunk(3)
    assert [float(part.square().mean()) for part in parts] == pytest.approx([1, 1, 1], rel=1e-5)


def test_a_linear_of_which_nothing_reaches_the_end_counts_evenly(
    states: CalibrationStates,
) -> None:
    model: Any = tiny_dit()
    with torch.no_grad():
        gates = model.blocks[0].adaLN_modulation[1]
        gates.weight[2 * WIDTH : 3 * WIDTH] = 0
        gates.bias[2 * WIDTH : 3 * WIDTH] = 0
    family, inputs = family_of(model.config), walk_states(states, count=4)
    block = family.blocks(model.config)[0]
    share = Share.of(len(inputs.latents), model.config.num_tokens, SINGLE)
    found = output_weights(model.blocks[0], block, *family.enter(model, inputs), share)
    assert torch.equal(found["blocks.0.attn.proj"], torch.ones(WIDTH))
    assert float(found["blocks.0.mlp.fc2"].std()) > 0.01
