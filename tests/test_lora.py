"""LoRAs: merged as the formula has it and as PEFT does; everything but a plain one is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from ditas_export.cli import export, sample
from ditas_export.dit.lora import Lora, Update
from ditas_export.dit.lora_files import read_lora
from ditas_export.errors import CheckpointError
from ditas_export.families.load import load_model
from ditas_export.options import CheckpointHints

RANK = 3
SHAPES = {"blocks.0.attn.qkv": (24, 8), "blocks.1.mlp.fc1": (32, 8)}

STYLES = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft around a pipeline": (
        "base_model.model.transformer.{}.lora_A.weight",
        "base_model.model.transformer.{}.lora_B.weight",
    ),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight"),
    "earlier diffusers": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
}


def _weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        f"{module}.{name}": torch.randn(shape, generator=random).to(dtype)
        for module, (out, width) in SHAPES.items()
        for name, shape in {"weight": (out, width), "bias": (out,)}.items()
    }


def _factors(rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return {
        module: (
            torch.randn(rank, width, generator=random),
            torch.randn(out, rank, generator=random),
        )
        for module, (out, width) in SHAPES.items()
    }


def _named(style: str = "peft", rank: int = RANK) -> dict[str, Tensor]:
    names = STYLES[style]
    return {
        name.format(module): factor
        for module, pair in _factors(rank).items()
        for name, factor in zip(names, pair, strict=True)
    }


def _folder(path: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """Write a LoRA as PEFT does."""
    path.mkdir()
    save_file(_named() if tensors is None else tensors, path / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none", **config}
    (path / "adapter_config.json").write_text(json.dumps(content))
    return path


def _literal(scale: float, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return W + scale · B A in float64."""
    found = {name: tensor.double() for name, tensor in weights.items()}
    for module, (down, up) in _factors().items():
        found[f"{module}.weight"] += scale * (up.double() @ down.double())
    return found


def _assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums of a few float32 products: some units of rounding of the largest term."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_every_style_of_names_is_merged_as_the_formula_has_it(style: str, tmp_path: Path) -> None:
    lora = read_lora(_folder(tmp_path / "lora", _named(style)))
    _assert_near(lora.merged(_weights()), _literal(6 / RANK, _weights()))
    assert f"into 2 linears: rank {RANK}, scale 2" in lora.note


def test_a_rank_stabilized_one_is_divided_by_the_root(tmp_path: Path) -> None:
    lora = read_lora(_folder(tmp_path / "lora", use_rslora=True))
    _assert_near(lora.merged(_weights()), _literal(6 / math.sqrt(RANK), _weights()))


def test_the_file_itself_has_its_settings_beside_it(tmp_path: Path) -> None:
    lora = read_lora(_folder(tmp_path / "lora") / "adapter_model.safetensors")
    _assert_near(lora.merged(_weights()), _literal(6 / RANK, _weights()))


def test_alpha_is_given_where_nothing_says_it(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(_named("diffusers"), path)
    _assert_near(read_lora(path, alpha=1.5).merged(_weights()), _literal(0.5, _weights()))
    with pytest.raises(CheckpointError, match=r"does not say alpha, .* or give --lora-alpha \(3 "):
        read_lora(path)


def test_alpha_is_read_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    alphas = {f"transformer.{module}.alpha": torch.tensor(1.5) for module in SHAPES}
    save_file(_named("earlier diffusers") | alphas, path)
    _assert_near(read_lora(path).merged(_weights()), _literal(0.5, _weights()))


def test_alpha_is_read_of_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    config = {"transformer.r": RANK, "transformer.lora_alpha": 6, "transformer.use_rslora": True}
    save_file(_named("diffusers"), path, metadata={"lora_adapter_metadata": json.dumps(config)})
    expected = _literal(6 / math.sqrt(RANK), _weights())
    _assert_near(read_lora(path).merged(_weights()), expected)


def test_patterns_are_of_the_ends_of_names(tmp_path: Path) -> None:
    config = {
        "alpha_pattern": {"kv": 100, "qkv": 12, "1.mlp.fc1": 3, "fc1": 100},
        "rank_pattern": {"fc1": 3},
    }
    lora = read_lora(_folder(tmp_path / "lora", r=RANK, **config))
    assert {module: update.scale for module, update in lora.updates.items()} == {
        "blocks.0.attn.qkv": 4.0,
        "blocks.1.mlp.fc1": 1.0,
    }


def test_half_precision_weights_become_float32_sums_and_nothing_else_changes(
    tmp_path: Path,
) -> None:
    weights = _weights(torch.float16)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    merged = read_lora(_folder(tmp_path / "lora")).merged(weights)
    _assert_near(merged, _literal(2.0, weights))
    for module in SHAPES:
        assert merged[f"{module}.weight"].dtype == torch.float32
        assert merged[f"{module}.bias"] is weights[f"{module}.bias"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


@settings(deadline=None, max_examples=30)
@given(rank=st.integers(1, 6), scale=st.floats(0.01, 100), seed=st.integers(0, 2**32))
def test_what_is_taken_away_again_was_added(rank: int, scale: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    down, up = torch.randn(rank, 7, generator=random), torch.randn(5, rank, generator=random)
    weights = {"a.weight": torch.randn(5, 7, generator=random)}
    there = Lora(updates={"a": Update(down=down, up=up, scale=scale)}, source="there")
    back = Lora(updates={"a": Update(down=down, up=-up, scale=scale)}, source="back")
    nothing = Lora(updates={"a": Update(down=down, up=0 * up, scale=scale)}, source="nothing")
    merged = there.merged(weights)
    error = (back.merged(merged)["a.weight"] - weights["a.weight"]).abs().max()
    assert error <= 2e-7 * 2 * (1 + merged["a.weight"].abs().max())
    assert torch.equal(nothing.merged(weights)["a.weight"], weights["a.weight"])


def _refused(message: str, path: Path, *, alpha: float | None = None) -> None:
    with pytest.raises(CheckpointError) as refused:
        read_lora(path, alpha=alpha).merged(_weights())
    text = str(refused.value)
    assert re.search(message, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"is of a DoRA, which is no sum; merge it where it was trained"),
        ({"peft_type": "LOHA"}, r"peft_type='LOHA', expected LORA"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa', which changes the weights"),
        ({"bias": "all"}, r"bias='all'; merge"),
        ({"lora_bias": True}, r"lora_bias=True, which is not followed"),
        ({"modules_to_save": ["proj_out"]}, r"modules_to_save=\['proj_out'\], which is not"),
        ({"fan_in_fan_out": True}, r"fan_in_fan_out=True, which is not followed"),
        ({"rank_pattern": {"fc1": 4}}, r"has rank 3 of blocks\.1\.mlp\.fc1, but .* says 4"),
        ({"r": 4}, r"has rank 3 of blocks\.0\.attn\.qkv, but .* says 4; they are of two LoRAs"),
        ({"r": 0}, r"r=0; expected a rank, 1 or more"),
        ({"lora_alpha": "8"}, r"lora_alpha='8'; expected an alpha"),
        ({"lora_alpha": 0}, r"lora_alpha=0; expected an alpha, more than 0"),
        ({"alpha_pattern": {"(a+)+$": 4}}, r"a regular expression in alpha_pattern, '\(a\+\)\+\$'"),
        ({"alpha_pattern": [4]}, r"alpha_pattern=\[4\]; expected values by module"),
    ],
)
def test_settings_of_something_else_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _refused(message, _folder(tmp_path / "lora", **config))


A, B = (name.format("blocks.0.attn.qkv") for name in STYLES["peft"])
TWICE = STYLES["diffusers"][0].format("blocks.0.attn.qkv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({A: None}, r"has no factor A of blocks\.0\.attn\.qkv; get it again"),
        ({A: torch.ones(2, 8)}, r"of ranks 2 \(A\) and 3 \(B\); expected one rank"),
        ({A: torch.ones(3, 9)}, r"adapts .*\.qkv as \(24, 9\), but its weight is \(24, 8\)"),
        ({B: torch.full((24, 3), torch.nan)}, r"makes NaN or infinity of blocks\.0\.attn\.qkv"),
        ({A: torch.ones(3, 8, 1, 1)}, r"has .*lora_A\.weight, expected .* of linears alone"),
        ({A: torch.ones(3, 8).int()}, r"has .*lora_A\.weight, expected .* of linears alone"),
        ({"x.lora_A.weight": torch.ones(3, 8), "x.lora_B.weight": torch.ones(8, 3)}, r"adapts x,"),
        ({"base_model.model.x.bias": torch.ones(3)}, r"has base_model\.model\.x\.bias, expected"),
        ({"x.lora_magnitude_vector.weight": torch.ones(3)}, r"is a DoRA \(x\.lora_magnitude"),
        ({TWICE: torch.ones(3, 8)}, r"twice, under two names"),
        ({"x.alpha": torch.tensor(3.0)}, r"has an alpha of x alone"),
        ({"blocks.0.attn.qkv.alpha": torch.tensor(5.0)}, r"has alpha 5 of .* 6; correct one"),
    ],
)  # fmt: skip
def test_tensors_of_something_else_are_refused(
    change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    tensors = {name: each for name, each in (_named() | change).items() if each is not None}
    _refused(message, _folder(tmp_path / "lora", tensors))


def test_alpha_that_is_said_is_not_given(tmp_path: Path) -> None:
    _refused("--lora-alpha 3, but .* says 6 itself", _folder(tmp_path / "lora"), alpha=3)


def test_what_is_no_lora_is_named(tmp_path: Path) -> None:
    _refused("has none of adapter_model.safetensors, pytorch_lora_weights", tmp_path)
    _refused("No such file", tmp_path / "nothing")
    save_file({}, tmp_path / "adapter_model.safetensors")
    _refused("holds no LoRA", tmp_path)
    metadata = {"lora_adapter_metadata": "[1]"}
    save_file(_named("diffusers"), tmp_path / "adapter_model.safetensors", metadata=metadata)
    _refused("expected settings by name", tmp_path)


def _pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16,
        sample_size=8, caption_channels=12,
    )  # fmt: skip


def _sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
        pooled_projection_dim=12, pos_embed_max_size=8,
    )  # fmt: skip


def _randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)


CONFIGS = [
    {"r": 4, "lora_alpha": 6},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_out.0": 9}},
]
TARGETS = ["to_q", "to_k", "to_out.0", "ff.net.2", "proj_out"]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_folder_of_peft_is_merged_as_peft_merges_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    base = {name: tensor.clone() for name, tensor in _pixart().state_dict().items()}
    adapted = peft.get_peft_model(_pixart(), peft.LoraConfig(target_modules=TARGETS, **config))
    _randomize(adapted)
    adapted.save_pretrained(tmp_path)
    found = read_lora(tmp_path).merged(base)
    _assert_near(found, adapted.merge_and_unload().state_dict())
    assert sum(not torch.equal(found[name], base[name]) for name in base) == 15


def _written_by_diffusers(config: dict[str, Any], folder: Path, *, says_alpha: bool) -> Any:
    """Write a LoRA as diffusers does, of a class for which it does; return the adapted model."""
    peft = pytest.importorskip("peft")
    from diffusers import StableDiffusion3Pipeline
    from diffusers.training_utils import _collate_lora_metadata

    model = _sd3()
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, **config))
    _randomize(model)
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        **(_collate_lora_metadata({"transformer": model}) if says_alpha else {}),
    )
    return model


def _fused(model: Any) -> dict[str, Tensor]:
    """Return a model's own tensors under their own names, the LoRA in them."""
    model.fuse_lora()
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.state_dict().items()
        if "lora_" not in name
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_a_file_of_diffusers_is_merged_as_diffusers_fuses_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    base = {name: tensor.clone() for name, tensor in _sd3().state_dict().items()}
    model = _written_by_diffusers(config, tmp_path, says_alpha=True)
    _assert_near(read_lora(tmp_path).merged(base), _fused(model))


def test_an_earlier_file_of_diffusers_says_no_alpha(tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in _sd3().state_dict().items()}
    model = _written_by_diffusers(CONFIGS[0], tmp_path, says_alpha=False)
    with pytest.raises(CheckpointError, match="does not say alpha"):
        read_lora(tmp_path)
    _assert_near(read_lora(tmp_path, alpha=6).merged(base), _fused(model))


# --- Loaded with a model ------------------------------------------------------------------------

QKV = "blocks.1.attn.qkv"


def _of_qkv(folder: Path, width: int) -> tuple[Path, Tensor]:
    """Write a LoRA of a DiT's qkv; return it and what it adds."""
    random = torch.Generator().manual_seed(2)
    down = torch.randn(2, width, generator=random)
    up = torch.randn(3 * width, 2, generator=random)
    names = [name.format(QKV) for name in STYLES["peft"]]
    tensors = dict(zip(names, (down, up), strict=True))
    return _folder(folder / "lora", tensors, r=2, lora_alpha=4), 2 * (up @ down)


def test_a_checkpoint_is_loaded_as_its_merged_self(tmp_path: Path) -> None:
    model = random_dit()
    heads = model.config.num_heads
    lora, added = _of_qkv(tmp_path, model.config.hidden_size)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "dit.safetensors")
    state[f"{QKV}.weight"] += added
    save_file(state, tmp_path / "merged.safetensors")
    hints = CheckpointHints(num_heads=heads, lora=lora)
    found = load_model(tmp_path / "dit.safetensors", hints)
    merged = load_model(tmp_path / "merged.safetensors", num_heads=heads)
    assert found.identity == merged.identity
    assert found.identity != load_model(tmp_path / "dit.safetensors", num_heads=heads).identity
    assert f"merged {lora} into 1 linears: rank 2, scale 2" in found.notes
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_of_diffusers_is_merged_under_its_own_names(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its to_q, to_k and to_v become one linear; the LoRA is of to_q alone."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, num_embeds_ada_norm=10,
    ).to(dtype)  # fmt: skip
    model.save_pretrained(tmp_path / "dit")
    module = "transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, 16), torch.randn(16, 2)
    names = [name.format(module) for name in STYLES["diffusers"]]
    save_file(dict(zip(names, (down, up), strict=True)), tmp_path / "lora.safetensors")
    hints = CheckpointHints(lora=tmp_path / "lora.safetensors", lora_alpha=1)
    found = load_model(tmp_path / "dit", hints)
    plain = load_model(tmp_path / "dit").model.state_dict()
    qkv = "blocks.0.attn.qkv.weight"
    expected = plain[qkv].clone()
    expected[:16] += 0.5 * (up @ down)
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, expected if name == qkv else plain[name]), name
    assert found.dtype == dtype


def test_an_alpha_of_no_lora_is_refused() -> None:
    with pytest.raises(CheckpointError, match="--lora-alpha 2 without --lora; leave it out"):
        load_model("digits", CheckpointHints(lora_alpha=2))


@pytest.mark.parametrize("app", [export.app, sample.app], ids=["export", "sample"])
def test_commands_take_a_lora(app: Any, tmp_path: Path) -> None:
    lora = _folder(tmp_path / "lora")
    output = ["out.onnx", "--model", "digits"] if app is export.app else ["digits", "-o", "images"]
    result = CliRunner().invoke(app, [*output, "--lora", str(lora), "--lora-alpha", "3"])
    assert result.exit_code == 2
    assert "--lora-alpha 3, but" in " ".join(result.output.split())
    assert "says 6 itself; leave the option out" in " ".join(result.output.split())
