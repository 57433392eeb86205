"""What PixArts are asked and fed: a prompt's tokens, a time, latents; and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.conditions.options import PIXELS_PER_LATENT
from ditas_export.errors import ConditionsError
from ditas_export.families.base import Bounds, Input, Shapes
from ditas_export.families.pixart_config import PixArtConfig

MASK = "encoder_attention_mask"


class PromptConditioned:
    """The part of a family that embeds inputs as PixArt does."""

    def modulation_inputs(self, config: PixArtConfig, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return SiLU of the embedding of every time step, of square images of the model's size."""
        from ditas_export.families.pixart_model import PixArt

        with torch.device("meta"):
            embedder = PixArt(config).adaln_single.emb
        prefix = "adaln_single.emb."
        state = {name: parameters[f"{prefix}{name}"] for name in embedder.state_dict()}
        embedder.load_state_dict(state, assign=True)
        first, last = config.process.times
        times = torch.arange(int(first), int(last) + 1)
        side = float(config.sample_size * PIXELS_PER_LATENT)
        with torch.no_grad():
            embedded: Tensor = embedder(
                times,
                resolution=torch.full((len(times), 2), side),
                aspect_ratio=torch.ones(len(times), 1),
                batch_size=len(times),
                hidden_dtype=torch.float32,
            )
        return functional.silu(embedded)

    def embedders(self) -> tuple[str, ...]:
        """Return how names of what embeds the inputs begin."""
        return ("pos_embed", "adaln_single.emb", "caption_projection")

    def tables(self, config: PixArtConfig) -> Shapes:
        """Return shapes of the embedders' tables."""
        width, patch = config.hidden_size, config.patch_size
        return {"pos_embed.proj.weight": (width, config.in_channels, patch, patch)}

    def inputs(self, config: PixArtConfig) -> tuple[Input, ...]:
        """Return latents, times, the prompts' tokens and mask, and α's micro-conditions."""
        side = config.sample_size
        first, last = config.process.times
        steps = Bounds(first=first, last=last, what="of the schedule")
        kept = Bounds(first=0, last=1, what="1 for a token, 0 for padding")
        real, whole = torch.float32, torch.int64
        latents, captions = (config.in_channels, side, side), ("tokens", config.caption_channels)
        asked = (
            Input(name="hidden_states", dtype=real, shape=latents, is_feature=True),
            Input(name="timestep", dtype=whole, shape=(), bounds=steps),
            Input(name="encoder_hidden_states", dtype=real, shape=captions, is_feature=True),
            Input(name=MASK, dtype=whole, shape=("tokens",), bounds=kept),
        )
        if not config.use_additional_conditions:
            return asked
        return (
            *asked,
            Input(name="resolution", dtype=real, shape=(2,)),
            Input(name="aspect_ratio", dtype=real, shape=(1,)),
        )

    def sizes(self, _config: PixArtConfig) -> Mapping[str, tuple[int, int, int]]:
        """Return how many tokens a prompt has: α's have 120 at most, Σ's 300."""
        return {"tokens": (1, 300, 512)}

    def conditions(self, config: PixArtConfig, embeddings: Path | None) -> PromptEmbeddings:
        """Return the prompts of an embeddings file.

        Raises:
            ConditionsError: none is given.
            ArtifactError: it does not fit.
        """
        if embeddings is None:
            raise ConditionsError(
                "this model is asked by prompts; pass their embeddings, --embeddings "
                "FILE.safetensors (ditas-embed PIPELINE --output FILE.safetensors writes it)"
            )
        return PromptEmbeddings.load(embeddings, inputs=self.inputs(config)[2:])
