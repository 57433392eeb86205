"""A family of one's own: DiT with q, k and v apart, and attention in one piece with proj.

The tables are all that it states. Its three linears read one input under one s, which the walk
solves together; what comes out is what DiT's one `qkv` gives, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quantized_fixture import TINY, example_inputs, fed, snr_db, tiny_dit
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.fold_proof import prove_model
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import CalibrationSettings, CalibrationStates, collect_states
from ditas_export.dit.model import DiT, DiTBlock, DiTConfig, modulate, modulate_by_factor
from ditas_export.errors import ArtifactError
from ditas_export.families import registry
from ditas_export.families.base import Block, FusedAttention, Group, Rows, Stage, State
from ditas_export.families.dit import DiTFamily
from ditas_export.families.identity import identity_of
from ditas_export.families.outliers import plant_outliers
from ditas_export.onnx_export.export import export_onnx
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner, matmul_kernels

CONFIG = DiTConfig(**{**TINY.to_dict(), "process": TINY.process, "layer_norm_eps": 2e-6})
APART = ("attn.to_q", "attn.to_k", "attn.to_v")


class Attention(nn.Module):
    """Attention whose three inputs have linears of their own."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.to_q, self.to_k, self.to_v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            linear(x).reshape(n, t, self.heads, width // self.heads).transpose(1, 2)
            for linear in (self.to_q, self.to_k, self.to_v)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, width))
        return out


class ApartDiT(DiT):
    """A DiT of such attentions."""

    def __init__(self, config: DiTConfig, modulation: object) -> None:
        super().__init__(config, modulation)  # type: ignore[arg-type]
        for block in self.blocks:
            block.attn = Attention(config)  # type: ignore[assignment]


def attend(block: nn.Module, state: State, constants: State) -> State:
    assert isinstance(block, DiTBlock)
    chunks = block.chunks(constants["c"])
    read = block.attention_input(state["x"], chunks)
    return {"x": block.add_attention(state["x"], chunks, block.attn, read)}


class ApartFamily(DiTFamily):
    """Its tables: one group of three linears, V in rows of one of them, one stage for both."""

    def serves(self, config: DiTConfig) -> bool:
        return config.layer_norm_eps == 2e-6

    def module(self, config: DiTConfig, *, folded: bool = False) -> DiT:
        return ApartDiT(config, modulate_by_factor if folded else modulate)

    def blocks(self, config: DiTConfig) -> tuple[Block, ...]:
        found = []
        for block in DiTFamily.blocks(self, config):
            (qkv,), _, mlp = (stage.groups for stage in block.stages)
            apart = Group(linears=APART, folds=qkv.folds, is_token_wise=True)
            proj = Group(
                linears=("attn.proj",), folds=(Rows(linear="attn.to_v", rows=slice(None)),)
            )
            stages = (
                Stage(groups=(apart, proj), run=attend),
                Stage(groups=mlp, run=block.stages[2].run),
            )
            found.append(Block(path=block.path, stages=stages))
        return tuple(found)

    def attentions(self, _config: DiTConfig) -> Sequence[FusedAttention]:
        return []  # it has no linear that gives q, k and v


@pytest.fixture(autouse=True)
def own_family(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ApartFamily("apart", type(CONFIG.process))
    monkeypatch.setattr(registry, "FAMILIES", [own, *registry.FAMILIES])


def apart(whole: DiT) -> DiT:
    """The same function, q, k and v apart."""
    model = ApartDiT(CONFIG, modulate)
    state = whole.state_dict()
    for block in range(CONFIG.depth):
        for part in ("weight", "bias"):
            rows = state.pop(f"blocks.{block}.attn.qkv.{part}").chunk(3)
            for path, value in zip(APART, rows, strict=True):
                state[f"blocks.{block}.{path}.{part}"] = value
    model.load_state_dict(state)
    return model.eval().requires_grad_(requires_grad=False)


def calibrated(model: DiT) -> QuantizedModel:
    settings = CalibrationSettings(steps=6, classes=(3, 7, 1, 4))
    states: CalibrationStates = collect_states(model, settings, identity=identity_of(model))
    return quantize_model(model, states, QuantizationSettings(rank=4, alpha_grid=(0.4, 0.5)))


@pytest.fixture
def quantized() -> QuantizedModel:
    return calibrated(apart(tiny_dit()))


def test_linears_of_one_input_are_solved_as_one(quantized: QuantizedModel) -> None:
    """DiT's own walk of the same weights, eps aside (a millionth of the variance)."""
    whole = calibrated(tiny_dit())
    for block in range(CONFIG.depth):
        q, k, v = (quantized.linears[f"blocks.{block}.{path}"] for path in APART)
        together = whole.linears[f"blocks.{block}.attn.qkv"]
        assert q.alpha == k.alpha == v.alpha == together.alpha
        for linear in (q, k, v):
            assert torch.allclose(linear.smoothing_scale, together.smoothing_scale, rtol=1e-3)
            assert linear.low_rank is not None
            assert q.low_rank is not None
            assert torch.equal(linear.low_rank.right_codes, q.low_rank.right_codes)
        figures = [linear.output_snr_db for linear in (q, k, v)]
        assert min(figures) - 1 < together.output_snr_db < max(figures) + 1
        proj = f"blocks.{block}.attn.proj"
        assert abs(quantized.linears[proj].output_snr_db - whole.linears[proj].output_snr_db) < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_its_folds_are_proved(quantized: QuantizedModel, dtype: torch.dtype) -> None:
    assert prove_model(quantize_adaln(quantized, 8), dtype).relative_error < 1e-13


def test_its_file_computes_what_was_calibrated(quantized: QuantizedModel, tmp_path: Path) -> None:
    folded = fold_smoothing(quantize_adaln(quantized, 8))
    path = tmp_path / "out.onnx"
    export_onnx(folded, path)
    inputs = example_inputs(batch=4)
    expected = fake_quantized_model(folded, ranges="token")(*inputs)
    with OnnxRuntimeRunner(path, threads=2, as_is=True) as runner:
        assert snr_db(expected, runner(fed(*inputs))) > 50  # rounding ties
    kernels = matmul_kernels(path)
    assert {kernels[f"blocks.0.{name}/MatMul"] for name in APART} == {"MatMulIntegerToFloat"}
    model = apart(tiny_dit())
    assert snr_db(model(*inputs), expected) > 20


def test_it_is_kept_under_its_name(quantized: QuantizedModel, tmp_path: Path) -> None:
    path = tmp_path / "own.safetensors"
    quantized.save(path)
    again = QuantizedModel.load(path, model=quantized.identity)
    assert list(again.linears) == list(quantized.linears)
    registry.FAMILIES.pop(0)
    with pytest.raises(ArtifactError, match="its family is apart, its model is a dit"):
        QuantizedModel.load(path)


def test_two_s_under_one_input_are_refused(quantized: QuantizedModel) -> None:
    name = "blocks.0.attn.to_k"
    linear = quantized.linears[name]
    other = replace(linear, smoothing_scale=linear.smoothing_scale * 2)
    with pytest.raises(ArtifactError, match=r"to_q and blocks\.0\.attn\.to_k read one input"):
        replace(quantized, linears={**quantized.linears, name: other})


def test_outliers_are_planted_by_its_tables() -> None:
    model = apart(tiny_dit())
    twin = plant_outliers(model, seed=3)
    inputs = example_inputs(batch=2)
    assert snr_db(model(*inputs), twin(*inputs)) > 90
    before, after = model.blocks[0].attn.to_v, twin.blocks[0].attn.to_v  # type: ignore[union-attr]
    assert not torch.equal(before.weight, after.weight)  # type: ignore[union-attr, arg-type]
