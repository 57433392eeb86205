"""A PixArt's folders: as diffusers writes them, under both names of its class, and odd ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler
from pixart_fixture import ALPHA, SIGMA, diffusers_model, pixart, pixart_inputs
from safetensors.torch import load_file, save_file

from ditas_export.errors import CheckpointError
from ditas_export.families.load import load_model
from ditas_export.families.pixart_config import PixArtConfig
from ditas_export.options import CheckpointHints


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline's folder with a schedule and a VAE of its own."""
    diffusers_model(SIGMA).save_pretrained(tmp_path / "transformer")
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.001, beta_end=0.01, beta_schedule="scaled_linear"
    )
    scheduler.save_pretrained(tmp_path / "scheduler")
    vae = AutoencoderKL(block_out_channels=(32,), scaling_factor=0.25)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_a_pipeline_is_read_with_its_process(pipeline: Path) -> None:
    loaded = load_model(pipeline)
    process = loaded.identity.config.process
    assert (process.beta_schedule, process.beta_start, process.beta_end) == (  # type: ignore[union-attr]
        "scaled_linear", 0.001, 0.01,
    )  # fmt: skip
    assert process.variance == "learned_range"  # type: ignore[union-attr]
    assert process.vae is not None
    assert process.vae.scaling_factor == 0.25
    assert loaded.vae == str(pipeline)
    inputs = pixart_inputs()
    assert torch.equal(loaded.model(**inputs), pixart()(**inputs))


@pytest.mark.parametrize("config", [SIGMA, ALPHA], ids=["sigma", "alpha"])
def test_a_transformer_alone(config: PixArtConfig, tmp_path: Path) -> None:
    diffusers_model(config).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    loaded = load_model(tmp_path)
    assert loaded.identity.config == config
    for name, tensor in pixart(config).state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name


def test_an_old_folder_has_the_class_of_a_dit(pipeline: Path) -> None:
    config = load_model(pipeline).identity.config
    edited(pipeline, _class_name="Transformer2DModel", num_vector_embeds=None)
    assert load_model(pipeline).identity.config == config


def test_half_precision_variants(tmp_path: Path) -> None:
    diffusers_model(SIGMA).half().save_pretrained(tmp_path, variant="fp16")
    loaded = load_model(tmp_path)
    assert loaded.dtype == torch.float16
    assert loaded.model.dtype == torch.float32


def test_micro_conditions_are_diffusers_default_at_1024(tmp_path: Path) -> None:
    """Only config.json is asked: the weights are those of a model without."""
    diffusers_model(SIGMA).save_pretrained(tmp_path / "transformer")
    edited(tmp_path, sample_size=128, use_additional_conditions=None)
    with pytest.raises(CheckpointError, match=r"missing \(adaln_single\.emb\.\w*embedder"):
        load_model(tmp_path)
    edited(tmp_path, use_additional_conditions=False)
    config = load_model(tmp_path).identity.config
    assert isinstance(config, PixArtConfig)
    assert config.interpolation_scale == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_type": "ada_norm_zero"}, "a PixArt has 'ada_norm_single'"),
        ({"cross_attention_dim": 97}, "cross_attention_dim=97; a PixArt's is its width, 96"),
        ({"num_layers": 3}, r"12\d* missing|missing \(transformer_blocks\.2"),
        ({"caption_channels": None}, "caption_channels"),
        ({"in_channels": 3}, "out_channels=8"),
        ({"sample_size": 9}, "sample_size=9 is no multiple of patch_size=2"),
        ({"sample_size": "8"}, "sample_size='8'; expected a whole number"),
        ({"norm_eps": "1e-6"}, "norm_eps='1e-6'; expected a number"),
        ({"attention_head_dim": 30}, "its width, 90"),
    ],
)
def test_records_of_no_pixart(changes: dict[str, Any], message: str, pipeline: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(edited(pipeline, **changes))


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (CheckpointHints(num_classes=10), "has no classes; leave --num-classes out"),
        (CheckpointHints(family="sit"), "leave --family out"),
        (CheckpointHints(num_heads=4), "num_heads 3, --num-heads gives 4; leave the option out"),
        (CheckpointHints(betas="linear"), "beta_schedule"),
    ],
)
def test_hints_that_contradict(hints: CheckpointHints, message: str, pipeline: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(pipeline, hints)


def test_tensors_that_do_not_make_the_model(pipeline: Path) -> None:
    path = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["extra.weight"] = torch.ones(1)
    del tensors["transformer_blocks.1.attn2.to_k.bias"]
    tensors["scale_shift_table"] = tensors["scale_shift_table"][:1].clone()
    tensors["transformer_blocks.0.ff.net.2.bias"][3] = torch.nan
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as caught:
        load_model(pipeline)
    for part in (
        "1 missing (transformer_blocks.1.attn2.to_k.bias)",
        "1 unexpected (extra.weight)",
        "scale_shift_table (1, 96) instead of (2, 96)",
        "1 with NaN or infinity (transformer_blocks.0.ff.net.2.bias)",
    ):
        assert part in str(caught.value)
