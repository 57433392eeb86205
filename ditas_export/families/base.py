"""What a family of transformers states of itself: what is quantized, and what folds where.

The identity behind every table: `x Wᵀ = (x / s)(W · s)ᵀ`. The linears of a group read one input and
share one s; the division goes into whatever made that input, which the group's folds name. All
paths are module paths within their block, and the checkpoint's own names.

Everything else of the package (walk, fold and its proof, artefact, graph, lowering, contract,
comparison) reads these tables, and knows no family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from ditas_export.family_model import Bounds as Bounds
from ditas_export.family_model import Conditions as Conditions
from ditas_export.family_model import FamilyModel as FamilyModel
from ditas_export.family_model import Input as Input
from ditas_export.family_model import ModelConfig as ModelConfig
from ditas_export.family_model import ModelInputs as ModelInputs
from ditas_export.family_model import is_image as is_image
from ditas_export.family_model import output_shape as output_shape
from ditas_export.family_model import plural as plural

ALL = slice(None)

State = Mapping[str, Tensor]
"""Tensors by name, rows first: what passes from stage to stage, or stays the same in all."""


Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """1/s goes into rows of a quantized linear: row scales and bias `/ s`; the codes stay."""

    linear: str
    rows: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Modulation:
    """1/s goes into rows of a modulation linear: shift and scale of `x(1 + scale) + shift`.

    Shift rows `W, b ← W/s, b/s`; scale rows `W ← W/s`, `b ← (b + 1)/s`, the 1 in the bias.
    """

    linear: str
    scale: slice
    shift: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiply:
    """Nothing that makes the input takes 1/s: one multiplication of x by it stays."""


Fold = Rows | Modulation | Multiply
"""Where 1/s goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Linears that read one input, and so share one s."""

    linears: tuple[str, ...]
    folds: tuple[Fold, ...]  # each takes all of s: one for everything that makes the input
    is_token_wise: bool = False
    """Whether the input of a token depends on that token's state alone. The walk then computes no
    more of it than it looks at."""
    mask: str | None = None
    """The model's input, (N, tokens), that is 0 where a token of what the group reads is padding:
    such a token counts in no maximum and no moment. None: all tokens are real."""


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
