"""The form that a file was written in, as the file itself records it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ditas_export.errors import OnnxExportError
from ditas_export.options import Precision, Target
from ditas_export.quantization.ranges import Ranges
from ditas_export.saved_records import check_fields, from_record

Layout = Literal["int4", "int8"]
"""How a 4-bit weight is stored: INT4 blocks, or the same numbers as INT8 rows."""

ActivationCodes = Literal["int8", "uint8"]
"""Type of the codes of INT8 activations; UINT8 where a low-rank branch joins its linear's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileForm:
    """How a file was written; of the float model nothing but its float type is known."""

    float_type: Precision
    weight_bits: int | None = None  # 4 or 8; None in a file of the float model
    activation_bits: int | None = None  # 8, or 16 for float activations
    adaln_bits: int = 16  # of the modulation's weights; 16 is float
    layout: Layout | None = None
    ranges: Ranges | None = None  # of INT8 activations
    activation_codes: ActivationCodes | None = None  # of INT8 activations
    target: Target | None = None

    def __post_init__(self) -> None:
        """Refuse what no file has, naming the value."""
        check_fields(self, OnnxExportError)
        none: tuple[None] = (None,)
        quantized = self.weight_bits is not None
        choices: dict[str, tuple[object, ...]] = {
            "float_type": get_args(Precision),
            "weight_bits": (4, 8) if quantized else none,
            "activation_bits": (8, 16) if quantized else none,
            "adaln_bits": (4, 8, 16) if quantized else (16,),
            "layout": get_args(Layout) if quantized else none,
            "ranges": (*get_args(Ranges), None) if quantized else none,
            "activation_codes": (*get_args(ActivationCodes), None) if quantized else none,
            "target": (*get_args(Target), None) if quantized else none,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if not any(value == choice and type(value) is type(choice) for choice in known):
                expected = ", ".join("null" if choice is None else str(choice) for choice in known)
                kind = "quantized" if quantized else "float"
                raise OnnxExportError(
                    f"{name}={str(value)[:40]!r}; in a {kind} file expected one of {expected}"
                )

    @property
    def is_quantized(self) -> bool:
        """Whether the linears of the blocks are integers."""
        return self.weight_bits is not None

    @property
    def fits_tensorrt(self) -> bool:
        """Whether TensorRT takes the form; it does not take ONNX Runtime's own."""
        return self.activation_codes != "uint8" and not (
            self.target == "onnxruntime" and self.float_type == "fp32"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the form as JSON values; of the float model the float type alone."""
        return dataclasses.asdict(self) if self.is_quantized else {"float_type": self.float_type}

    @classmethod
    def from_dict(cls, values: object) -> FileForm:
        """Return the form that `to_dict` made `values` of, in this version or an earlier one.

        Raises:
            OnnxExportError: no mapping, an unknown or a missing name, or a value that no file has.
        """
        return from_record(cls, values, error=OnnxExportError)
