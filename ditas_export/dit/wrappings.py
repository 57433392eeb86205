"""The weights inside what training wrote around them.

A checkpoint holds the parameters by name, or parts that do: raw and averaged weights, an optimizer,
options. Names may have a prefix (DistributedDataParallel, Lightning), or marks of torch.compile in
them. A *group* is all tensors under one path of parts and one prefix whose names are a DiT's.
Averaged weights win over raw ones, and what was chosen, stripped or left out is said.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ditas_export.dit.layouts import OFFICIAL
from ditas_export.dit.pickle_machine import Inert
from ditas_export.dit.records import NAMESPACES, RECORD_PARTS
from ditas_export.dit.tensor_files import TensorFile, abbreviated
from ditas_export.errors import CheckpointError

_DEPTH = 4
"""Parts within parts that are looked into."""

_WRAPPERS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What torch.compile, activation checkpointing and FSDP put into names, anywhere."""

_AVERAGED = {"ema", "shadow", "average", "averaged", "avg", "swa", "polyak"}
_RAW = {"online", "non", "raw"}
"""Words in the name of a part or prefix; the latter win: `online_model`, `non_ema`."""

_NO_WEIGHTS = re.compile(
    r"opt|optim.*|optimizers?|grads?|sched.*|exp_avg.*|momentum.*", re.IGNORECASE
)
"""Parts that hold tensors by parameter and are no weights."""

_USUAL_PARTS = ("", "model", "state_dict", "module", "net", "network", "params", "weights")
"""Where raw weights are, the better ones first, if there are several."""

_ADAPTER = re.compile(r"(?:^|[._])(?:lora|hada|lokr|dora|oft)(?:$|[._])|(?:^|\.)base_layer\.")
_TENSOR_MAKER = re.compile(r"_rebuild|_reconstruct|_frombuffer|_load_from_bytes|ndarray|Tensor")
"""Names of what makes arrays and tensors that are not plain ones."""

_FEWEST_LISTED = 10
"""Tensors in the shortest list that is taken for a model's parameters."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Weights:
    """The parameters of a checkpoint."""

    tensors: Mapping[str, Tensor]
    part: str  # of a training checkpoint; empty where the file is nothing but weights
    notes: tuple[str, ...]  # one line each: what was chosen, stripped, left out
    betas: Mapping[str, Tensor]  # tables of a diffusion wrapper beside them, by name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Group:
    """Tensors under one path of parts and one prefix, the prefix taken away."""

    path: tuple[str, ...]
    prefix: str
    entries: Mapping[str, Any]  # tensors, and what a pickle did not make
    is_marked: bool = False  # whether names had the marks of torch.compile and the like

    @property
    def is_averaged(self) -> bool:
        """Whether its names say so."""
        return _says_averaged((*self.path, self.prefix))

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        names = [f"{self.prefix}*"] if self.prefix else []
        return " ".join(["/".join(self.path), *names] if self.path else names) or "the file"


def choose_weights(file: TensorFile, anchors: Sequence[str], *, where: str) -> Weights:
    """Return the weights of a checkpoint: the averaged ones if there are any.

    Args:
        file: what was read.
        anchors: names of which a DiT has one; they tell where its names start.
        where: the file, for messages.

    Raises:
        CheckpointError: adapters (LoRA) instead of weights, several models of which none is the
            usual one, averaged weights that cannot be told apart, or a tensor that only code makes.
    """
    notes = []
    if not_made := [name for name in file.not_made if name not in NAMESPACES]:
        notes.append(f"of its pickle, not run and left out: {abbreviated(not_made)}")
    groups = list(_groups(file.content, anchors))
    groups += _averages_without_names(file.content, groups, where)
    if not groups:
        tensors = _all_tensors(file.content, where)
        _refuse_adapters(tensors, where)
        return Weights(tensors=tensors, part="", notes=tuple(notes), betas={})
    chosen = _best(groups, where)
    _refuse_adapters(chosen.entries, where)
    _refuse_partial_average(chosen, groups, where)
    notes += _notes(chosen, groups)
    tensors, odd = _plain_tensors(_with_positions(chosen, groups), where)
    beside = [*_beside(file.content, chosen, groups), *odd]
    betas = _tables_of_betas(file.content, chosen, beside)
    if unused := [name for name in beside if name not in betas]:
        notes.append(f"not used: {abbreviated(unused)}")
    return Weights(tensors=tensors, part="/".join(chosen.path), notes=tuple(notes), betas=betas)


def _notes(chosen: _Group, groups: Sequence[_Group]) -> Iterator[str]:
    """Yield what is to be said of the choice and of names."""
    if others := [group.name for group in groups if group is not chosen]:
        kind = "averaged" if chosen.is_averaged else "raw"
        yield f"took the {kind} weights, {chosen.name}; not used: {', '.join(others)}"
    if chosen.prefix:
        yield f"stripped {chosen.prefix!r} from every name"
    if chosen.is_marked:
        yield "stripped the marks of torch.compile and the like from names"


def _groups(content: Mapping[Any, Any], anchors: Sequence[str]) -> Iterator[_Group]:
    """Yield every group, in the order of the file."""
    for path, part in _parts(content):
        written = [name for name in part if isinstance(name, str)]
        names = {_WRAPPERS.sub("", name): name for name in written}
        if len(names) < len(written):  # two would be one
            names = {name: name for name in written}
        prefixes = [
            name.removesuffix(anchor)
            for name in names
            for anchor in anchors
            if name.endswith(anchor) and isinstance(part[names[name]], Tensor | Inert)
        ]
        prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
        for prefix in prefixes:
            longer = tuple(other for other in prefixes if len(other) > len(prefix))
            entries = {
                name.removeprefix(prefix): part[full]
                for name, full in names.items()
                if name.startswith(prefix) and not name.startswith(longer)
            }
            is_marked = any(name not in part for name in names)
            yield _Group(path=path, prefix=prefix, entries=entries, is_marked=is_marked)


def _parts(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every mapping in which weights may be, and its path; the outer ones first."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen = {id(content)}
    while waiting:
        path, part = waiting.popleft()
        yield path, part
        for name, inner in part.items():
            if not isinstance(inner, Mapping) or id(inner) in seen or len(path) == _DEPTH:
                continue
            if isinstance(name, str) and not _NO_WEIGHTS.fullmatch(name):
                seen.add(id(inner))
                waiting.append(((*path, name), inner))


def _part(content: Any, path: tuple[str, ...]) -> Any:
    """Return the mapping at a path."""
    for name in path:
        content = content[name]
    return content


def _says_averaged(names: Sequence[str]) -> bool:
    """Return whether the names of parts and prefixes say that weights are averaged."""
    split = (re.sub(r"([a-z])([A-Z])", r"\1_\2", name) for name in names)
    words = {word for name in split for word in re.split(r"[^a-z]+", name.lower())}
    return bool(words & _AVERAGED) and not words & _RAW


def _best(groups: Sequence[_Group], where: str) -> _Group:
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


def _averages_without_names(
    content: Mapping[Any, Any], groups: Sequence[_Group], where: str
) -> list[_Group]:
    """Return averaged weights that are a list, or whose names have lost their dots.

    Raises:
        CheckpointError: averaged tensors that cannot be told apart.
    """
    raw = next((group for group in groups if not group.is_averaged), None)
    found = []
    for path, part in _parts(content):
        for name, inner in part.items():
            here = (*path, str(name))
            is_list = isinstance(inner, list | tuple) and len(inner) >= _FEWEST_LISTED
            if is_list and _says_averaged(here) and all(isinstance(t, Tensor) for t in inner):
                found.append(_Group(path=here, prefix="", entries=_named(inner, raw, here, where)))
        if raw is not None and raw.path == path and (group := _undotted(part, raw)) is not None:
            found.append(group)
    if not found and not any(group.is_averaged for group in groups):
        _refuse_unread_averages(content, where)
    return found


def _named(
    tensors: Sequence[Tensor], raw: _Group | None, path: tuple[str, ...], where: str
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


def _undotted(part: Mapping[Any, Any], raw: _Group) -> _Group | None:
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
        if _says_averaged((prefix,)):
            return _Group(path=raw.path, prefix=prefix, entries=named)
    return None


def _refuse_unread_averages(content: Mapping[Any, Any], where: str) -> None:
    """Refuse to fall back to raw weights where averaged ones are there and cannot be read."""
    entries = ((name, inner) for _, part in _parts(content) for name, inner in part.items())
    for name, inner in entries:
        if not isinstance(name, str) or not _says_averaged((name,)):
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


def _with_positions(chosen: _Group, groups: Sequence[_Group]) -> _Group:
    """Return averaged weights with the raw ones' position table, if averaging left it out."""
    if "pos_embed" in chosen.entries or not chosen.is_averaged:
        return chosen
    for group in groups:
        if "pos_embed" in group.entries:
            return replace(
                chosen, entries={**chosen.entries, "pos_embed": group.entries["pos_embed"]}
            )
    return chosen


def _refuse_partial_average(chosen: _Group, groups: Sequence[_Group], where: str) -> None:
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


def _plain_tensors(group: _Group, where: str) -> tuple[dict[str, Tensor], list[str]]:
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
            odd.extend({f"{group.prefix}{name}"} - RECORD_PARTS)
    return tensors, odd


def _beside(content: Mapping[Any, Any], chosen: _Group, groups: Sequence[_Group]) -> Iterator[str]:
    """Yield what lies beside the chosen weights, group by group and not said otherwise."""
    known = {group.path[0] for group in groups if group.path} | RECORD_PARTS
    prefixes = tuple(group.prefix for group in groups if not group.path)
    if chosen.path:
        yield from (
            name
            for name in map(str, content)
            if name not in known and not name.startswith(prefixes)
        )
    if chosen.prefix:
        prefixes = tuple(group.prefix for group in groups if group.path == chosen.path)
        for name in _part(content, chosen.path):
            if not _WRAPPERS.sub("", str(name)).startswith(prefixes):
                yield str(name)


def _tables_of_betas(
    content: Mapping[Any, Any], chosen: _Group, beside: Sequence[str]
) -> dict[str, Tensor]:
    """Return the noise schedules that a wrapper around the network keeps as buffers, by name."""
    part = _part(content, chosen.path) if chosen.prefix else {}
    found = {name: part.get(name) for name in beside if name.split(".")[-1] == "betas"}
    return {
        name: table
        for name, table in found.items()
        if isinstance(table, Tensor) and table.ndim == 1 and table.numel() > 1
    }


def _all_tensors(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that is no DiT's, for a message that names them."""
    tensors = {
        str(name): value
        for _, part in _parts(content)
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
            f"merge them first, W + (alpha/r) B A for every adapted linear (in PEFT: "
            f"merge_and_unload()), and write that model's state_dict()"
        )
