"""What a runner is fed: checked once, before any backend sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditas_export.errors import RunnerError
from ditas_export.families.base import Input, ModelConfig, ModelInputs
from ditas_export.families.registry import family_of

Feed = dict[str, np.ndarray[Any, Any]]
"""The inputs by name, in the types of the files' interface."""


def feed_of(config: ModelConfig, inputs: ModelInputs) -> Feed:
    """Return the inputs as arrays in the types of the interface of a model's files."""
    return {
        each.name: inputs[each.name].detach().cpu().to(each.dtype).contiguous().numpy()
        for each in family_of(config).inputs(config)
    }


def require_fitting(config: ModelConfig, inputs: ModelInputs) -> None:
    """Refuse inputs that do not fit a model.

    Values that lie on a GPU are not looked at: reading them would make the host wait.

    Args:
        config: of the model; its family says names, shapes, types and bounds.
        inputs: one row at least; floats may be of any float type, whole numbers of any other.

    Raises:
        RunnerError: a name, a shape, a type or a value, such as a time step or a label, that does
            not fit the model.
    """
    wanted = family_of(config).inputs(config)
    if list(inputs) != (names := [each.name for each in wanted]):
        raise RunnerError(
            f"the inputs are {', '.join(inputs)[:200] or 'none'}; the model takes "
            f"{', '.join(names)}"
        )
    for each in wanted:
        if not isinstance(inputs[each.name], Tensor):
            kind = type(inputs[each.name]).__name__
            raise RunnerError(f"{each.name} are {kind}; the model takes torch tensors")
    sizes: dict[str, int] = {}
    for each in wanted:
        _require_shape(each, inputs, sizes)
    for each in wanted:
        _require_type(each, inputs[each.name])
        _require_values(each, inputs[each.name])


def _require_shape(wanted: Input, inputs: ModelInputs, sizes: dict[str, int]) -> None:
    """Refuse another shape than an input's, and note its dynamic dimensions' sizes."""
    first, found = next(iter(inputs)), tuple(inputs[wanted.name].shape)
    rows = len(inputs[first]) if inputs[first].ndim else 0
    for name, size in zip(wanted.shape, found[1:], strict=False):
        if isinstance(name, str) and size:
            sizes.setdefault(name, size)
    expected = (
        rows,
        *(sizes.get(each) if isinstance(each, str) else each for each in wanted.shape),
    )
    if found == expected and rows:
        return
    if wanted.name == first:
        takes = ", ".join(map(str, ("N", *wanted.shape)))
        raise RunnerError(f"{first} are {found}; the model takes ({takes}), one row at least")
    takes = ", ".join(
        str(name if size is None else size)
        for name, size in zip((first, *wanted.shape), expected, strict=True)
    )
    takes = f"({takes})" if wanted.shape else f"({takes},)"
    raise RunnerError(f"{wanted.name} are {found}; with {rows} {first} the model takes {takes}")


def _require_type(wanted: Input, tensor: Tensor) -> None:
    """Refuse what are no floats, or no whole numbers, by their type."""
    if wanted.dtype.is_floating_point:
        if not tensor.is_floating_point():
            bounds = wanted.bounds
            ends = "" if bounds is None else f" from {bounds.first:g} to {bounds.last:g}"
            raise RunnerError(f"{wanted.name} are {tensor.dtype}; the model takes floats{ends}")
    elif tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise RunnerError(f"{wanted.name} are {tensor.dtype}; the model takes whole numbers")


def _require_values(wanted: Input, tensor: Tensor) -> None:
    """Refuse values beyond the first and the last; what lies on a GPU is not looked at."""
    bounds = wanted.bounds
    if bounds is None or not tensor.is_cpu:
        return
    readable = tensor if tensor.is_floating_point() else tensor.long()
    low, high = readable.amin().item(), readable.amax().item()
    if not bounds.first <= low <= high <= bounds.last:
        found, known = _text(low, high), _text(bounds.first, bounds.last)
        raise RunnerError(f"{wanted.name} run from {found}; the model knows {known}, {bounds.what}")


def _text(low: float, high: float) -> str:
    """Return a range; floats to the digits that float32 has."""
    ends = (str(end) if isinstance(end, int) else f"{end:.7g}" for end in (low, high))
    return " to ".join(ends)
