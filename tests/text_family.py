"""A family that is asked in words: one self-contained block of cross-attention over tokens.

It is what the package has to know of such models and no more: a dynamic dimension beside the batch,
a mask, a group whose padded tokens do not count, conditions of a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.dit.model import position_embedding, timestep_features
from ditas_export.errors import ConditionsError
from ditas_export.families.base import (
    Block,
    Bounds,
    Conditions,
    FamilyModel,
    FusedAttention,
    Group,
    Input,
    ModelInputs,
    Modulation,
    Multiply,
    Rows,
    Shapes,
    Stage,
    State,
    Wide,
)
from ditas_export.process import DIT_PROCESS, FlowProcess, Process

WORDS, MASK = "encoder_hidden_states", "encoder_attention_mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextConfig:
    """Its shape."""

    input_size: int = 8
    in_channels: int = 4
    hidden_size: int = 96
    text_size: int = 48
    depth: int = 2
    process: Process | FlowProcess = DIT_PROCESS

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (self.in_channels, self.input_size, self.input_size)

    @property
    def num_tokens(self) -> int:
        return (self.input_size // 2) ** 2

    @property
    def out_channels(self) -> int:
        return 2 * self.in_channels

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class TextBlock(nn.Module):
    """A modulated norm, attention of the image's tokens to the words, an MLP."""

    def __init__(self, config: TextConfig, *, folded: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.folded = folded
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(config.text_size, width)
        self.to_v = nn.Linear(config.text_size, width)
        self.to_out = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, c: Tensor, words: Tensor, bias: Tensor) -> Tensor:
        shift, scale = self.modulation(functional.silu(c))[:, None].chunk(2, dim=-1)
        factor = scale if self.folded else 1 + scale
        scores = self.to_q(self.norm(x) * factor + shift) @ self.to_k(words).mT
        mixed = (scores * x.shape[-1] ** -0.5 + bias[:, None]).softmax(dim=-1) @ self.to_v(words)
        x = x + self.to_out(mixed)
        return x + self.fc2(functional.gelu(self.fc1(self.norm(x))))


class TextModel(FamilyModel):
    """Latents, times and words to ε and a variance."""

    config: TextConfig

    def __init__(self, config: TextConfig, *, folded: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.x_embedder = nn.Conv2d(config.in_channels, width, kernel_size=2, stride=2)
        self.pos_embed = nn.Parameter(position_embedding(width, config.input_size // 2)[None])
        self.t_embedder = nn.Linear(256, width)
        self.blocks = nn.ModuleList(TextBlock(config, folded=folded) for _ in range(config.depth))
        self.final = nn.Linear(width, 4 * config.out_channels)

    def embed(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        x = self.x_embedder(hidden_states).flatten(2).mT + self.pos_embed
        return x, self.t_embedder(timestep_features(timestep).to(x.dtype))

    def bias(self, mask: Tensor) -> Tensor:
        return (1 - mask.to(self.dtype)) * -10_000.0

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Tensor:
        x, c = self.embed(hidden_states, timestep)
        for block in self.blocks:
            x = block(x, c, encoder_hidden_states, self.bias(encoder_attention_mask))
        side = self.config.input_size
        out = self.final(x).reshape(x.shape[0], side // 2, side // 2, 2, 2, -1)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], -1, side, side)


def _run(block: nn.Module, state: State, constants: State) -> State:
    return {"x": block(state["x"], **constants)}


@dataclass(frozen=True, slots=True)
class TextFamily:
    """Its tables."""

    name: str = "text"

    @property
    def config_type(self) -> type[TextConfig]:
        return TextConfig

    def serves(self, _config: TextConfig) -> bool:
        return True

    def module(self, config: TextConfig, *, folded: bool = False) -> TextModel:
        return TextModel(config, folded=folded)

    def blocks(self, config: TextConfig) -> tuple[Block, ...]:
        width = config.hidden_size
        scale, shift = slice(width, 2 * width), slice(0, width)
        groups = (
            Group(
                linears=("to_q",),
                folds=(Modulation(linear="modulation", scale=scale, shift=shift),),
            ),
            Group(linears=("to_k", "to_v"), folds=(Multiply(),), mask=MASK),
            Group(linears=("to_out",), folds=(Rows(linear="to_v", rows=slice(None)),)),
            Group(linears=("fc1",), folds=(Multiply(),)),
            Group(linears=("fc2",), folds=(Multiply(),)),
        )
        stages = (Stage(groups=groups, run=_run),)
        return tuple(Block(path=f"blocks.{index}", stages=stages) for index in range(config.depth))

    def enter(self, model: TextModel, inputs: ModelInputs) -> tuple[State, State]:
        latents, timesteps, words, mask = inputs.values()
        x, c = model.embed(latents, timesteps)
        return {"x": x}, {"c": c, "words": words, "bias": model.bias(mask)}

    def shapes(self, config: TextConfig, rows: int, tokens: int) -> tuple[Shapes, Shapes]:
        width = config.hidden_size
        words = {"words": (rows, 5, config.text_size), "bias": (rows, 5)}
        return {"x": (rows, tokens, width)}, {"c": (rows, width), **words}

    def modulations(self, config: TextConfig) -> Mapping[str, tuple[slice, ...]]:
        width = config.hidden_size
        return {
            f"blocks.{index}.modulation": (slice(width, 2 * width),)
            for index in range(config.depth)
        }

    def modulation_inputs(self, _config: TextConfig, parameters: Mapping[str, Tensor]) -> Tensor:
        weight, bias = parameters["t_embedder.weight"], parameters["t_embedder.bias"]
        features = timestep_features(torch.arange(1000))
        return functional.silu(functional.linear(features, weight, bias))

    def float_linears(self, _config: TextConfig) -> tuple[str, ...]:
        return ("final",)

    def embedders(self) -> tuple[str, ...]:
        return ("x_embedder", "t_embedder", "pos_embed")

    def tables(self, config: TextConfig) -> Shapes:
        return {"pos_embed": (1, config.num_tokens, config.hidden_size)}

    def inputs(self, config: TextConfig) -> tuple[Input, ...]:
        side = config.input_size
        last = config.process.times[1]
        return (
            Input(
                name="hidden_states",
                dtype=torch.float32,
                shape=(config.in_channels, side, side),
                is_feature=True,
            ),
            Input(
                name="timestep",
                dtype=torch.int64,
                shape=(),
                bounds=Bounds(first=0, last=last, what="of the schedule"),
            ),
            Input(
                name=WORDS,
                dtype=torch.float32,
                shape=("tokens", config.text_size),
                is_feature=True,
            ),
            Input(
                name=MASK,
                dtype=torch.int64,
                shape=("tokens",),
                bounds=Bounds(first=0, last=1, what="padding and tokens"),
            ),
        )

    def sizes(self, _config: TextConfig) -> Mapping[str, tuple[int, int, int]]:
        return {"tokens": (1, 6, 12)}

    def conditions(self, config: TextConfig, embeddings: Path | None) -> Conditions:
        if embeddings is None:
            raise ConditionsError("this model is asked by prompts; pass --embeddings")
        return PromptEmbeddings.load(embeddings, inputs=self.inputs(config)[2:])

    def attentions(self, _config: TextConfig) -> Sequence[FusedAttention]:
        return []

    def wides(self, _config: TextConfig) -> Sequence[Wide]:
        return []


def text_model(config: TextConfig | None = None, *, seed: int = 0) -> TextModel:
    """Return a model of random weights, plausible in size."""
    model = TextModel(config or TextConfig())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                std = 0.02 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
                std *= (
                    0.03 if name.startswith("final") else 1.0
                )  # a variance that sampling survives
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval().requires_grad_(requires_grad=False)


def prompts(count: int = 6, tokens: int = 7, *, seed: int = 3) -> PromptEmbeddings:
    """Return prompts of two words or more, and no prompt, which has one."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(count + 1, tokens, TextConfig().text_size, generator=generator)
    mask = (torch.arange(tokens) < 2 + torch.arange(count + 1)[:, None] % (tokens - 1)).long()
    mask[-1] = (torch.arange(tokens) < 1).long()
    return PromptEmbeddings(tensors={WORDS: words, MASK: mask}, has_null=True)
