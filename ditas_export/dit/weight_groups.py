"""Where in a checkpoint weights are: every part and prefix under which names are a DiT's."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditas_export.dit.names import words_of
from ditas_export.dit.pickle_machine import Inert

_MOST_GROUPS = 64
"""Models under prefixes of one part; the first ones are looked at."""

_DEPTH = 4
"""Parts within parts that are looked into."""

MARKS = re.compile(r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What torch.compile, activation checkpointing and FSDP put into names, anywhere."""

_AVERAGED = {"ema", "shadow", "average", "averaged", "avg", "swa", "polyak"}
_RAW = {"online", "non", "no", "not", "without", "raw"}
"""Words in the name of a part or prefix; the latter win: `online_model`, `non_ema`."""

_NO_WEIGHTS = re.compile(
    r"opt|optim.*|optimizers?|grads?|sched.*|exp_avg.*|momentum.*", re.IGNORECASE
)
"""Parts that hold tensors by parameter and are no weights."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Tensors under one path of parts and one prefix, the prefix taken away."""

    path: tuple[str, ...]
    prefix: str
    entries: Mapping[str, Any]  # tensors, and what a pickle did not make
    is_marked: bool = False  # whether names had the marks of torch.compile and the like

    @property
    def is_averaged(self) -> bool:
        """Whether its names say so."""
        return says_averaged((*self.path, self.prefix))

    @property
    def name(self) -> str:
        """Where it is, for messages."""
        names = [f"{self.prefix}*"] if self.prefix else []
        return " ".join(["/".join(self.path), *names] if self.path else names) or "the file"


def find_groups(content: Mapping[Any, Any], anchors: Sequence[str]) -> Iterator[Group]:
    """Yield every group, in the order of the file."""
    for path, part in inner_parts(content):
        written = [name for name in part if isinstance(name, str)]
        names = {MARKS.sub("", name): name for name in written}
        if len(names) < len(written):  # two would be one
            names = {name: name for name in written}
        prefixes = [
            name.removesuffix(anchor)
            for name in names
            for anchor in anchors
            if name.endswith(anchor) and isinstance(part[names[name]], Tensor | Inert)
        ]
        prefixes = [prefix for prefix in prefixes if not prefix or prefix.endswith(".")]
        for prefix in prefixes[:_MOST_GROUPS]:
            longer = tuple(other for other in prefixes if len(other) > len(prefix))
            entries = {
                name.removeprefix(prefix): part[full]
                for name, full in names.items()
                if name.startswith(prefix) and not name.startswith(longer)
            }
            is_marked = any(name not in part for name in names)
            yield Group(path=path, prefix=prefix, entries=entries, is_marked=is_marked)


def inner_parts(content: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
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


def part_at(content: Any, path: tuple[str, ...]) -> Any:
    """Return the mapping at a path."""
    for name in path:
        content = content[name]
    return content


def says_averaged(names: Sequence[str]) -> bool:
    """Return whether the names of parts and prefixes say that weights are averaged."""
    words = {word for name in names for each in words_of(name) for word in re.split(r"\d+", each)}
    return bool(words & _AVERAGED) and not words & _RAW
