"""Classifier-free guidance: the batch, and the blend."""

from __future__ import annotations

import pytest
import torch
from quantized_fixture import TINY

from ditas_export.conditions.labels import ClassLabels
from ditas_export.diffusion.guidance import (
    guide,
    guided_channel_count,
    model_inputs,
    plain_inputs,
)
from ditas_export.errors import RunnerError


def test_plain_batch_repeats_the_time_step() -> None:
    latents, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 3])
    inputs = plain_inputs(latents, 999, labels, config=TINY, conditions=ClassLabels(TINY))
    assert list(inputs) == ["latents", "timesteps", "class_labels"]
    assert inputs.latents is latents
    assert inputs["class_labels"] is labels
    assert torch.equal(inputs.timesteps, torch.tensor([999, 999, 999]))


def test_guided_batch_has_class_rows_first_and_null_rows_second() -> None:
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([7, 0])
    inputs = model_inputs(
        latents, 20, labels, cfg_scale=4.0, config=TINY, conditions=ClassLabels(TINY)
    )
    assert torch.equal(inputs.latents, torch.cat([latents, latents]))
    assert torch.equal(inputs["class_labels"], torch.tensor([7, 0, 10, 10]))
    assert torch.equal(inputs.timesteps, torch.tensor([20, 20, 20, 20]))
    assert inputs.timesteps.dtype == torch.int64


@pytest.mark.parametrize(("in_channels", "three", "every"), [(1, 1, 1), (3, 3, 3), (4, 3, 4)])
def test_guided_channels(in_channels: int, three: int, every: int) -> None:
    assert guided_channel_count(in_channels, "3") == three
    assert guided_channel_count(in_channels, "all") == every


def test_unknown_channel_rule_is_refused() -> None:
    with pytest.raises(RunnerError, match="""cfg_channels is "3" or "all", not '4'"""):
        guided_channel_count(4, "4")  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", [3, 4])
def test_only_the_first_channels_are_guided_and_the_variance_never(channels: int) -> None:
    output = torch.randn(4, 8, 2, 2, dtype=torch.float64)
    before = output.clone()
    blended = guide(output, cfg_scale=4.0, channels=channels)
    with_class, without = output[:2], output[2:]
    expected = without[:, :channels] + 4 * (with_class[:, :channels] - without[:, :channels])
    # float64 rounding only.
    torch.testing.assert_close(blended[:, :channels], expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(blended[:, channels:], with_class[:, channels:])
    assert torch.equal(output, before)


@pytest.mark.parametrize(("cfg_scale", "half"), [(1.0, 0), (0.0, 1)])
def test_scale_one_is_the_class_and_zero_the_null_class(cfg_scale: float, half: int) -> None:
    output = torch.randn(6, 2, 2, 2, dtype=torch.float64)
    blended = guide(output, cfg_scale=cfg_scale, channels=1)
    torch.testing.assert_close(  # float64 rounding only
        blended[:, :1], output.chunk(2)[half][:, :1], rtol=1e-14, atol=1e-14
    )
