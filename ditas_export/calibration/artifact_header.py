"""What the header of a quantized model says, and the tensors that it asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from ditas_export.dit.fitting import Wanted
from ditas_export.dit.tensor_files import abbreviated
from ditas_export.errors import ArtifactError
from ditas_export.families.base import ModelConfig
from ditas_export.families.identity import ModelIdentity
from ditas_export.families.registry import family_of, linear_shapes
from ditas_export.saved_records import Within, check_fields, from_record

FLOAT_PREFIX = "float."
"""How the names of float parameters begin in the file."""

TINIEST = math.ulp(0.0)
"""The least number that is more than 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearFacts:
    """What the header says of a linear."""

    bits: Literal[4, 8]
    shape: tuple[Annotated[int, Within(1, 2**24)], ...]
    alpha: Annotated[float, Within(0, 1)] | None
    output_snr_db: Any  # a number, or one of "inf", "-inf" and "nan"
    rank: Annotated[int, Within(0, 65_536)]

    def __post_init__(self) -> None:
        """Refuse what no linear has."""
        check_fields(self, ArtifactError)
        figure = self.output_snr_db
        if isinstance(figure, bool) or not isinstance(figure, int | float):
            if figure not in ("inf", "-inf", "nan"):
                raise ArtifactError("output_snr_db is no figure; expected decibels")
        elif not -1e6 <= figure <= 1e6:
            raise ArtifactError("output_snr_db is beyond all decibels; expected -1e6 to 1e6")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactHeader:
    """The header of a quantized model; of an earlier format `config` instead of the identity."""

    family: str = "dit"  # what earlier versions wrote
    linears: Mapping[str, LinearFacts]
    activation_bits: Literal[8, 16]
    adaln_bits: Literal[4, 8, 16] = 16
    settings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    proofs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # facts by part
    identity: ModelIdentity | None = None
    config: Mapping[str, Any] | None = None


def artifact_header(values: Mapping[str, Any]) -> ArtifactHeader:
    """Return what a header says.

    Raises:
        ArtifactError: a name that is missing or not known, or a value of another type or range.
    """
    return from_record(ArtifactHeader, values, error=ArtifactError)


def wanted_tensors(
    config: ModelConfig, linears: Mapping[str, LinearFacts], adaln_bits: int
) -> dict[str, Wanted]:
    """Return what a file of a model's linears must hold, by name.

    Raises:
        ArtifactError: facts of other linears than the model has, or of other shapes.
    """
    shapes, family = linear_shapes(config), family_of(config)
    if odd := sorted(shapes.keys() ^ linears.keys()):
        raise ArtifactError(f"facts of {abbreviated(odd)} are missing or of no linear of the model")
    wanted: dict[str, Wanted] = {}
    for name, shape in shapes.items():
        facts = linears[name]
        if facts.shape != shape:
            raise ArtifactError(f"{name} is said to be {facts.shape}, the model has {shape}")
        wanted |= {f"{name}.{part}": each for part, each in wanted_of_linear(facts).items()}
    with torch.device("meta"):
        parameters = family.module(config).state_dict()
    for name in shapes:
        del parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    for name in family.modulations(config) if adaln_bits != 16 else ():
        rows, columns = parameters.pop(f"{name}.weight").shape
        wanted[f"{name}.codes"] = _codes(rows, columns, adaln_bits)
        wanted[f"{name}.scale"] = Wanted((rows, None))
    wanted |= {f"{FLOAT_PREFIX}{name}": Wanted(tuple(value.shape))
               for name, value in parameters.items()}  # fmt: skip
    return wanted


def wanted_of_linear(facts: LinearFacts) -> dict[str, Wanted]:
    """Return what a linear's tensors must be, by part."""
    rows, columns = facts.shape
    parts = {
        "codes": _codes(rows, columns, facts.bits),
        "multipliers": Wanted((rows, None), torch.int8, low=1),
        "row_scale": Wanted((rows,), low=TINIEST),
        "bias": Wanted((rows,)),
        "smoothing_scale": Wanted((columns,), low=TINIEST),
        "step_ranges": Wanted((None,), low=0),
    }
    if facts.rank:
        parts["low_rank.left_codes"] = Wanted((rows, facts.rank), torch.int8)
        parts["low_rank.right_codes"] = Wanted((facts.rank, columns), torch.int8)
        parts["low_rank.divisor"] = Wanted((facts.rank,), torch.int32, low=1)
    return parts


def _codes(rows: int, columns: int, bits: int) -> Wanted:
    """Return what codes must be: INT8, or two INT4 a byte."""
    if bits == 8:
        return Wanted((rows, columns), torch.int8)
    return Wanted((-(-rows * columns // 2),), torch.uint8)
