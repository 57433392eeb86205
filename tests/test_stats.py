"""What an export leaves for its report: gathered from what is at hand, kept, read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import TINY, quantized_tiny_dit, tiny_dit
from report_fixture import plain_stats
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.dit.presets import preset_config
from ditas_export.errors import ArtifactError
from ditas_export.families.registry import linear_names, linear_shapes
from ditas_export.generation.pixels import to_pixels
from ditas_export.report.gather import (
    Activations,
    activation_maps,
    block_names,
    linear_stats,
    pictures_of,
    unevenness,
    weight_pictures,
)
from ditas_export.report.stats import STATS_FORMAT, ExportStats, pooled

STEPS = 7


def tensors_of(stats: ExportStats, folder: Path) -> dict[str, Tensor]:
    """Return all tensors of statistics, by the names that their file has."""
    stats.save(folder / "stats")
    return load_file(folder / "stats")


@pytest.fixture
def activations() -> Activations:
    generator = torch.Generator().manual_seed(0)
    maxima = {
        name: torch.rand(STEPS, columns, generator=generator)
        for name, (_, columns) in linear_shapes(TINY).items()
    }
    maxima["blocks.1.mlp.fc2"][3, 200] = 50.0
    return Activations(times=torch.arange(STEPS).flip(0), maxima=maxima)


def test_what_is_kept_is_what_is_read(tmp_path: Path) -> None:
    stats = plain_stats(TINY, side=8)
    path, again = tmp_path / "one", tmp_path / "two"
    stats.save(path)
    found = ExportStats.load(path)
    found.save(again)
    assert found.header == stats.header
    assert path.read_bytes() == again.read_bytes()
    name = "blocks.1.attn.proj"
    maxima = stats.linears[name].channel_maxima
    assert maxima is not None
    assert torch.equal(found.linears[name].channel_maxima, maxima)  # type: ignore[arg-type]
    smoothed = found.linears[name].smoothed_maxima
    assert smoothed is not None
    assert torch.equal(smoothed, maxima / stats.linears[name].smoothing_scale)


def test_the_statistics_of_a_dit_xl_2_are_8_mib_at_most(tmp_path: Path) -> None:
    config = preset_config("DiT-XL/2")
    plain_stats(config, steps=250).save(tmp_path / "stats")
    assert 2**20 < (tmp_path / "stats").stat().st_size <= 8 * 2**20


def drop(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, _: tensors.__delitem__(name)


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, _: tensors.__setitem__(name, tensor)


def say(name: str, value: object) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda _, header: header.__setitem__(name, value)


SCALE = "linears.blocks.0.attn.qkv.smoothing_scale"
DAMAGE = {
    "a linear is missing": drop(SCALE),
    "a part of a weight is missing": drop("weights.blocks.0.attn.qkv.error"),
    "half of the samples": drop("samples.quantized"),
    "a linear too many": put("linears.blocks.9.attn.qkv.smoothing_scale", torch.ones(3)),
    "a picture of a linear that is none": put("maps.<b>", torch.ones(3, 3)),
    "another length": put("linears.blocks.0.attn.qkv.channel_maxima", torch.ones(3)),
    "NaN": put(SCALE, torch.full((TINY.hidden_size,), torch.nan)),
    "below zero": put(SCALE, -torch.ones(TINY.hidden_size)),
    "another type": put("samples.reference", torch.zeros(4, 8, 8, 3)),
    "two channels": put("samples.reference", torch.zeros(4, 8, 8, 2, dtype=torch.uint8)),
    "no hash": say("file_sha256", "f00"),
    "a text for a number": say("times", ["noon"]),
    "another kind of picture": say("pictures", "etchings"),
    "a word too many": say("more", 1),
    "blocks without linears": say("blocks", [{"path": "blocks.0"}]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_statistics_are_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "stats"
    plain_stats(TINY, side=8).save(path)
    tensors, header = load_tensors(path, file_format=STATS_FORMAT)
    DAMAGE[damage](tensors, header)
    save_tensors(path, tensors, file_format=STATS_FORMAT, header=header)
    with pytest.raises(ArtifactError, match=r"is damaged: .*run the export again"):
        ExportStats.load(path)


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ArtifactError, match="is a safetensors file, but no ditas-export statis"):
        ExportStats.load(path)


def test_ranges_are_those_of_the_maxima(activations: Activations) -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    found = linear_stats(quantized, activations)
    assert tuple(found) == linear_names(TINY)
    for name, linear in found.items():
        maxima = activations.maxima[name].numpy()
        assert linear.channel_maxima is not None
        assert linear.step_maxima is not None
        assert (linear.channel_maxima.numpy() == maxima.max(axis=0)).all()
        assert (linear.step_maxima.numpy() == maxima.max(axis=1)).all()
        assert torch.equal(linear.smoothing_scale, quantized.linears[name].smoothing_scale)
        assert torch.equal(linear.step_ranges, quantized.linears[name].step_ranges)


def test_without_activations_the_scales_are_known_alone() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    found = linear_stats(quantized, None)
    assert all(linear.channel_maxima is None for linear in found.values())
    assert all(linear.smoothed_maxima is None for linear in found.values())
    assert activation_maps(found, None, TINY) == {}


def test_the_most_uneven_inputs_have_maps(activations: Activations) -> None:
    found = linear_stats(quantized_tiny_dit(tiny_dit()), activations)
    maps = activation_maps(found, activations, TINY)
    first = next(iter(maps))
    assert first == "blocks.1.mlp.fc2"
    assert len(maps) == 4
    # 384 channels of 7 steps: nothing is pooled.
    assert torch.equal(maps[first], activations.maxima[first])


@pytest.mark.parametrize(
    ("maxima", "expected"),
    [([1.0, 1.0, 1.0], 1.0), ([1.0, 2.0, 8.0], 4.0), ([0.0, 0.0, 3.0], float("inf")), ([0.0], 1.0)],
)
def test_unevenness_is_the_largest_over_the_median(maxima: list[float], expected: float) -> None:
    assert unevenness(torch.tensor(maxima)) == expected


def test_pooling_loses_no_outlier() -> None:
    picture = torch.rand(130, 1000, generator=torch.Generator().manual_seed(0))
    picture[77, 777] = 9.0
    found = pooled(picture, 64, 256)
    assert found.shape == (64, 256)
    assert float(found.amax()) == 9.0
    assert int((found == 9.0).sum()) in (1, 2, 4)  # in one cell, or at the edge of two
    assert torch.equal(pooled(picture[:3, :4], 64, 256), picture[:3, :4])


def test_the_weights_that_lose_most_are_shown() -> None:
    model = tiny_dit()
    quantized = quantized_tiny_dit(model)
    worst = ["blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1"]
    linears = {
        name: dataclasses.replace(
            linear, output_snr_db=float(worst.index(name)) if name in worst else 40.0
        )
        for name, linear in quantized.linears.items()
    }
    found = weight_pictures(dataclasses.replace(quantized, linears=linears), model.state_dict())
    assert list(found) == worst
    name = worst[2]
    linear, weight = linears[name], model.get_submodule(name).weight.double()
    assert linear.low_rank is not None
    # Element by element, from the formula in `QuantizedLinear`.
    codes = linear.weight.codes.double() * linear.weight.multipliers.double().repeat_interleave(
        linear.weight.block_size, dim=1
    )
    branch = (linear.low_rank.left_codes.double() / linear.low_rank.divisor.double()) @ (
        linear.low_rank.right_codes.double()
    )
    rounded = (codes + branch) * linear.weight.row_scale.double()[:, None]
    error = (rounded - weight * linear.smoothing_scale.double()).abs()
    smoothed = (weight * linear.smoothing_scale.double()).abs()
    shown = found[name]
    for picture, wanted in ((shown.error, error), (shown.smoothed, smoothed)):
        # float32 sums of four products
        torch.testing.assert_close(
            picture.double(), pooled(wanted, 64, 256).double(), rtol=1e-5, atol=1e-5
        )
    values, counts = linear.weight.codes.unique(return_counts=True)
    wanted_codes = torch.zeros(15, dtype=torch.int64)
    wanted_codes[values.long() + 7] = counts
    assert torch.equal(shown.codes, wanted_codes)


def finals(channels: int, side: int, *, seeds: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels)
    return [torch.randn(4, channels, side, side, generator=generator) for _ in range(seeds)]


def test_pixels_are_shown_as_they_are() -> None:
    reference = finals(1, 16)
    found = pictures_of(reference, [each * 0.9 for each in reference[:2]], None)
    assert found is not None
    kind, samples = found
    assert kind == "pixels"
    wanted = to_pixels(torch.cat(reference)[:8])
    assert (samples.reference.numpy() == wanted).all()
    assert samples.quantized.shape == (8, 16, 16, 1)
    assert not torch.equal(samples.quantized, samples.reference)


def test_latents_are_shown_in_floats_range() -> None:
    reference = [torch.linspace(-3, 5, 4 * 4 * 64).reshape(4, 4, 8, 8)]
    found = pictures_of(reference, [reference[0] + 100], None)
    assert found is not None
    kind, samples = found
    assert kind == "latents"
    assert samples.reference.shape == (4, 8, 8, 3)
    shown = reference[0][:, :3]
    wanted = (shown - shown.amin()) / (shown.amax() - shown.amin()) * 2 - 1
    assert (samples.reference.numpy() == to_pixels(wanted)).all()
    assert (samples.quantized == 255).all()


class Doubling:
    """A decoder that shows the first channel, each pixel eight times eight."""

    scale = 8

    def __call__(self, latents: Tensor) -> Tensor:
        grey = latents[:, :1].repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        return grey.expand(-1, 3, -1, -1)


def test_decoded_pictures_are_few_and_small() -> None:
    """Of 512 pixels: four by four become one, and no more than fit into a mebibyte."""
    reference = finals(4, 64)
    decoder: Any = Doubling()
    found = pictures_of(reference, reference, decoder)
    assert found is not None
    kind, samples = found
    assert kind == "decoded"
    assert samples.reference.shape == (5, 256, 256, 3)
    assert samples.reference.numel() <= 2**20
    wanted = to_pixels(reference[0][:1, :1].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert (samples.reference[0, ..., 0].numpy() == wanted[0, ..., 0]).all()


def test_what_is_not_finite_is_not_shown() -> None:
    reference = finals(1, 8)
    broken = [each.clone() for each in reference]
    broken[1][0, 0, 0, 0] = torch.nan
    assert pictures_of(reference, broken, None) is None


def test_blocks_name_their_linears() -> None:
    found = block_names(TINY)
    listed = [f"{block.path}.{path}" for block in found for path in block.linears]
    assert tuple(listed) == linear_names(TINY)
    assert [block.path for block in found] == ["blocks.0", "blocks.1"]
