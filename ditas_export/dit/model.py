"""The Diffusion Transformer with the parameter names of the published checkpoints.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023. Written from
the paper and the checkpoints' names and shapes. Names of shapes: N batch, C latent channels,
H and W latent size, T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.errors import CheckpointError
from ditas_export.family_model import FamilyModel
from ditas_export.process import DIT_PROCESS, FlowProcess, Process
from ditas_export.saved_records import Above, Within, check_fields, from_record

FREQUENCY_EMBEDDING_SIZE = 256
"""Width of the sinusoidal time-step features, fixed in every published checkpoint."""

MOST_BLOCKS = 1024
"""Blocks that a model may have; the published ones have 12 to 28."""

_MOST_POSITIONS = 2**27
"""Numbers of a position table: 65 536 tokens of width 2048."""

MAX_PERIOD = 10_000.0
"""Longest period of the sinusoidal time-step features."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTConfig:
    """What a model computes beside its tensors; `input_size` is the latent's side in pixels.

    `mlp_norm_eps` and `frequency_shift` are constants in which diffusers' DiT departs from the
    published one.
    """

    input_size: Annotated[int, Within(1, 4096)] = 32
    patch_size: Annotated[int, Within(1, 4096)] = 2
    in_channels: Annotated[int, Within(1, 4096)] = 4
    hidden_size: Annotated[int, Within(1, 65_536)] = 1152
    depth: Annotated[int, Within(1, MOST_BLOCKS)] = 28
    num_heads: Annotated[int, Within(1, 65_536)] = 16
    mlp_ratio: Annotated[float, Above(0, 64)] = 4.0
    num_classes: Annotated[int, Within(0, 10_000_000)] = 1000  # the null row not counted
    null_row: bool = True  # whether the label table's last row stands for "no class"
    learn_sigma: bool = True  # whether the output has C more channels, the learned variance
    layer_norm_eps: Annotated[float, Above(0, 1)] = 1e-6
    mlp_norm_eps: Annotated[float, Above(0, 1)] = 1e-6  # of norm2; 1e-5 in diffusers
    frequency_shift: Annotated[int, Within(0, 1)] = 0  # see timestep_features; 1 in diffusers
    process: Process | FlowProcess = DIT_PROCESS

    def __post_init__(self) -> None:
        """Refuse what no DiT can have, naming the numbers."""
        check_fields(self, CheckpointError)
        if self.input_size % self.patch_size:
            raise CheckpointError(
                f"input_size={self.input_size} is no multiple of patch_size={self.patch_size}"
            )
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"hidden_size={self.hidden_size} is no multiple of num_heads={self.num_heads}; "
                f"pass the right --num-heads"
            )
        if self.hidden_size % 4:
            raise CheckpointError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 (sin-cos positions)"
            )
        if self.num_tokens * self.hidden_size > _MOST_POSITIONS:
            raise CheckpointError(
                f"{self.num_tokens} tokens of width {self.hidden_size}; expected a table of "
                f"{_MOST_POSITIONS:,} positions' features at most"
            )
        if not self.mlp_hidden_size >= 1:
            raise CheckpointError(f"mlp_ratio={self.mlp_ratio} leaves the MLP no hidden layer")
        if self.label_rows < 1:
            raise CheckpointError("num_classes=0 without a null row: a label table has a row")
        if isinstance(self.process, FlowProcess):
            if self.learn_sigma:
                raise CheckpointError(
                    "learn_sigma=True with a flow, whose models ship without the half of the "
                    "output that is no velocity; expected learn_sigma=False"
                )
        elif self.process.variance == "learned_range" and not self.learn_sigma:
            raise CheckpointError(
                "variance='learned_range', but the model puts out no variance "
                "(learn_sigma=False); expected fixed_small or fixed_large"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens per image, T."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of an image's latents, (C, H, W)."""
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def mlp_hidden_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return round(self.hidden_size * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels of the output: ε and, where it is learned, the variance: 2C or C."""
        return 2 * self.in_channels if self.learn_sigma else self.in_channels

    @property
    def label_rows(self) -> int:
        """Rows of the label table: the classes and the null row."""
        return self.num_classes + self.null_row

    @property
    def null_class(self) -> int:
        """The label that stands for "no class".

        Raises:
            CheckpointError: the label table has no null row.
        """
        if not self.null_row:
            raise CheckpointError("this model has no null class: its label table has no such row")
        return self.num_classes

    @property
    def num_labels(self) -> int:
        """Labels that images can be asked for by, from 0: the classes, or the table's only row."""
        return max(1, self.num_classes)

    @property
    def is_guidable(self) -> bool:
        """Whether there is a class and a null class to tell apart: guidance needs both."""
        return self.null_row and self.num_classes > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a file's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: object) -> DiTConfig:
        """Return the configuration that `to_dict` gave, of this version or an earlier one.

        Fields that a file of an earlier version lacks have the values that it meant: the defaults.

        Raises:
            CheckpointError: no mapping, an unknown name, or a value that no DiT has.
        """
        return from_record(cls, values)


def timestep_features(timesteps: Tensor, *, frequency_shift: int = 0) -> Tensor:
    """Return the sinusoidal features of time steps, cosines first.

    Frequency i of 128 is `10000^(-i / (128 - frequency_shift))`.

    Args:
        timesteps: (N,), any number type; steps of the full schedule, from 0.
        frequency_shift: 0 as published; 1 as diffusers computes it.

    Returns:
        (N, 256) float32, whatever the network's float type: halves cannot hold the phases.
    """
    half = FREQUENCY_EMBEDDING_SIZE // 2
    indices = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    # The published order of operations: float32 phases near step 999 feel any other.
    frequencies = torch.exp(-math.log(MAX_PERIOD) * indices / (half - frequency_shift))
    angles = timesteps.float()[:, None] * frequencies[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


def position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Return the fixed 2-D sin-cos position embedding of a square grid.

    Returns:
        (grid_size², hidden_size) float32; see `sincos_table`.
    """
    return sincos_table(hidden_size, grid_size, grid_size).float()


def sincos_table(hidden_size: int, rows: int, columns: int) -> Tensor:
    """Return the 2-D sin-cos position table of a grid.

    The first half of the features encodes the column, the second the row, each as sines then
    cosines.

    Returns:
        (rows · columns, hidden_size) float64, tokens in row-major order.
    """
    quarter = hidden_size // 4
    frequencies = MAX_PERIOD ** (-torch.arange(quarter, dtype=torch.float64) / quarter)

    def one_axis(count: int) -> Tensor:
        angles = torch.arange(count, dtype=torch.float64)[:, None] * frequencies[None]
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)  # (count, D/2)

    of_columns = one_axis(columns)[None, :, :].expand(rows, -1, -1)
    of_rows = one_axis(rows)[:, None, :].expand(-1, columns, -1)
    return torch.cat([of_columns, of_rows], dim=-1).reshape(rows * columns, hidden_size)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x · (1 + scale) + shift; x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulate_by_factor(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """Return x · factor + shift: what a folded model does, whose biases hold the 1 of 1 + scale."""
    return x * factor.unsqueeze(1) + shift.unsqueeze(1)


Modulate = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Modulates x (N, T, D) by two chunks of a modulation, shift and scale, (N, D) each."""


class PatchEmbed(nn.Module):
    """Image (N, C, H, W) to tokens (N, T, D) by one strided convolution."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed patches, in row-major order."""
        embedded: Tensor = self.proj(x)
        return embedded.flatten(2).transpose(1, 2)  # (N, T, D)


class TimestepEmbedder(nn.Module):
    """Time steps (N,) to vectors (N, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.frequency_shift = config.frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_EMBEDDING_SIZE, config.hidden_size),
            nn.SiLU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, timesteps: Tensor) -> Tensor:
        """Embed time steps; the features are made in float32 and cast to the weights' type."""
        features = timestep_features(timesteps, frequency_shift=self.frequency_shift)
        embedded: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedded


class LabelEmbedder(nn.Module):
    """Class labels (N,), null class included, to vectors (N, D)."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.label_rows, config.hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """Look the labels up."""
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class Attention(nn.Module):
    """Multi-head self-attention whose two linears are `qkv` and `proj`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def mix(self, qkv: Tensor) -> Tensor:
        """Return softmax(q kᵀ / √d) v: all of attention between its two linears.

        Args:
            qkv: (N, T, 3D), rows q, k, v, each split into heads.

        Returns:
            (N, T, D), the input of `proj`.
        """
        n, t, width = qkv.shape
        heads = qkv.reshape(n, t, 3, self.num_heads, width // 3 // self.num_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)  # (N, heads, T, d) each
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).reshape(n, t, width // 3)

    def forward(self, x: Tensor) -> Tensor:
        """Attend; x and the result are (N, T, D)."""
        out: Tensor = self.proj(self.mix(self.qkv(x)))
        return out


class Mlp(nn.Module):
    """fc1, GELU (tanh form), fc2."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(config.mlp_hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token; x and the result are (N, T, D)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Chunks(NamedTuple):
    """The six chunks of a block's modulation, (N, D) each, in the order on which every fold relies.

    In a folded model the scales are factors; see `modulate_by_factor`.
    """

    shift_msa: Tensor
    scale_msa: Tensor
    gate_msa: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor


class DiTBlock(nn.Module):
    """A transformer block with adaptive layer norm (adaLN-Zero)."""

    def __init__(self, config: DiTConfig, modulate: Modulate = modulate) -> None:
        super().__init__()
        width = config.hidden_size
        self.modulate = modulate
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps, elementwise_affine=False)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(width, eps=config.mlp_norm_eps, elementwise_affine=False)
        self.mlp = Mlp(config)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def chunks(self, c: Tensor) -> Chunks:
        """Return the modulation for a conditioning vector (N, D)."""
        return Chunks(*self.adaLN_modulation(c).chunk(6, dim=1))

    def attention_input(self, x: Tensor, chunks: Chunks) -> Tensor:
        """Return what attention reads, (N, T, D)."""
        return self.modulate(self.norm1(x), chunks.shift_msa, chunks.scale_msa)

    def add_attention(
        self, x: Tensor, chunks: Chunks, attend: Callable[[Tensor], Tensor], read: Tensor
    ) -> Tensor:
        """Return x + gate · attend(read): all of attention, or its last linear alone."""
        return x + chunks.gate_msa.unsqueeze(1) * attend(read)

    def add_mlp(self, x: Tensor, chunks: Chunks) -> Tensor:
        """Return x + gate · MLP of the second modulated norm."""
        mlp: Tensor = self.mlp(self.modulate(self.norm2(x), chunks.shift_mlp, chunks.scale_mlp))
        return x + chunks.gate_mlp.unsqueeze(1) * mlp

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return the next hidden state; x (N, T, D), c (N, D)."""
        chunks = self.chunks(c)
        x = self.add_attention(x, chunks, self.attn, self.attention_input(x, chunks))
        return self.add_mlp(x, chunks)


class FinalLayer(nn.Module):
    """The last modulated norm and the projection to pixels."""

    def __init__(self, config: DiTConfig, modulate: Modulate = modulate) -> None:
        super().__init__()
        width = config.hidden_size
        self.modulate = modulate
        self.norm_final = nn.LayerNorm(width, eps=config.layer_norm_eps, elementwise_affine=False)
        self.linear = nn.Linear(width, config.patch_size**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Return (N, T, p·p·2C); x (N, T, D), c (N, D)."""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(self.modulate(self.norm_final(x), shift, scale))
        return out


class DiT(FamilyModel):
    """Latents, time steps and class labels to ε and the learned variance.

    `state_dict()` has exactly the keys of the published checkpoints.

    Args:
        config: shape of the model.
        modulate: how the norms are modulated: as published, or as in a folded model.
    """

    config: DiTConfig
    pos_embed: Tensor

    def __init__(self, config: DiTConfig, modulate: Modulate = modulate) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        grid_size = config.input_size // config.patch_size
        positions = position_embedding(config.hidden_size, grid_size)
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config, modulate) for _ in range(config.depth))
        self.final_layer = FinalLayer(config, modulate)

    def embed(
        self, latents: Tensor, timesteps: Tensor, class_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the first hidden state (N, T, D) and the conditioning vector (N, D)."""
        hidden = self.x_embedder(latents) + self.pos_embed
        return hidden, self.t_embedder(timesteps) + self.y_embedder(class_labels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """Return (N, 2C, H, W) from (N, T, p·p·2C)."""
        p, channels = self.config.patch_size, self.config.out_channels
        grid = self.config.input_size // p
        x = x.reshape(x.shape[0], grid, grid, p, p, channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], channels, grid * p, grid * p)

    def forward(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Predict the noise and the variance's interpolation coefficient.

        Args:
            latents: (N, C, H, W), in the parameters' float type.
            timesteps: (N,), steps of the full schedule, from 0.
            class_labels: (N,) int64; `num_classes` is the null class, where there is one.

        Returns:
            (N, 2C, H, W): the first C channels are ε, the rest the learned variance; (N, C, H, W)
            where the variance is not learned.
        """
        hidden, c = self.embed(latents, timesteps, class_labels)
        for block in self.blocks:
            hidden = block(hidden, c)
        return self.unpatchify(self.final_layer(hidden, c))


def initialize_adaln_zero(model: DiT, *, seed: int) -> None:
    """Initialise for training: Xavier linears, adaLN-Zero, a zero final projection.

    Source: Peebles and Xie 2023, section 3.2 (adaLN-Zero block).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            nn.init.zeros_(module.bias)
    patches = model.x_embedder.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1), generator=generator)
    nn.init.zeros_(patches.bias)  # type: ignore[arg-type]
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02, generator=generator)
    for name, parameter in model.named_parameters():
        if name.startswith("t_embedder.mlp") and name.endswith("weight"):
            nn.init.normal_(parameter, std=0.02, generator=generator)
        if "adaLN_modulation" in name or name.startswith("final_layer.linear"):
            nn.init.zeros_(parameter)


def randomize(model: DiT, *, seed: int) -> None:
    """Fill every parameter with plausible random values, adaLN and final layer included.

    A freshly initialised DiT is the identity in every block and hides every error; one made here
    is right for structure, speed and size, never for quality. Biases get values too.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "pos_embed":
                continue
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            std = 0.02 if parameter.ndim == 1 or "embedding_table" in name else fan_in**-0.5
            if "adaLN_modulation" in name:
                std *= 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
