"""Small PixArts of random weights, α with micro-conditions and Σ."""

from __future__ import annotations

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.families.base import ModelInputs
from ditas_export.families.pixart_config import PixArtConfig
from ditas_export.families.pixart_model import PixArt

CAPTION_CHANNELS = 48

SIGMA = PixArtConfig(
    num_attention_heads=3,
    attention_head_dim=32,
    num_layers=2,
    sample_size=8,
    caption_channels=CAPTION_CHANNELS,
    interpolation_scale=1.0,
)
ALPHA = PixArtConfig(**{**SIGMA.to_dict(), "process": SIGMA.process,
                        "use_additional_conditions": True})  # fmt: skip


def pixart(config: PixArtConfig = SIGMA, *, seed: int = 0) -> PixArt:
    """Return a model of random weights, plausible in size."""
    model = PixArt(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            std *= 0.2 if name.startswith("proj_out") else 1.0  # a variance that sampling survives
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval().requires_grad_(requires_grad=False)


def pixart_inputs(
    config: PixArtConfig = SIGMA, *, batch: int = 3, tokens: int = 7, seed: int = 1
) -> ModelInputs:
    """Return rows at times over the schedule, of prompts of one token or more."""
    random = torch.Generator().manual_seed(seed)
    side = config.sample_size
    lengths = 1 + torch.arange(batch) * 3 % tokens
    inputs: dict[str, Tensor] = {
        "hidden_states": torch.randn(batch, config.in_channels, side, side, generator=random),
        "timestep": torch.linspace(3, 990, batch).long(),
        "encoder_hidden_states": torch.randn(
            batch, tokens, config.caption_channels, generator=random
        ),
        "encoder_attention_mask": (torch.arange(tokens) < lengths[:, None]).long(),
    }
    if config.use_additional_conditions:
        inputs["resolution"] = torch.tensor([[64.0, 64.0]]).repeat(batch, 1)
        inputs["aspect_ratio"] = torch.linspace(0.5, 2, batch)[:, None]
    return ModelInputs(inputs)


def prompts(config: PixArtConfig = SIGMA, *, count: int = 5, seed: int = 2) -> PromptEmbeddings:
    """Return embeddings of prompts, and of no prompt."""
    asked = pixart_inputs(config, batch=count + 1, seed=seed).conditions
    return PromptEmbeddings(tensors=asked, has_null=True)


def diffusers_model(config: PixArtConfig) -> PixArtTransformer2DModel:
    """diffusers' own, made from what its config.json would say."""
    model = PixArtTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.attention_head_dim,
        num_layers=config.num_layers,
        sample_size=config.sample_size,
        caption_channels=config.caption_channels,
        cross_attention_dim=config.hidden_size,
        use_additional_conditions=config.use_additional_conditions,
    )
    model.load_state_dict(pixart(config).state_dict())
    return model.eval().requires_grad_(requires_grad=False)
