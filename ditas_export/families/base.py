"""What a family of transformers states of itself: what is quantized, and what folds where.

The identity behind every table: `x Wᵀ = (x / s)(W · s)ᵀ`. The linears of a group read one input and
share one s; the division goes into whatever made that input, which the group's folds name. All
paths are module paths within their block, and the checkpoint's own names.

Everything else of the package (walk, fold and its proof, artefact, graph, lowering, contract,
comparison) reads these tables, and knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ditas_export.family_model import Bounds as Bounds
from ditas_export.family_model import Conditions as Conditions
from ditas_export.family_model import FamilyModel as FamilyModel
from ditas_export.family_model import Input as Input
from ditas_export.family_model import ModelConfig as ModelConfig
from ditas_export.family_model import ModelInputs as ModelInputs
from ditas_export.family_model import ReadCheckpoint as ReadCheckpoint
from ditas_export.family_model import plural as plural

ALL = slice(None)


def _all() -> slice:
    """Return every channel."""
    return ALL


State = Mapping[str, Tensor]
"""Tensors by name, rows first: what passes from stage to stage, or stays the same in all."""


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """1/s goes into rows of a quantized linear: row scales and bias `/ s`; the codes stay."""

    linear: str
    rows: slice
    channels: slice = field(
        default_factory=_all
    )  # of the input that they make: s of these is what goes there


@dataclass(frozen=True, slots=True, kw_only=True)
class Modulation:
    """1/s goes into rows of a modulation linear: shift and scale of `x(1 + scale) + shift`.

    Shift rows `W, b ← W/s, b/s`; scale rows `W ← W/s`, `b ← (b + 1)/s`, the 1 in the bias.
    """

    linear: str
    scale: slice
    shift: slice
    channels: slice = field(default_factory=_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """1/s goes into rows of a block's own table, and of the vector that all blocks add theirs to.

    With table T and vector t, both (6, D) and the vector one a row of the batch, a block computes
    `x(1 + T_scale + t_scale) + T_shift + t_shift`. Folded: `T_shift ← T_shift/s`,
    `T_scale ← (T_scale + 1)/s`, the 1 in the table, and `t ← t · multiplier`, 1/s in both rows and
    1 elsewhere. The multiplier, of the table's shape, is a parameter of the folded block.
    """

    table: str  # the parameter's path in the block
    multiplier: str  # that of the folded block
    vector: str  # module path, in the model, of the linear that makes the vector
    scale: int  # rows of the table
    shift: int
    channels: slice = field(default_factory=_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """1/s goes into a norm's weight, and its bias where it has one: `w, b ← w/s, b/s`."""

    norm: str
    channels: slice = field(default_factory=_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiply:
    """Nothing that makes the input takes 1/s: one multiplication of x by it stays.

    Of an input that other folds make a part of: by 1 there.
    """

    channels: slice = field(default_factory=_all)


Fold = Rows | Modulation | Table | Norm | Multiply
"""Where 1/s goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears that share one s: they read one input, or inputs that are made by the same rows."""

    linears: tuple[str, ...]
    folds: tuple[Fold, ...]
    """Each takes s of its channels: one for everything that makes the input."""
    is_token_wise: bool = False
    """Whether the input of a token depends on that token's state alone. The walk then computes no
    more of it than it looks at."""
    mask: str | None = None
    """The model's input, (N, tokens), that is 0 where a token of what the group reads is padding:
    such a token counts in no maximum and no moment. None: all tokens are real."""
    reads_one_input: bool = True
    """Whether its linears read one input. Joint attention's outputs are two: both are mixtures of
    the values of both sides, so what divides those values divides both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A piece of a block whose groups are walked one after the other.

    The fewer groups a stage has, the less is computed again for each of them; what lies between two
    stages is kept.
    """

    groups: tuple[Group, ...]  # in the order in which the stage uses them
    run: Callable[[nn.Module, State, State], State]
    """From the block, what passes on and the constants to what passes on: (rows, T, …) tensors that
    depend on quantized linears."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What is folded, proved, solved and kept as one; no fold reaches out of it."""

    path: str  # of its module
    stages: tuple[Stage, ...]

    def groups(self) -> Iterator[Group]:
        """Yield its groups, in order."""
        for stage in self.stages:
            yield from stage.groups

    def name(self, path: str) -> str:
        """Return the module path in the model of a path in the block."""
        return f"{self.path}.{path}"

    @property
    def linears(self) -> tuple[str, ...]:
        """Module paths of its quantized linears, in walk order."""
        return tuple(self.name(path) for group in self.groups() for path in group.linears)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedAttention:
    """Multi-head attention between two linears: what ONNX Runtime has one operator for."""

    reads: str  # the linear that gives q, k and v, in this order
    feeds: str  # the linear that reads what attention gives
    heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Wide:
    """Two linears with one operator between them, through which a wide activation passes."""

    makes: str
    reads: str
    parts: int  # equal ones, in which it may pass; 1: as a whole


Config = TypeVar("Config", bound=ModelConfig)
Model = TypeVar("Model", bound=FamilyModel)


class Family(Protocol[Config, Model]):
    """A family of transformers, as the rest of the package sees it; it holds nothing of a model."""

    @property
    def name(self) -> str:
        """What files, artefacts and `--family` call it."""
        ...

    @property
    def config_type(self) -> type[Config]:
        """The class of its configurations."""
        ...

    def serves(self, config: Config) -> bool:
        """Return whether a model of this configuration is of the family."""
        ...

    def module(self, config: Config, *, folded: bool = False) -> Model:
        """Return the model, as published or as folding leaves it: scales are factors then."""
        ...

    def blocks(self, config: Config) -> tuple[Block, ...]:
        """Return its blocks, in order."""
        ...

    def enter(self, model: Model, inputs: ModelInputs) -> tuple[State, State]:
        """Return what passes into the first stage, and the constants of all stages."""
        ...

    def shapes(self, config: Config, rows: int, tokens: int) -> tuple[Shapes, Shapes]:
        """Return the shapes of what `enter` gives: what passes on, and the constants."""
        ...

    def modulations(self, config: Config) -> Mapping[str, tuple[slice, ...]]:
        """Return the modulation linears of the model, and the rows of each that make scales.

        They may be stored as integers, and every scale's 1 goes into their biases.
        """
        ...

    def modulation_inputs(self, config: Config, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return what the modulation linears read, (tokens, K) float32: their inputs' distribution.

        Args:
            config: of the model.
            parameters: checkpoint name -> float32; those of the embedders are used.
        """
        ...

    def float_linears(self, config: Config) -> tuple[str, ...]:
        """Return the linears outside the embedders that stay float and are no modulation."""
        ...

    def embedders(self) -> tuple[str, ...]:
        """Return how names of what embeds the inputs begin."""
        ...

    def tables(self, config: Config) -> Shapes:
        """Return shapes of constants by which a file of this configuration is told, by name."""
        ...

    def inputs(self, config: Config) -> tuple[Input, ...]:
        """Return the inputs of the exported file, in order: see `ModelInputs`."""
        ...

    def sizes(self, config: Config) -> Mapping[str, tuple[int, int, int]]:
        """Return the smallest, usual and largest size of the inputs' dynamic dimensions, by name.

        Engines are built for these.
        """
        ...

    def conditions(self, config: Config, embeddings: Path | None) -> Conditions:
        """Return what images can be asked for.

        Args:
            config: of the model.
            embeddings: the file of prompts' embeddings, for families that are asked by prompts.

        Raises:
            ConditionsError: embeddings that are needed and missing, or given and of no use; says
                how to get them, or to leave them out.
        """
        ...

    def attentions(self, config: Config) -> Sequence[FusedAttention]:
        """Return every attention of the model, by module paths in the model."""
        ...

    def wides(self, config: Config) -> Sequence[Wide]:
        """Return every wide activation of the model, by module paths in the model."""
        ...


AnyFamily = Family[Any, Any]
"""A family, its configurations' class unknown."""
