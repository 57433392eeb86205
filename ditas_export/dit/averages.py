"""Averaged weights that are harder to find than by name, or not whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ditas_export.dit.layouts import OFFICIAL
from ditas_export.dit.pickle_machine import Inert
from ditas_export.dit.tensor_files import abbreviated
from ditas_export.dit.weight_groups import Group, inner_parts, says_averaged
from ditas_export.errors import CheckpointError

_FEWEST_LISTED = 10
"""Tensors in the shortest list that is taken for a model's parameters."""


def averages_without_names(
    content: Mapping[Any, Any], groups: Sequence[Group], where: str
) -> list[Group]:
    """Return averaged weights that are a list, or whose names have lost their dots.

    Raises:
        CheckpointError: averaged tensors that cannot be told apart.
    """
    raw = next((group for group in groups if not group.is_averaged), None)
    found = []
    for path, part in inner_parts(content):
        for name, inner in part.items():
            here = (*path, str(name))
            is_list = isinstance(inner, list | tuple) and len(inner) >= _FEWEST_LISTED
            if is_list and says_averaged(here) and all(isinstance(t, Tensor) for t in inner):
                found.append(Group(path=here, prefix="", entries=_named(inner, raw, here, where)))
        if raw is not None and raw.path == path and (group := _undotted(part, raw)) is not None:
            found.append(group)
    if not found and not any(group.is_averaged for group in groups):
        _refuse_unread_averages(content, where)
    return found


def _named(
    tensors: Sequence[Tensor], raw: Group | None, path: tuple[str, ...], where: str
) -> dict[str, Any]:
    """Return a list of parameters by name, in the order in which a model lists them."""
    if raw is not None:
        names = [name for name, value in raw.entries.items() if isinstance(value, Tensor)]
    else:
        names = _official_names(tensors)
    if len(names) == len(tensors) + 1 and "pos_embed" in names:  # takes no gradients: not averaged
        names.remove("pos_embed")
    fits = len(names) == len(tensors) and (
        raw is None
        or all(
            raw.entries[name].shape == tensor.shape
            for name, tensor in zip(names, tensors, strict=True)
        )
    )
    if not fits:
        raise CheckpointError(
            f"{where}: its averaged weights, {'/'.join(path)}, are {len(tensors)} tensors without "
            f"names, which do not fit a DiT's parameters; write the averaged model's state_dict()"
        )
    return dict(zip(names, tensors, strict=True))


def _official_names(tensors: Sequence[Tensor]) -> list[str]:
    """Return as many names as there are tensors, of a published DiT of some depth."""
    names = [slot.name for slot in OFFICIAL.slots(1)]
    if tensors[0].ndim == 4:  # the patches come first where no position table does
        names.remove("pos_embed")
    in_block = [name for name in names if name.startswith("blocks.0.")]
    depth, rest = divmod(len(tensors) - len(names), len(in_block))
    if rest == len(in_block) - 1:  # one name too many: no label table
        names.remove(OFFICIAL.label_table)
        depth, rest = depth + 1, 0
    if rest or depth < 0:
        return []
    first = names.index(in_block[0])
    blocks = [
        name.replace("blocks.0.", f"blocks.{index}.")
        for index in range(depth + 1)
        for name in in_block
    ]
    return [*names[:first], *blocks, *names[first + len(in_block) :]]


def _undotted(part: Mapping[Any, Any], raw: Group) -> Group | None:
    """Return the averages that Lightning models keep as buffers: names without their dots."""
    ending = OFFICIAL.fc1_weight.replace(".", "")
    for name in part:
        if not isinstance(name, str) or not name.endswith(ending) or "." not in name:
            continue
        prefix = name.removesuffix(ending)
        named = {
            full: part[f"{prefix}{full.replace('.', '')}"]
            for full in raw.entries
            if f"{prefix}{full.replace('.', '')}" in part
        }
        if says_averaged((prefix,)):
            return Group(path=raw.path, prefix=prefix, entries=named)
    return None


def _refuse_unread_averages(content: Mapping[Any, Any], where: str) -> None:
    """Refuse to fall back to raw weights where averaged ones are there and cannot be read."""
    entries = ((name, inner) for _, part in inner_parts(content) for name, inner in part.items())
    for name, inner in entries:
        if not isinstance(name, str) or not says_averaged((name,)):
            continue
        if (count := _count_tensors(inner)) >= _FEWEST_LISTED:
            kind = f" in a {inner.name}" if isinstance(inner, Inert) else ""
            raise CheckpointError(
                f"{where}: {name!r} holds {count} tensors{kind}, but not under a DiT's names; "
                f"write the averaged model's state_dict() alone, or the raw one's to export that"
            )


def _count_tensors(value: Any) -> int:
    """Return how many tensors a part holds, objects that were not made included."""
    count, waiting, seen = 0, [value], {id(value)}
    while waiting:
        value = waiting.pop()
        count += isinstance(value, Tensor)
        if isinstance(value, Inert):
            value = [value.args, value.state, value.entries, value.items]
        elif isinstance(value, Mapping):
            value = list(value.values())
        for inner in value if isinstance(value, list | tuple) else ():
            if id(inner) not in seen:
                seen.add(id(inner))
                waiting.append(inner)
    return count


def with_positions(chosen: Group, groups: Sequence[Group]) -> Group:
    """Return averaged weights with the raw ones' position table, if averaging left it out."""
    if "pos_embed" in chosen.entries or not chosen.is_averaged:
        return chosen
    for group in groups:
        if "pos_embed" in group.entries:
            return replace(
                chosen, entries={**chosen.entries, "pos_embed": group.entries["pos_embed"]}
            )
    return chosen


def refuse_partial_average(chosen: Group, groups: Sequence[Group], where: str) -> None:
    """Refuse an average that lacks some of the raw weights: what is left may look like a model."""
    modules = {name.split(".")[0] for name in chosen.entries} - {"pos_embed"} | {"y_embedder"}
    for raw in groups if chosen.is_averaged else ():
        names = [name for name in raw.entries if name.split(".")[0] in modules]
        shared = [name for name in names if name in chosen.entries]
        lost = [name for name in names if name not in chosen.entries]
        if (
            lost
            and len(shared) >= len(chosen.entries) - 1  # but for pos_embed
            and all(_shape(raw.entries[name]) == _shape(chosen.entries[name]) for name in shared)
        ):
            raise CheckpointError(
                f"{where}: the averaged weights, {chosen.name}, lack {len(lost)} tensors of "
                f"{raw.name} ({abbreviated(lost)}); write a whole state_dict()"
            )


def _shape(value: Any) -> Any:
    """Return a tensor's shape, None of anything else."""
    return value.shape if isinstance(value, Tensor) else None
