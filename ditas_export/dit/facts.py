"""What is known of a model beside its tensors: values of fields, and where each stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditas_export.dit.pickle_machine import Inert
from ditas_export.dit.record_entries import READERS, NotFollowedError
from ditas_export.errors import CheckpointError
from ditas_export.process import VaeFactors


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of a field, and where it stands."""

    value: Any
    where: str  # "args.num_heads", "--num-heads", "scheduler_config.json beta_end"


Facts = Mapping[str, Fact]


def merged(*sources: Facts, where: str, remedy: str = "correct the record") -> dict[str, Fact]:
    """Return the facts of all sources.

    Raises:
        CheckpointError: two of them differ in a field; names both values and where they stand.
    """
    facts: dict[str, Fact] = {}
    for source in sources:
        for field, fact in source.items():
            known = facts.setdefault(field, fact)
            if known.value != fact.value:
                raise CheckpointError(
                    f"{where}: {known.where} gives {field} {_shown(known.value)}, {fact.where} "
                    f"gives {_shown(fact.value)}; {remedy}"
                )
    return facts


def facts_of_values(values: Mapping[str, Any], *, where: str, path: str = "") -> dict[str, Fact]:
    """Return the facts in a mapping of plain values; names that say nothing are left out.

    Args:
        values: what a record holds under its names.
        where: the file, for messages.
        path: what stands before a name in messages.

    Raises:
        CheckpointError: see `facts_of_training`.
    """
    facts: dict[str, Fact] = {}
    for name, value in values.items():
        if name not in READERS or value is None:
            continue
        place = f"{path}{name}"
        try:
            found = READERS[name](name, value)
        except NotFollowedError as error:
            raise CheckpointError(
                f"{where}: {place}={_shown(value)}: the model {error}, which is not followed (yet)"
            ) from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {place}={_shown(value)}; {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {place}: {error}; correct the record") from None
        facts = merged(
            facts, {field: Fact(each, place) for field, each in found.items()}, where=where
        )
    return merged(
        _with_conventions(facts, values, path), _family_of_spelling(values, path), where=where
    )


_SPELLINGS = (("sit", "Linear", "velocity"), ("repa", "linear", "v"))
"""A family, and how its training script calls a straight path and what is predicted.

Those of willisma/SiT and sihyun-yu/REPA, `train.py`; the model's name is SiT in both.
"""


def _family_of_spelling(values: Mapping[str, Any], path: str) -> dict[str, Fact]:
    """Return whose flow it is, where a part spells its path and prediction as a script does."""
    found = [values.get(name) for name in ("path_type", "prediction")]
    for family, *spelled in _SPELLINGS:
        if found == spelled:
            return {"family": Fact(family, f"{path}path_type")}
    return {}


def _with_conventions(
    facts: dict[str, Fact], values: Mapping[str, Any], path: str
) -> dict[str, Fact]:
    """Return facts with what two code bases mean by their names.

    OpenAI's `linear` has ends in proportion to 1000 / steps; latent diffusion's, which calls them
    `linear_start` and `linear_end`, is linear in the root.
    """
    schedule = facts.get("beta_schedule")
    is_linear = schedule is None or schedule.value == "linear"
    if "linear_start" in values and is_linear:
        return facts | {"beta_schedule": Fact("scaled_linear", f"{path}linear_start")}
    steps = facts.get("train_timesteps")
    if (
        "diffusion_steps" in values
        and steps is not None
        and is_linear
        and "beta_start" not in facts
    ):
        ends = {"beta_start": 0.1 / steps.value, "beta_end": 20 / steps.value}
        facts = facts | {field: Fact(value, steps.where) for field, value in ends.items()}
    return facts


def _shown(value: object) -> str:
    """Return a value as one short piece of text."""
    if isinstance(value, VaeFactors):
        return str(value)
    if isinstance(value, Inert):
        args = ", ".join(repr(arg) for arg in value.args if isinstance(arg, str | int))
        text = f"{value.name}({args})"
    else:
        text = repr(value)
    return " ".join(text.split())[:60]
