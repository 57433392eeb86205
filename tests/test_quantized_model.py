from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_fixture import quantized_tiny_dit, tiny_dit
from safetensors import safe_open
from safetensors.torch import save_file

from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.quantized_model import ARTIFACT_FORMAT, QuantizedModel
from ditas_export.errors import ArtifactError, DitasExportError
from ditas_export.families.dit import FINAL_ADALN


@pytest.mark.parametrize(("bits", "rank"), [(4, 4), (4, 0), (8, 0)])
def test_saving_and_loading_is_bit_exact(tmp_path: Path, bits: int, rank: int) -> None:
    quantized = replace(
        quantized_tiny_dit(tiny_dit(), weight_bits=bits, rank=rank),
        settings={"method": "linear", "ranges": "token"},
        provenance={"torch": "2"},
    )
    path = tmp_path / "model.ditas.safetensors"
    quantized.save(path)
    loaded = QuantizedModel.load(path)
    assert loaded.identity == quantized.identity
    assert loaded.settings == quantized.settings
    assert loaded.provenance == quantized.provenance
    assert loaded.weight_bits == bits
    assert list(loaded.linears) == list(quantized.linears)
    for name, linear in quantized.linears.items():
        other = loaded.linears[name]
        for part in ("codes", "multipliers", "row_scale"):
            assert torch.equal(getattr(linear.weight, part), getattr(other.weight, part))
        assert (linear.low_rank is None) == (other.low_rank is None)
        if linear.low_rank is not None and other.low_rank is not None:
            for part in ("left_codes", "right_codes", "divisor"):
                assert torch.equal(getattr(linear.low_rank, part), getattr(other.low_rank, part))
        for part in ("bias", "smoothing_scale", "step_ranges"):
            assert torch.equal(getattr(linear, part), getattr(other, part))
    for name, tensor in quantized.float_parameters.items():
        assert torch.equal(tensor, loaded.float_parameters[name])


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_modulation_is_kept_bit_exactly(tmp_path: Path, bits: int) -> None:
    quantized = quantize_adaln(quantized_tiny_dit(tiny_dit()), bits)
    path = tmp_path / "model.ditas.safetensors"
    quantized.save(path)
    loaded = QuantizedModel.load(path)
    assert loaded.adaln_bits == bits
    assert list(loaded.adaln) == list(quantized.adaln)
    for name, weight in quantized.adaln.items():
        assert torch.equal(loaded.adaln[name].codes, weight.codes)
        assert torch.equal(loaded.adaln[name].scale, weight.scale)
        assert loaded.adaln[name].bits == bits
    assert set(loaded.float_parameters) == set(quantized.float_parameters)
    for name, tensor in quantized.float_parameters.items():
        assert torch.equal(tensor, loaded.float_parameters[name])
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_integer_modulation_takes_the_bytes_of_its_codes_and_scales(tmp_path: Path) -> None:
    sizes = {}
    for bits in (16, 8, 4):
        path = tmp_path / str(bits)
        quantize_adaln(quantized_tiny_dit(tiny_dit()), bits).save(path)
        with safe_open(path, framework="pt") as file:
            sizes[bits] = sum(
                tensor.numel() * tensor.element_size()
                for tensor in map(file.get_tensor, file.keys())
            )
    rows, width = 2 * 6 * 96 + 2 * 96, 96  # two blocks, the final layer
    assert sizes[16] - sizes[8] == 4 * rows * width - (rows * width + 4 * rows)
    assert sizes[16] - sizes[4] == 4 * rows * width - (rows * width // 2 + 4 * rows * width // 32)


def test_a_file_of_before_the_bits_were_written_holds_floats(tmp_path: Path) -> None:
    """Files of the first release say nothing of the modulation."""
    quantized = quantized_tiny_dit(tiny_dit())
    quantized.save(tmp_path / "new")
    tensors, header = load_tensors(tmp_path / "new", file_format=ARTIFACT_FORMAT)
    assert header.pop("adaln_bits") == 16
    save_tensors(tmp_path / "old", tensors, file_format=ARTIFACT_FORMAT, header=header)
    loaded = QuantizedModel.load(tmp_path / "old")
    assert loaded.adaln_bits == 16
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    """Its output factors were floats."""
    quantized_tiny_dit(tiny_dit()).save(tmp_path / "new")
    tensors, header = load_tensors(tmp_path / "new", file_format=ARTIFACT_FORMAT)
    old = "ditas-export quantized DiT 1"
    save_tensors(tmp_path / "old", tensors, file_format=old, header=header)
    expected = f"old is a {old}, and this version .* reads {ARTIFACT_FORMAT}; make it again$"
    with pytest.raises(ArtifactError, match=expected):
        QuantizedModel.load(tmp_path / "old")


@pytest.mark.parametrize("part", ["left_codes", "right_codes"])
def test_wide_low_rank_codes_are_refused(tmp_path: Path, part: str) -> None:
    quantized_tiny_dit(tiny_dit()).save(tmp_path / "whole")
    tensors, header = load_tensors(tmp_path / "whole", file_format=ARTIFACT_FORMAT)
    name = f"blocks.1.mlp.fc1.low_rank.{part}"
    tensors[name] = tensors[name].to(torch.int16)
    save_tensors(tmp_path / "wide", tensors, file_format=ARTIFACT_FORMAT, header=header)
    with pytest.raises(DitasExportError, match=rf"1 of another element type .{name}"):
        QuantizedModel.load(tmp_path / "wide")


def test_missing_modulation_is_named(tmp_path: Path) -> None:
    quantize_adaln(quantized_tiny_dit(tiny_dit()), 4).save(tmp_path / "whole")
    tensors, header = load_tensors(tmp_path / "whole", file_format=ARTIFACT_FORMAT)
    name = f"{FINAL_ADALN}.codes"
    del tensors[name]
    save_tensors(tmp_path / "cut", tensors, file_format=ARTIFACT_FORMAT, header=header)
    with pytest.raises(ArtifactError, match=f"damaged: 1 missing .{name}"):
        QuantizedModel.load(tmp_path / "cut")


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    quantized_tiny_dit(tiny_dit()).save(first)
    quantized_tiny_dit(tiny_dit()).save(second)
    assert first.read_bytes() == second.read_bytes()


def test_four_bit_codes_take_half_a_byte(tmp_path: Path) -> None:
    four, eight = tmp_path / "four", tmp_path / "eight"
    quantized_tiny_dit(tiny_dit(), rank=0).save(four)
    quantized_tiny_dit(tiny_dit(), rank=0, weight_bits=8).save(eight)
    weights = 2 * 12 * 96 * 96
    saved = eight.stat().st_size - four.stat().st_size
    assert 0.4 * weights < saved < 0.5 * weights  # the multipliers take some of it back


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model"
    quantized_tiny_dit(tiny_dit()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="no readable"):
        QuantizedModel.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match="but no ditas-export quantized DiT"):
        QuantizedModel.load(path)
    with pytest.raises(ArtifactError, match="no readable"):
        QuantizedModel.load(tmp_path / "missing")


def test_sites_and_bits_are_checked() -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    linears = dict(quantized.linears)
    linears.pop("blocks.1.mlp.fc2")
    with pytest.raises(ArtifactError, match=r"blocks\.1\.mlp\.fc2"):
        replace(quantized, linears=linears)
    with pytest.raises(ArtifactError, match="8 or 16, not 4"):
        replace(quantized, activation_bits=4)


@pytest.mark.parametrize(("rank", "message"), [(0, "3 unexpected"), (7, "3 misshapen")])
def test_a_branch_of_another_rank_than_is_said(tmp_path: Path, rank: int, message: str) -> None:
    quantized_tiny_dit(tiny_dit()).save(tmp_path / "model")
    tensors, header = load_tensors(tmp_path / "model", file_format=ARTIFACT_FORMAT)
    header["linears"]["blocks.1.mlp.fc1"]["rank"] = rank
    save_tensors(tmp_path / "model", tensors, file_format=ARTIFACT_FORMAT, header=header)
    with pytest.raises(ArtifactError, match=message):
        QuantizedModel.load(tmp_path / "model")
