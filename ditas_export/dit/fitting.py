"""Tensors of a file held against what a model asks for, before anything is computed with them.

One check for checkpoints, quantized models and calibration states: names, shapes, element types,
the bytes that are really there, and ranges of values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.dit.tensor_files import abbreviated
from ditas_export.errors import DitasExportError

_MOST_SHARED = 4
"""How often the bytes of a file may be used by its tensors; copies in every block are shared."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a tensor must be."""

    shape: tuple[int | None, ...]  # None where any size will do
    dtype: torch.dtype | None = torch.float32  # None for every float type
    low: float | None = None  # least value, infinity never

    def __str__(self) -> str:
        """Return the shape."""
        return str(tuple("any" if size is None else size for size in self.shape))


def require_fits(
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Wanted],
    *,
    error: type[DitasExportError],
    where: str = "",
) -> None:
    """Refuse tensors that are not the ones that are asked for.

    Raises:
        DitasExportError: `error`: one line that names all that is wrong.
    """
    if found := complaint(faults_of(tensors, wanted)):
        raise error(f"{where}: {found}" if where else found)


def faults_of(tensors: Mapping[str, Tensor], wanted: Mapping[str, Wanted]) -> dict[str, list[str]]:
    """Return the names of tensors by what is wrong with them; values are read of fitting ones."""
    there = {name: tensor for name, tensor in tensors.items() if name in wanted}
    odd = [name for name, tensor in there.items() if not _is_plain(tensor)]
    misshapen = [
        f"{name} {tuple(tensor.shape)} instead of {wanted[name]}"
        for name, tensor in there.items()
        if not _has_shape(tensor, wanted[name].shape)
    ]
    plain = {
        name: tensor
        for name, tensor in there.items()
        if _is_plain(tensor) and _has_shape(tensor, wanted[name].shape)
    }
    typed = {
        name: tensor for name, tensor in plain.items() if _has_type(tensor, wanted[name].dtype)
    }
    shared = _is_shared(typed.values())
    values = {} if shared else {n: _fault_of_values(t, wanted[n].low) for n, t in typed.items()}
    untyped = [
        f"{name} {_of_type(tensor.dtype)}{_instead(wanted[name].dtype)}"
        for name, tensor in plain.items()
        if name not in typed or values.get(name) == _NO_FLOATS
    ]
    return {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "misshapen": misshapen,
        "no plain tensor": odd,
        "of another element type" if _asks_for_types(wanted) else "not of a float type": untyped,
        "of more numbers than the file has": list(typed) if shared else [],
        "with NaN or infinity": [n for n, fault in values.items() if fault == _NOT_FINITE],
        "with values below the least": [n for n, fault in values.items() if fault == _TOO_LOW],
    }


def complaint(faults: Mapping[str, list[str]]) -> str:
    """Return all faults in words, "" where there is none."""
    return "; ".join(
        f"{len(names)} {fault} ({abbreviated(names)})" for fault, names in faults.items() if names
    )


_NO_FLOATS, _NOT_FINITE, _TOO_LOW = "no floats", "not finite", "too low"


def _of_type(dtype: torch.dtype) -> str:
    """Return an element type's name."""
    return str(dtype).removeprefix("torch.")


def _instead(dtype: torch.dtype | None) -> str:
    """Return what was asked for, where a type is."""
    return "" if dtype is None else f" instead of {_of_type(dtype)}"


def _asks_for_types(wanted: Mapping[str, Wanted]) -> bool:
    """Return whether element types are asked for by name."""
    return any(each.dtype is not None for each in wanted.values())


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor holds its numbers in memory, one after another."""
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_quantized)


def _has_shape(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    """Return whether a tensor has a shape."""
    return tensor.ndim == len(shape) and all(
        size is None or size == found for found, size in zip(tensor.shape, shape, strict=True)
    )


def _has_type(tensor: Tensor, dtype: torch.dtype | None) -> bool:
    """Return whether a tensor has an element type, or any float type where none is named."""
    return tensor.is_floating_point() if dtype is None else tensor.dtype == dtype


def _is_shared(tensors: Iterable[Tensor]) -> bool:
    """Return whether tensors have many times the numbers that lie in memory."""
    listed = list(tensors)
    asked = sum(tensor.numel() * tensor.element_size() for tensor in listed)
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
              for tensor in listed}  # fmt: skip
    return asked > _MOST_SHARED * sum(stored.values())


def _fault_of_values(tensor: Tensor, low: float | None) -> str | None:
    """Return what is wrong with a tensor's values as float32, or as they are where no floats."""
    try:
        values = tensor.float() if tensor.is_floating_point() else tensor
        if not bool(values.isfinite().all()):
            return _NOT_FINITE
    except (RuntimeError, NotImplementedError):  # types that torch stores and does not convert
        return _NO_FLOATS
    return _TOO_LOW if low is not None and bool((values < low).any()) else None
