"""DiT: class-conditional transformers with adaptive layer norm, and their kin with the same blocks.

| linear   | x comes from             | 1/s folds into                                   |
|----------|--------------------------|--------------------------------------------------|
| attn.qkv | modulate(norm1, msa)     | rows shift_msa, scale_msa of adaLN_modulation.1  |
| attn.proj| softmax(q kᵀ) v          | the V rows of qkv (weight, bias, low rank)       |
| mlp.fc1  | modulate(norm2, mlp)     | rows shift_mlp, scale_mlp of adaLN_modulation.1  |
| mlp.fc2  | GELU, not homogeneous    | stays: one multiplication of x by 1/s            |

Source: Peebles and Xie 2023; DiTAS (Dong et al. 2025), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.conditions.labels import CLASS_LABELS, ClassLabels
from ditas_export.dit.model import (
    Chunks,
    DiT,
    DiTBlock,
    DiTConfig,
    LabelEmbedder,
    TimestepEmbedder,
    modulate,
    modulate_by_factor,
)
from ditas_export.errors import ConditionsError
from ditas_export.families.base import (
    Block,
    Bounds,
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

ADALN = "adaLN_modulation.1"
FINAL_ADALN = "final_layer.adaLN_modulation.1"
FINAL_LINEAR = "final_layer.linear"

LABELS_PER_TIME = 8
"""Labels seen at each time by the modulation: seven classes in turn, and the null class."""

TIMES = 1000
"""Times of a flow at which the modulation is seen, evenly spaced."""


def _chunk(name: str, width: int) -> slice:
    """Return the rows of a block's modulation linear that make one of the six chunks."""
    index = Chunks._fields.index(name)
    return slice(index * width, (index + 1) * width)


def _attend(block: nn.Module, state: State, constants: State) -> State:
    """Run the norm, qkv and attention's products."""
    assert isinstance(block, DiTBlock)
    read = block.attention_input(state["x"], block.chunks(constants["c"]))
    return {"x": state["x"], "mixed": block.attn.mix(block.attn.qkv(read))}


def _project(block: nn.Module, state: State, constants: State) -> State:
    """Run proj, and add what it gives."""
    assert isinstance(block, DiTBlock)
    chunks = block.chunks(constants["c"])
    return {"x": block.add_attention(state["x"], chunks, block.attn.proj, state["mixed"])}


def _transform(block: nn.Module, state: State, constants: State) -> State:
    """Run the MLP, and add what it gives."""
    assert isinstance(block, DiTBlock)
    return {"x": block.add_mlp(state["x"], block.chunks(constants["c"]))}


@dataclass(frozen=True, slots=True)
class DiTFamily:
    """Models of the class `DiT`, whatever they predict."""

    name: str
    process: type  # what their configurations have

    @property
    def config_type(self) -> type[DiTConfig]:
        """The class of their configurations."""
        return DiTConfig

    def serves(self, config: DiTConfig) -> bool:
        """Return whether a model predicts what the family's do."""
        return isinstance(config.process, self.process)

    def module(self, config: DiTConfig, *, folded: bool = False) -> DiT:
        """Return the model, as published or as folding leaves it."""
        return DiT(config, modulate_by_factor if folded else modulate)

    def blocks(self, config: DiTConfig) -> tuple[Block, ...]:
        """Return its blocks, in order."""
        stages = _stages(config.hidden_size)
        return tuple(Block(path=f"blocks.{index}", stages=stages) for index in range(config.depth))

    def enter(self, model: DiT, inputs: ModelInputs) -> tuple[State, State]:
        """Return the first hidden state x (N, T, D) and the conditioning vector c (N, D)."""
        hidden, c = model.embed(**inputs)
        return {"x": hidden}, {"c": c}

    def shapes(self, config: DiTConfig, rows: int, tokens: int) -> tuple[Shapes, Shapes]:
        """Return the shapes of x and of c."""
        width = config.hidden_size
        return {"x": (rows, tokens, width)}, {"c": (rows, width)}

    def modulations(self, config: DiTConfig) -> Mapping[str, tuple[slice, ...]]:
        """Return the blocks' modulation linears and the final layer's, and their scale rows."""
        width = config.hidden_size
        scales = (_chunk("scale_msa", width), _chunk("scale_mlp", width))
        return {
            **{f"blocks.{index}.{ADALN}": scales for index in range(config.depth)},
            FINAL_ADALN: (slice(width, 2 * width),),  # shift comes first
        }

    def modulation_inputs(self, config: DiTConfig, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return SiLU(c) of every time step, or of 1000 times of a flow, with eight labels each.

        The null class, which guidance asks for in every second row, comes at each time; the others
        take turns, so that all are seen. Without a null class all rows of the label table take
        turns.
        """
        times = _times(config)
        in_turn = LABELS_PER_TIME - 1 if config.is_guidable else LABELS_PER_TIME
        labels = (torch.arange(len(times) * in_turn) % config.num_labels).reshape(-1, in_turn)
        if config.is_guidable:
            labels = functional.pad(labels, (0, 1), value=config.null_class)
        with torch.no_grad():
            of_times = _loaded(TimestepEmbedder(config), "t_embedder", parameters)(times)
            of_labels = _loaded(LabelEmbedder(config), "y_embedder", parameters)(labels)
            return functional.silu(of_times[:, None] + of_labels).flatten(0, 1)

    def float_linears(self, _config: DiTConfig) -> tuple[str, ...]:
        """Return the projection to pixels."""
        return (FINAL_LINEAR,)

    def embedders(self) -> tuple[str, ...]:
        """Return how names of what embeds the inputs begin."""
        return ("x_embedder", "t_embedder", "y_embedder", "pos_embed")

    def tables(self, config: DiTConfig) -> Shapes:
        """Return shapes of the embedders' tables."""
        patch = config.patch_size
        return {
            "y_embedder.embedding_table.weight": (config.label_rows, config.hidden_size),
            "pos_embed": (1, config.num_tokens, config.hidden_size),
            "x_embedder.proj.weight": (config.hidden_size, config.in_channels, patch, patch),
        }

    def inputs(self, config: DiTConfig) -> tuple[Input, ...]:
        """Return latents, times and labels."""
        side, process = config.input_size, config.process
        first, last = process.times
        times = "of the flow" if process.time_dtype.is_floating_point else "of the schedule"
        labels = "the last for no class" if config.null_row else "its classes"
        return (
            Input(
                name="latents",
                dtype=torch.float32,
                shape=(config.in_channels, side, side),
                is_feature=True,
            ),
            Input(
                name="timesteps",
                dtype=process.time_dtype,
                shape=(),
                bounds=Bounds(first=first, last=last, what=times),
            ),
            Input(
                name=CLASS_LABELS,
                dtype=torch.int64,
                shape=(),
                bounds=Bounds(first=0, last=config.label_rows - 1, what=labels),
            ),
        )

    def sizes(self, _config: DiTConfig) -> Mapping[str, tuple[int, int, int]]:
        """Return nothing: the batch alone is dynamic."""
        return {}

    def conditions(self, config: DiTConfig, embeddings: Path | None) -> ClassLabels:
        """Return the classes.

        Raises:
            ConditionsError: embeddings, which a model of classes does not read.
        """
        if embeddings is not None:
            raise ConditionsError(
                f"{embeddings} holds embeddings of prompts, and this model is asked by classes; "
                f"leave --embeddings out"
            )
        return ClassLabels(config)

    def attentions(self, config: DiTConfig) -> Sequence[FusedAttention]:
        """Return every block's attention."""
        return [
            FusedAttention(
                reads=block.name("attn.qkv"), feeds=block.name("attn.proj"), heads=config.num_heads
            )
            for block in self.blocks(config)
        ]

    def wides(self, config: DiTConfig) -> Sequence[Wide]:
        """Return every block's MLP, its parts as wide as the hidden states."""
        parts, rest = divmod(config.mlp_hidden_size, config.hidden_size)
        return [
            Wide(
                makes=block.name("mlp.fc1"),
                reads=block.name("mlp.fc2"),
                parts=1 if rest else parts,
            )
            for block in self.blocks(config)
        ]


def _stages(width: int) -> tuple[Stage, ...]:
    """Return the three stages of a block: attention is computed once in each pass."""
    qkv = Group(
        linears=("attn.qkv",),
        folds=(
            Modulation(
                linear=ADALN, scale=_chunk("scale_msa", width), shift=_chunk("shift_msa", width)
            ),
        ),
        is_token_wise=True,
    )
    proj = Group(
        linears=("attn.proj",),
        folds=(Rows(linear="attn.qkv", rows=slice(2 * width, 3 * width)),),
        is_token_wise=True,
    )
    fc1 = Group(
        linears=("mlp.fc1",),
        folds=(
            Modulation(
                linear=ADALN, scale=_chunk("scale_mlp", width), shift=_chunk("shift_mlp", width)
            ),
        ),
        is_token_wise=True,
    )
    fc2 = Group(linears=("mlp.fc2",), folds=(Multiply(),), is_token_wise=True)
    return (
        Stage(groups=(qkv,), run=_attend),
        Stage(groups=(proj,), run=_project),
        Stage(groups=(fc1, fc2), run=_transform),
    )


def _times(config: DiTConfig) -> Tensor:
    """Return the times at which the modulation is seen: every step, or evenly those of a flow."""
    first, last = config.process.times
    if config.process.time_dtype == torch.int64:
        return torch.arange(int(first), int(last) + 1)
    return torch.linspace(first, last, TIMES)


def _loaded(module: nn.Module, path: str, parameters: Mapping[str, Tensor]) -> nn.Module:
    """Return a module with its parameters of the model."""
    module.load_state_dict({name: parameters[f"{path}.{name}"] for name in module.state_dict()})
    return module
