"""What a training checkpoint, a file's metadata or a caller says of a model beside its tensors.

Each becomes *facts* (`facts.py`): a field of `DiTConfig` or `Process` -> its value, and where that
stands. Two facts of one field that differ are an error that names both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from torch import Tensor

from ditas_export.dit.facts import Fact, facts_of_values, merged
from ditas_export.dit.record_entries import FLOW_ENTRIES, NOT_FOLLOWED_ENTRIES, READERS
from ditas_export.dit.record_parts import RecordPart, json_or_text, opened, plain, record_parts
from ditas_export.dit.schedules import facts_of_table, tables_of_part
from ditas_export.errors import CheckpointError
from ditas_export.options import CheckpointHints, FamilyChoice
from ditas_export.process import BetaSchedule

NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
"""Objects of a pickle that are read as a dict, and hold nothing else."""


def facts_of_training(parts: Iterable[RecordPart], *, where: str) -> dict[str, Fact]:
    """Return what the options in a training checkpoint say.

    Args:
        parts: of the checkpoint, its options a Namespace, a dict or anything like them.
        where: the file, for messages.

    Raises:
        CheckpointError: something that is not followed, no value of its kind, or two that differ.
    """
    return _facts_of_parts(parts, where=where, before="")


def facts_of_metadata(metadata: Mapping[str, str], *, where: str) -> dict[str, Fact]:
    """Return what safetensors metadata say: values as JSON, by themselves or in parts.

    Raises:
        CheckpointError: see `facts_of_training`.
    """
    values = {name: json_or_text(text) for name, text in metadata.items()}
    return _facts_of_parts(record_parts(values), where=where, before="metadata ")


def places_read(parts: Iterable[RecordPart]) -> set[tuple[str, ...]]:
    """Return where in a checkpoint something is recorded: entries, and the parts around them."""
    places = {
        part.written[name] for part in parts for name in {*_told(part), *tables_of_part(part)}
    }
    return {place[: length + 1] for place in places for length in range(len(place))}


def _facts_of_parts(parts: Iterable[RecordPart], *, where: str, before: str) -> dict[str, Fact]:
    """Return what all parts say."""
    facts: dict[str, Fact] = {}
    for part in parts:
        prefix = f"{before}{part.prefix}"
        found = [facts_of_values(_told(part), where=where, path=prefix)]
        found += [
            facts_of_table(table, name=f"{prefix}{name}", where=where)
            for name, table in tables_of_part(part).items()
        ]
        facts = merged(facts, *found, where=where)
    return facts


def _told(part: RecordPart) -> dict[str, Any]:
    """Return the entries of a part whose names say something, as plain values."""
    return {
        name: plain(value)
        for name, value in part.entries.items()
        if name in READERS and not _is_no_entry(name, value)
    }


def _is_no_entry(name: str, value: Any) -> bool:
    """Return whether a value is none that an entry has: a tensor, or a part of its own."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and name != "trained_betas"
    part = opened(value)
    if not isinstance(part, Mapping) or name in {*NOT_FOLLOWED_ENTRIES, *FLOW_ENTRIES}:
        return False
    return name != "vae" or "scaling_factor" not in part


def facts_of_hints(hints: CheckpointHints) -> dict[str, Fact]:
    """Return what a caller says, each under the name of its option.

    Raises:
        CheckpointError: an impossible value.
    """
    facts = {}
    if hints.num_heads is not None:
        if hints.num_heads < 1:
            raise CheckpointError(f"--num-heads {hints.num_heads}: a DiT has at least one head")
        facts["num_heads"] = Fact(hints.num_heads, "--num-heads")
    if hints.num_classes is not None:
        if hints.num_classes < 0:
            raise CheckpointError(f"--num-classes {hints.num_classes}; expected 0 or more")
        facts["num_classes"] = Fact(hints.num_classes, "--num-classes")
    if hints.no_null_class:
        facts["null_row"] = Fact(False, "--no-null-class")
    if hints.betas is not None:
        facts |= _facts_of_betas(hints.betas)
    if hints.family is not None:
        if hints.family not in (families := get_args(FamilyChoice)):
            raise CheckpointError(f"--family {hints.family}; expected {' or '.join(families)}")
        facts["family"] = Fact(hints.family, "--family")
    return facts


def _facts_of_betas(text: str) -> dict[str, Fact]:
    """Return the schedule that `--betas NAME[,START,END[,STEPS]]` names."""
    expected = (
        f"--betas {text}; expected NAME[,START,END[,STEPS]], NAME one of "
        f"{', '.join(get_args(BetaSchedule))}, START and END empty for the last"
    )
    if not isinstance(text, str):
        raise CheckpointError(expected)
    name, *rest = (part.strip() for part in text.split(","))
    if name not in get_args(BetaSchedule) or len(rest) not in (0, 2, 3):
        raise CheckpointError(expected)
    try:
        ends = [float(part) for part in rest[:2] if part]
        steps = [int(part) for part in rest[2:]]
    except ValueError:
        raise CheckpointError(expected) from None
    if len(ends) == 1 or not all(map(math.isfinite, ends)):
        raise CheckpointError(expected)
    if name == "squaredcos_cap_v2" and ends:
        raise CheckpointError(expected)
    if name == "scaled_linear" and not ends:
        raise CheckpointError(f"--betas {text}: scaled_linear has no usual ends; add START,END")
    values: dict[str, str | float] = {"beta_schedule": name}
    if ends:
        values |= {"beta_start": ends[0], "beta_end": ends[1]}
    if steps:
        values["train_timesteps"] = steps[0]
    return {field: Fact(value, "--betas") for field, value in values.items()}
