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

from torch import nn

from ditas_export.dit.model import (
    Chunks,
    DiT,
    DiTBlock,
    DiTConfig,
    modulate,
    modulate_by_factor,
)
from ditas_export.families.base import (
    Block,
    Fold,
    FusedAttention,
    Group,
    ModelInputs,
    Modulation,
    Multiply,
    Rows,
    Shapes,
    Stage,
    State,
    Wide,
)
from ditas_export.families.class_conditioned import ClassConditioned

ADALN = "adaLN_modulation.1"
FINAL_ADALN = "final_layer.adaLN_modulation.1"
FINAL_LINEAR = "final_layer.linear"


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


@dataclass(frozen=True)
class DiTFamily(ClassConditioned):
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

    def float_linears(self, _config: DiTConfig) -> tuple[str, ...]:
        """Return the projection to pixels."""
        return (FINAL_LINEAR,)

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

    def group(linear: str, fold: Fold, *, stacked: int = 1) -> Group:
        return Group(linears=(linear,), folds=(fold,), stacked=stacked, is_token_wise=True)

    def modulation(part: str) -> Modulation:
        scale, shift = _chunk(f"scale_{part}", width), _chunk(f"shift_{part}", width)
        return Modulation(linear=ADALN, scale=scale, shift=shift)

    v = Rows(linear="attn.qkv", rows=slice(2 * width, 3 * width))
    qkv, proj = group("attn.qkv", modulation("msa"), stacked=3), group("attn.proj", v)
    fc1, fc2 = group("mlp.fc1", modulation("mlp")), group("mlp.fc2", Multiply())
    return (
        Stage(groups=(qkv,), run=_attend),
        Stage(groups=(proj,), run=_project),
        Stage(groups=(fc1, fc2), run=_transform),
    )
