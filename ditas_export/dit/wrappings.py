"""The weights inside what training wrote around them.

A checkpoint holds the parameters by name, or parts that do: raw and averaged weights, an optimizer,
options. Names may have a prefix (DistributedDataParallel, Lightning), or marks of torch.compile in
them. A *group* is all tensors under one path of parts and one prefix whose names are a DiT's.
Averaged weights win over raw ones, and what was chosen, stripped or left out is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditas_export.dit.averages import (
    averages_without_names,
    refuse_partial_average,
    with_positions,
)
from ditas_export.dit.pickle_machine import Inert
from ditas_export.dit.records import NAMESPACES
from ditas_export.dit.tensor_files import TensorFile, abbreviated
from ditas_export.dit.weight_groups import MARKS, Group, find_groups, inner_parts, part_at
from ditas_export.errors import CheckpointError

_USUAL_PARTS = ("", "model", "state_dict", "module", "net", "network", "params", "weights")
"""Where raw weights are, the better ones first, if there are several."""

_ADAPTER = re.compile(r"(?:^|[._])(?:lora|hada|lokr|dora|oft)(?:$|[._])|(?:^|\.)base_layer\.")
_TENSOR_MAKER = re.compile(r"_rebuild|_reconstruct|_frombuffer|_load_from_bytes|ndarray|Tensor")
"""Names of what makes arrays and tensors that are not plain ones."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """The parameters of a checkpoint."""

    tensors: Mapping[str, Tensor]
    part: str  # of a training checkpoint; empty where the file is nothing but weights
    notes: tuple[str, ...]  # one line each: what was chosen, stripped, left out


def choose_weights(
    file: TensorFile,
    anchors: Sequence[str],
    *,
    where: str,
    read: Collection[tuple[str, ...]] = (),
) -> Weights:
    """Return the weights of a checkpoint: the averaged ones if there are any.

    Args:
        file: what was read.
        anchors: names of which a DiT has one; they tell where its names start.
        where: the file, for messages.
        read: where in it records were found.

    Raises:
        CheckpointError: adapters (LoRA) instead of weights, several models of which none is the
            usual one, averaged weights that cannot be told apart, or a tensor that only code makes.
    """
    notes = []
    if not_made := [name for name in file.not_made if name not in NAMESPACES]:
        notes.append(f"of its pickle, not run and left out: {abbreviated(not_made)}")
    groups = list(find_groups(file.content, anchors))
    groups += averages_without_names(file.content, groups, where)
    if not groups:
        tensors = _all_tensors(file.content, where)
        _refuse_adapters(tensors, where)
        return Weights(tensors=tensors, part="", notes=tuple(notes))
    chosen = _best(groups, where)
    _refuse_adapters(chosen.entries, where)
    refuse_partial_average(chosen, groups, where)
    notes += _notes(chosen, groups)
    tensors, odd = _plain_tensors(with_positions(chosen, groups), where)
    places = [*_beside(file.content, chosen, groups), *((*chosen.path, name) for name in odd)]
    if unused := [place[-1] for place in places if place not in read]:
        notes.append(f"not used: {abbreviated(unused)}")
    return Weights(tensors=tensors, part="/".join(chosen.path), notes=tuple(notes))


def _notes(chosen: Group, groups: Sequence[Group]) -> Iterator[str]:
    """Yield what is to be said of the choice and of names."""
    if others := [group.name for group in groups if group is not chosen]:
        kind = "averaged" if chosen.is_averaged else "raw"
        yield f"took the {kind} weights, {chosen.name}; not used: {', '.join(others)}"
    if chosen.prefix:
        yield f"stripped {chosen.prefix!r} from every name"
    if chosen.is_marked:
        yield "stripped the marks of torch.compile and the like from names"


def _best(groups: Sequence[Group], where: str) -> Group:
    """Return the first averaged group, else the raw one in the usual place."""
    if averaged := [group for group in groups if group.is_averaged]:
        return averaged[0]
    if len(groups) == 1:
        return groups[0]
    for usual in _USUAL_PARTS:
        for group in groups:
            if (group.path[-1] if group.path else group.prefix.rstrip(".")) == usual:
                return group
    raise CheckpointError(
        f"{where} holds several models: {', '.join(group.name for group in groups)}; write the one "
        f"that is meant to a file of its own"
    )


def _plain_tensors(group: Group, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return a group's tensors, and the names of the rest; refuse tensors that only code makes."""
    tensors: dict[str, Tensor] = {}
    odd: list[str] = []
    for name, value in group.entries.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Inert) and _TENSOR_MAKER.search(value.name):
            raise CheckpointError(
                f"{where}: {name} is made by code ({value.name}), which was not run; write plain "
                f"tensors, best as safetensors"
            )
        else:
            odd.append(f"{group.prefix}{name}")
    return tensors, odd


def _beside(
    content: Mapping[Any, Any], chosen: Group, groups: Sequence[Group]
) -> Iterator[tuple[str, ...]]:
    """Yield where something lies beside the chosen weights, not said otherwise."""
    known = {group.path[0] for group in groups if group.path}
    prefixes = tuple(group.prefix for group in groups if not group.path)
    if chosen.path:
        yield from (
            (name,)
            for name in map(str, content)
            if name not in known and not name.startswith(prefixes)
        )
    if chosen.prefix:
        prefixes = tuple(group.prefix for group in groups if group.path == chosen.path)
        for name in part_at(content, chosen.path):
            if not MARKS.sub("", str(name)).startswith(prefixes):
                yield (*chosen.path, str(name))


def _all_tensors(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that is no DiT's, for a message that names them."""
    tensors = {
        str(name): value
        for _, part in inner_parts(content)
        for name, value in part.items()
        if isinstance(value, Tensor)
    }
    if content and not tensors:
        raise CheckpointError(
            f"{where} is no state dict: {abbreviated([str(name) for name in content])} hold no "
            f"tensor; expected the parameters by name, or a part such as 'ema' or 'model' that "
            f"holds them"
        )
    return tensors


def _refuse_adapters(names: Iterable[str], where: str) -> None:
    """Refuse LoRA and its kind, which need the weights that they adapt."""
    if found := [name for name in names if _ADAPTER.search(name)]:
        raise CheckpointError(
            f"{where} holds adapters (LoRA or its kind: {abbreviated(found)}), not merged weights; "
            f"pass the model and a plain LoRA as --lora, or merge them first, W + (alpha/r) B A "
            f"for every adapted linear (in PEFT: merge_and_unload())"
        )
