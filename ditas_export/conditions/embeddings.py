"""What text-conditioned models are asked: a file of tensors, one row a prompt.

| tensor        | shape             | what                                              |
|---------------|-------------------|---------------------------------------------------|
| `NAME`        | (P, …)            | one row a prompt; NAME is that of a model's input |
| `null.NAME`   | (1, …)            | the row of "no prompt", which guidance needs      |

The file is safetensors. A name that ends in `attention_mask` has 1 where a token is and 0 where
padding is. Dimensions of one name, such as the number of tokens, are the same in all tensors.
`ditas-embed` writes such files, with the prompts' texts in the metadata, and so does
`safetensors.torch.save_file`, without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditas_export.artifact_files import load_tensors, save_tensors, sha256_of_tensors
from ditas_export.errors import ArtifactError, RunnerError
from ditas_export.family_model import Input
from ditas_export.file_signs import why_unreadable
from ditas_export.saved_records import shown

EMBEDDINGS_KIND = "ditas-export embeddings"
EMBEDDINGS_FORMAT = f"{EMBEDDINGS_KIND} 1"

NULL = "null."
"""How names of the tensors begin that stand for no prompt."""

MASK = "attention_mask"
"""How names of masks end."""

STATES = "hidden_states"
"""How the names of token vectors end, of which a mask with the same beginning says the padding."""

MOST_BYTES = 16 * 2**30
"""Bytes of all tensors in float32: some 3000 prompts of 300 tokens of 4096 channels."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types that a file may have of what a model is fed as float32."""

_SHOWN = 6
"""Names in a message."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptEmbeddings:
    """Prompts as a model is fed them; label i is prompt i, and the label `count` no prompt.

    Token vectors are zero where padding is, whatever stood there.
    """

    tensors: Mapping[str, Tensor]  # by input: (P, …), and the null row after them if there is one
    has_null: bool
    prompts: tuple[str, ...] = ()  # their texts, or none where the file has none
    source: str = "these embeddings"  # the file, for messages
    identity: str = field(init=False)
    """Hex SHA-256 of the tensors as the model is fed them, names and types included."""

    def __post_init__(self) -> None:
        """Clear the padding, and refuse what no model can be asked.

        Raises:
            UnfitError: no rows or not as many of each, texts of other prompts, NaN or infinity, or
                a mask of anything but 0 and 1 or of no token at all.
        """
        rows = sorted({len(tensor) for tensor in self.tensors.values()})
        if len(rows) != 1 or self.count < 1:
            raise UnfitError(f"tensors of {rows} rows; expected as many of each, one a prompt")
        if self.prompts and len(self.prompts) != self.count:
            raise UnfitError(
                f"{len(self.prompts)} texts of {self.count} prompts; expected one a prompt"
            )
        for name, tensor in self.tensors.items():
            if name.endswith(MASK):
                _require_mask(name, tensor, count=self.count)
        object.__setattr__(self, "tensors", _without_padding(self.tensors))
        for name, tensor in self.tensors.items():
            _require_finite(name, tensor, count=self.count)
        object.__setattr__(self, "identity", sha256_of_tensors(self._by_name()))

    @property
    def what(self) -> str:
        """What a label names, for messages."""
        return "prompt"

    @property
    def lack(self) -> str:
        """What there is none of where `null` is None, for messages."""
        return "row of no prompt"

    @property
    def count(self) -> int:
        """P: labels 0 … P - 1 may be asked for."""
        return len(next(iter(self.tensors.values()), ())) - self.has_null

    @property
    def null(self) -> int | None:
        """The label of no prompt; None where there is no such row: then nothing can be guided."""
        return self.count if self.has_null else None

    def inputs(self, labels: Tensor) -> dict[str, Tensor]:
        """Return what the model is fed for labels (N,) int64, by input: (N, …) each.

        Raises:
            RunnerError: a label that is no row.
        """
        last = self.count - 1 + self.has_null
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) <= last:
            raise RunnerError(
                f"labels from {int(labels.min())} to {int(labels.max())}, but {self.source} has "
                f"rows 0 to {last}; ask for these"
            )
        return {name: tensor[labels] for name, tensor in self.tensors.items()}

    def save(self, path: Path) -> None:
        """Write the file.

        Raises:
            ArtifactError: it cannot be written.
        """
        header = {"prompts": list(self.prompts)}
        save_tensors(path, self._by_name(), file_format=EMBEDDINGS_FORMAT, header=header)

    @classmethod
    def load(cls, path: Path, *, inputs: Sequence[Input]) -> PromptEmbeddings:
        """Read a file, whoever wrote it.

        Floats become float32, and masks what the model is fed.

        Args:
            path: the file.
            inputs: those of the model that a prompt decides.

        Raises:
            ArtifactError: no such file, a damaged one, or one that does not fit: a name, a shape, a
                type, a value, or more bytes than `MOST_BYTES`.
        """
        try:
            tensors, prompts = _read(path, inputs)
            has_null = any(name.startswith(NULL) for name in tensors)
            fed = {each.name: _fed(each, tensors, has_null=has_null) for each in inputs}
            return cls(tensors=fed, has_null=has_null, prompts=prompts, source=str(path))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"{path} is no readable file of embeddings: {why_unreadable(path, error)}"
            ) from error
        except UnfitError as error:
            raise ArtifactError(f"{path}: {error}; make it again, by ditas-embed") from None

    def _by_name(self) -> dict[str, Tensor]:
        """Return the tensors as a file has them."""
        rows = {name: tensor[: self.count] for name, tensor in self.tensors.items()}
        nulls = {f"{NULL}{name}": tensor[self.count :] for name, tensor in self.tensors.items()}
        return {**rows, **nulls} if self.has_null else rows


class UnfitError(ArtifactError):
    """What is wrong with embeddings; whoever knows their file names it."""


def _read(path: Path, inputs: Sequence[Input]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return a file's tensors, of names and shapes that fit, and the texts of its prompts."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        _require_names(names, inputs)
        _require_shapes(shapes, inputs)
        if not any(key.startswith(f"{EMBEDDINGS_KIND} ") for key in file.metadata() or {}):
            return {name: file.get_tensor(name) for name in names}, ()
    tensors, header = load_tensors(path, file_format=EMBEDDINGS_FORMAT)
    return tensors, _texts(header)


def _texts(header: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the prompts' texts of a header."""
    texts = header.get("prompts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UnfitError(f"prompts={shown(texts)}; expected a list of texts")
    return tuple(texts)


def _require_names(names: Sequence[str], inputs: Sequence[Input]) -> None:
    """Refuse other tensors than the inputs', and null rows of some of them alone."""
    rows = {each.name for each in inputs}
    nulls = {f"{NULL}{name}" for name in rows}
    if rows <= set(names) <= rows | nulls and nulls & set(names) in (set(), nulls):
        return
    raise UnfitError(
        f"its tensors are {_first(sorted(names))}; expected {', '.join(sorted(rows))}, and with "
        f"{NULL} before each the row of no prompt"
    )


def _require_shapes(shapes: Mapping[str, Sequence[int]], inputs: Sequence[Input]) -> None:
    """Refuse other shapes than the inputs', dimensions of one name that differ, and too much."""
    prompts = {shape[0] for name, shape in shapes.items() if shape and not name.startswith(NULL)}
    rows: int | str = prompts.pop() if len(prompts) == 1 else "prompts"
    sizes: dict[str, int] = {}
    for each in inputs:
        for name, count in ((each.name, rows), (f"{NULL}{each.name}", 1)):
            if name not in shapes:
                continue
            found = tuple(shapes[name])
            for size, dimension in zip(found[1:], each.shape, strict=False):
                if isinstance(dimension, str):
                    sizes.setdefault(dimension, size)
            expected = (count, *(sizes.get(str(size), size) for size in each.shape))
            if found != expected or 0 in found:
                stated = ", ".join(map(str, (count, *each.shape)))
                same = "".join(f"; {name}={size} elsewhere" for name, size in sizes.items())
                raise UnfitError(f"{name} is {found}, expected ({stated}){same}")
    most = sum(4 * math.prod(shape) for shape in shapes.values())
    if most > MOST_BYTES:
        raise UnfitError(
            f"{most / 2**30:.1f} GiB of float32, expected {MOST_BYTES / 2**30:.0f} GiB at most; "
            f"use fewer prompts"
        )


def _fed(each: Input, tensors: Mapping[str, Tensor], *, has_null: bool) -> Tensor:
    """Return an input's rows, then its null row, in the type that the model is fed."""
    rows = tensors[each.name]
    parts = [(rows, len(rows))]
    if has_null:
        parts.append((tensors[f"{NULL}{each.name}"], 0))
    for part, count in parts:
        if each.name.endswith(MASK):
            _require_mask(each.name, part, count=count)
        elif part.dtype not in _FLOATS:
            kinds = ", ".join(_plain(dtype) for dtype in _FLOATS)
            raise UnfitError(
                f"{_row(each.name, 0, count)} is {_plain(part.dtype)}, expected one of {kinds}"
            )
    return torch.cat([part.to(each.dtype) for part, _ in parts])


def _without_padding(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with zeros for the token vectors that their mask hides."""
    cleared = dict(tensors)
    for name, mask in tensors.items():
        states = name.removesuffix(MASK) + STATES
        if name.endswith(MASK) and states in tensors:
            cleared[states] = tensors[states].masked_fill((mask == 0)[..., None], 0)
    return cleared


def _require_mask(name: str, mask: Tensor, *, count: int) -> None:
    """Refuse a mask of other values than 0 and 1, and one that leaves no token."""
    if (odd := mask[(mask != 0) & (mask != 1)]).numel():
        raise UnfitError(f"{name} has {odd[0].item()}; expected 1 for a token and 0 for padding")
    for row in (~mask.bool().any(dim=-1)).nonzero().flatten().tolist()[:1]:
        raise UnfitError(
            f"{_row(name, row, count)} is all padding; expected a token at least, as the empty "
            f"text has its end"
        )


def _require_finite(name: str, values: Tensor, *, count: int) -> None:
    """Refuse NaN and infinity."""
    finite = values.isfinite().flatten(1).all(dim=1)
    for row in (~finite).nonzero().flatten().tolist()[:1]:
        raise UnfitError(
            f"{_row(name, row, count)} has NaN or infinity, expected finite numbers; encode in "
            f"bfloat16 or float32 where float16 overflowed"
        )


def _row(name: str, row: int, count: int) -> str:
    """Return what a row is called."""
    return f"{NULL}{name}" if row == count else f"{name} of prompt {row}"


def _plain(dtype: torch.dtype) -> str:
    """Return a type's name without the library's."""
    return str(dtype).removeprefix("torch.")


def _first(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(name[:80] for name in names[:_SHOWN]) or "none") + more
