"""What a PixArt computes beside its tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from ditas_export.dit.model import MOST_BLOCKS
from ditas_export.errors import CheckpointError
from ditas_export.process import DIT_PROCESS, Process
from ditas_export.saved_records import Above, Within, check_fields

MOST_POSITIONS = 2**27
"""Numbers of a position table: 65 536 tokens of width 2048."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PixArtConfig:
    """What varies of `PixArtTransformer2DModel`, under diffusers' names, and the process.

    The defaults are those of PixArt-Σ-XL at 1024 pixels.
    """

    num_attention_heads: Annotated[int, Within(1, 65_536)] = 16
    attention_head_dim: Annotated[int, Within(1, 65_536)] = 72
    in_channels: Annotated[int, Within(1, 4096)] = 4
    out_channels: Annotated[int, Within(1, 8192)] = 8  # C, or 2C where the variance is learned
    num_layers: Annotated[int, Within(1, MOST_BLOCKS)] = 28
    sample_size: Annotated[int, Within(1, 4096)] = 128  # side of the latents
    patch_size: Annotated[int, Within(1, 4096)] = 2
    caption_channels: Annotated[int, Within(1, 65_536)] = 4096  # width of a prompt's tokens
    norm_eps: Annotated[float, Above(0, 1)] = 1e-6
    interpolation_scale: Annotated[float, Above(0, 1024)] = 2.0  # of the positions
    use_additional_conditions: bool = False  # α at 1024 pixels: resolution and aspect ratio
    process: Process = DIT_PROCESS

    def __post_init__(self) -> None:
        """Refuse what no PixArt can have, naming the numbers."""
        check_fields(self, CheckpointError)
        if self.sample_size % self.patch_size:
            raise CheckpointError(
                f"sample_size={self.sample_size} is no multiple of patch_size={self.patch_size}"
            )
        if self.hidden_size % 4:
            raise CheckpointError(
                f"num_attention_heads * attention_head_dim = {self.hidden_size} must be a multiple "
                f"of 4 (sin-cos positions)"
            )
        if self.use_additional_conditions and self.hidden_size % 3:
            raise CheckpointError(
                f"num_attention_heads * attention_head_dim = {self.hidden_size} must be a multiple "
                f"of 3: two of its thirds stand for the resolution, one for the aspect ratio"
            )
        if self.num_tokens * self.hidden_size > MOST_POSITIONS:
            raise CheckpointError(
                f"{self.num_tokens} tokens of width {self.hidden_size}; expected a table of "
                f"{MOST_POSITIONS:,} positions' features at most"
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise CheckpointError(
                f"out_channels={self.out_channels}; a PixArt of in_channels={self.in_channels} has "
                f"as many, or twice as many where the variance is learned"
            )
        if self.process.variance == "learned_range" and self.out_channels == self.in_channels:
            raise CheckpointError(
                "variance='learned_range', but the model puts out no variance "
                "(out_channels=in_channels); expected fixed_small or fixed_large"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of an image's latents, (C, H, W)."""
        return (self.in_channels, self.sample_size, self.sample_size)

    @property
    def hidden_size(self) -> int:
        """Width of the tokens, D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, T."""
        return (self.sample_size // self.patch_size) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a file's header."""
        return asdict(self)
