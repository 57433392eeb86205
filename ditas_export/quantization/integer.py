"""Integer weights whose INT4 blocks and INT8 rows are the same numbers.

Two-level scales: a weight is `codes · multiplier · row_scale` with codes in −7 … 7 and an integer
multiplier of 1 … 18 per block, so `|codes · multiplier| ≤ 126` is an INT8 value and the GEMM that a
runtime has (INT8 × INT8, one scale per output channel) computes exactly what the 4-bit tensor says.
Shapes: N output channels, K input channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError

MAX_CODE_4BIT = 7
"""Codes are −7 … 7; −8 is never used, so the range is symmetric."""

MAX_MULTIPLIER = 18
"""Largest block multiplier: 7 · 18 = 126 still is an INT8 value."""

MAX_CODE_8BIT = 127


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class IntegerWeight:
    """A weight (N, K) as `codes · multipliers · row_scale`, the one source of its numbers."""

    codes: Tensor  # (N, K) int8; |codes| <= 7 for 4 bits, <= 127 for 8
    multipliers: Tensor  # (N, K / block_size) int8; 1 ... 18 for 4 bits, one column of 1 for 8
    row_scale: Tensor  # (N,) float, finite, > 0
    bits: int

    def __post_init__(self) -> None:
        """Check the shapes and ranges that every container relies on."""
        if self.bits not in (4, 8):
            raise QuantizationError(f"weight bits are 4 or 8, not {self.bits}")
        shapes = [tuple(part.shape) for part in (self.codes, self.multipliers, self.row_scale)]
        if not _fit_together(*shapes):
            raise QuantizationError(
                f"codes {shapes[0]}, multipliers {shapes[1]} and row_scale {shapes[2]} do not fit "
                f"together"
            )
        require_integers("codes", self.codes, low=-max_code(self.bits), high=max_code(self.bits))
        most = MAX_MULTIPLIER if self.bits == 4 else 1
        require_integers("block multipliers", self.multipliers, low=1, high=most)
        require_scales("row scales", self.row_scale)

    @property
    def block_size(self) -> int:
        """Input channels that share one multiplier."""
        return self.codes.shape[1] // self.multipliers.shape[1]

    def int8_rows(self) -> Tensor:
        """Return codes · multipliers, (N, K) int8: what an INT8 GEMM multiplies."""
        return self.codes * self.multipliers.repeat_interleave(self.block_size, dim=1)

    def dequantize(self) -> Tensor:
        """Return the weight, (N, K), in the row scale's float type."""
        return self.int8_rows().to(self.row_scale.dtype) * self.row_scale[:, None]

    def rows(self, rows: slice) -> IntegerWeight:
        """Return some of the weight's rows."""
        return replace(
            self,
            codes=self.codes[rows],
            multipliers=self.multipliers[rows],
            row_scale=self.row_scale[rows],
        )

    def take(self, columns: Tensor) -> IntegerWeight:
        """Return the weight's columns in another order, (K,), that leaves blocks together."""
        blocks = columns.reshape(-1, self.block_size)[:, 0] // self.block_size
        return replace(self, codes=self.codes[:, columns], multipliers=self.multipliers[:, blocks])

    def with_least_scale(self, least: float) -> tuple[IntegerWeight, Tensor]:
        """Return the weight with no row scale below `least`, and what its rows' integers shrank by.

        A row whose scale is raised is rounded anew, in units of `least`; the others keep their
        codes. A block takes the multiplier of least squared error.

        Returns:
            The weight, and (N,) float64: row scale / `least` where that is less than 1, else 1.
        """
        row_scale = self.row_scale.clamp(min=least)
        ratio = self.row_scale.double() / row_scale.double()
        small = ratio < 1
        if not bool(small.any()):
            return self, ratio
        codes, multipliers = self.codes.clone(), self.multipliers.clone()
        if self.bits == 8:
            codes[small] = _times_rows(self.codes[small], ratio[small])
            return replace(self, codes=codes, row_scale=row_scale), ratio
        wanted = self.int8_rows()[small].double() * ratio[small, None]
        blocks = wanted.reshape(wanted.shape[0], -1, self.block_size)
        codes[small], multipliers[small] = _nearest_codes(blocks)
        return replace(self, codes=codes, multipliers=multipliers, row_scale=row_scale), ratio

    def to(self, target: torch.device | torch.dtype | str) -> IntegerWeight:
        """Return the weight with its row scale in another float type, or all on another device."""
        if isinstance(target, torch.dtype):
            return replace(self, row_scale=self.row_scale.to(target))
        return replace(
            self,
            codes=self.codes.to(target),
            multipliers=self.multipliers.to(target),
            row_scale=self.row_scale.to(target),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """A low-rank addition to a weight, all integers.

    The branch reads the quantized input (paper, eq. 9). With q its INT8 codes in steps of δ,

        p = q right_codesᵀ / divisor,   y = δ (q rowsᵀ + p left_codesᵀ) · row_scale

    p counts in the input's own steps and `left_codes` in the weight's row scale: p rounded to INT8,
    the addition is rank more columns of INT8 rows and rank more codes of the input, in one product
    with the weight's own. An odd divisor keeps every p 1 / (2 divisor) away from a rounding tie:
    all runtimes find the same codes, as far as their sums of integers are exact.
    """

    left_codes: Tensor  # (N, rank) int8, |codes| <= 127
    right_codes: Tensor  # (rank, K) int8, |codes| <= 127
    divisor: Tensor  # (rank,) int32, odd, 1 ... 2^24

    def __post_init__(self) -> None:
        """Check the shapes, the ranges, and that no quotient can lie on a tie."""
        left, right, divisor = (
            tuple(part.shape) for part in (self.left_codes, self.right_codes, self.divisor)
        )
        if len(left) != 2 or len(right) != 2 or divisor != (left[1],) or right[0] != left[1]:
            raise QuantizationError(
                f"left_codes {left}, right_codes {right} and divisor {divisor} of the low-rank "
                f"branch do not fit together"
            )
        for name, codes in (("left_codes", self.left_codes), ("right_codes", self.right_codes)):
            require_integers(name, codes, low=-MAX_CODE_8BIT, high=MAX_CODE_8BIT)
        largest = 2**24  # float32 holds every integer up to here
        require_integers("divisors", self.divisor, low=1, high=largest, dtype=torch.int32)
        if not (self.divisor % 2 == 1).all():
            raise QuantizationError("a divisor of the low-rank branch is even")

    @property
    def rank(self) -> int:
        """Columns of `left_codes`."""
        return self.left_codes.shape[1]

    def right_scale(self, dtype: torch.dtype) -> Tensor:
        """Return 1 / divisor, (rank,)."""
        return self.divisor.double().reciprocal().to(dtype)

    def right(self, dtype: torch.dtype) -> Tensor:
        """Return right_codes / divisor, (rank, K)."""
        return self.right_codes.to(dtype) * self.right_scale(dtype)[:, None]

    def left(self, row_scale: Tensor) -> Tensor:
        """Return left_codes · row_scale, (N, rank)."""
        return self.left_codes.to(row_scale.dtype) * row_scale[:, None]

    def dequantize(self, row_scale: Tensor) -> Tensor:
        """Return what is added to a weight of these row scales, but for p's rounding: (N, K)."""
        return self.left(row_scale) @ self.right(row_scale.dtype)

    def rows(self, rows: slice) -> LowRank:
        """Return what the branch adds to some of the rows; the right factor stays."""
        return replace(self, left_codes=self.left_codes[rows])

    def with_rows_times(self, ratio: Tensor) -> LowRank:
        """Return the branch with row n of `left_codes` times ratio[n], rounded anew; (N,) <= 1."""
        return replace(self, left_codes=_times_rows(self.left_codes, ratio))

    def to(self, device: torch.device | str) -> LowRank:
        """Return the branch on another device."""
        return LowRank(
            left_codes=self.left_codes.to(device),
            right_codes=self.right_codes.to(device),
            divisor=self.divisor.to(device),
        )


def max_code(bits: int) -> int:
    """Return the largest code of 4 or 8 bits; codes are symmetric."""
    return MAX_CODE_4BIT if bits == 4 else MAX_CODE_8BIT


def require_integers(
    name: str, codes: Tensor, *, low: int, high: int, dtype: torch.dtype = torch.int8
) -> None:
    """Raise QuantizationError unless integers are of a type and lie in low … high.

    −128 is no code: it has no opposite, and its magnitude is no INT8 value.
    """
    if codes.dtype != dtype:
        raise QuantizationError(f"{name} are {codes.dtype}, not {dtype}")
    if not codes.numel():
        raise QuantizationError(f"there are no {name}: {tuple(codes.shape)}")
    least, most = int(codes.amin()), int(codes.amax())
    if least < low or most > high:
        raise QuantizationError(f"{name} run from {least} to {most}, outside {low} … {high}")


def require_scales(name: str, scales: Tensor) -> None:
    """Raise QuantizationError unless scales are floats, finite and positive."""
    if not scales.is_floating_point():
        raise QuantizationError(f"{name} are {scales.dtype}, not floats")
    if not (scales.isfinite() & (scales > 0)).all():
        raise QuantizationError(f"{name} are not all finite and positive")


def _fit_together(
    codes: tuple[int, ...], multipliers: tuple[int, ...], row_scale: tuple[int, ...]
) -> bool:
    """Return whether codes (N, K), multipliers (N, K / block_size) and row_scale (N,) fit."""
    return (
        len(codes) == len(multipliers) == 2
        and multipliers[0] == codes[0]
        and row_scale == codes[:1]
        and multipliers[1] > 0
        and codes[1] % multipliers[1] == 0
    )


def _times_rows(codes: Tensor, ratio: Tensor) -> Tensor:
    """Return round(codes · ratio[:, None]), int8; ratios (N,) of at most 1."""
    return (codes.double() * ratio.double()[:, None]).round().to(torch.int8)


def _nearest_codes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Round blocks in units of their row scale, each with the multiplier of least squared error.

    Args:
        blocks: (N, blocks, block_size) float, at most 126 in magnitude.

    Returns:
        Codes (N, K) and multipliers (N, blocks), both int8.
    """
    multipliers = torch.ones_like(blocks[..., :1])
    least = torch.full_like(multipliers, torch.inf)
    for candidate in range(1, MAX_MULTIPLIER + 1):
        rounded = (blocks / candidate).round().clamp(-MAX_CODE_4BIT, MAX_CODE_4BIT)
        error = (rounded * candidate - blocks).square().sum(dim=-1, keepdim=True)
        multipliers[error < least] = candidate
        least = torch.minimum(error, least)
    codes = (blocks / multipliers).round().clamp(-MAX_CODE_4BIT, MAX_CODE_4BIT)
    return codes.flatten(1).to(torch.int8), multipliers.squeeze(-1).to(torch.int8)


def inner_codes(products: Tensor, divisor: Tensor) -> Tensor:
    """Return p = clamp(round(products / divisor), −128, 127) of a low-rank branch.

    Args:
        products: q right_codesᵀ, (…, rank), integers of any type.
        divisor: the branch's, (rank,).

    Returns:
        (…, rank) float32 integers.
    """
    codes: Tensor = (products.float() / divisor).round()
    return codes.clamp(-MAX_CODE_8BIT - 1, MAX_CODE_8BIT)


def joined_rows(weight: IntegerWeight, low_rank: LowRank | None) -> Tensor:
    """Return [codes · multipliers | left_codes], (N, K + rank) int8."""
    rows = weight.int8_rows()
    return rows if low_rank is None else torch.cat([rows, low_rank.left_codes], dim=1)


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise QuantizationError if `tensor` has NaN or infinity."""
    if not tensor.isfinite().all():
        raise QuantizationError(f"{name} has NaN or infinity; check the checkpoint")


def rounded_float(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return floats rounded to a type that ships.

    Raises:
        QuantizationError: a value beyond the type's range, or NaN; names it and the remedy.
    """
    rounded = values.to(dtype)
    if not rounded.isfinite().all():
        odd = values[~rounded.isfinite()].flatten()[0].item()
        raise QuantizationError(
            f"{name} holds {odd:.4g}, and {str(dtype).removeprefix('torch.')} ends at "
            f"{torch.finfo(dtype).max:.4g}; use --precision bf16 or fp32"
        )
    return rounded


def nonzero_scale(maxima: Tensor, max_code: int) -> Tensor:
    """Return maxima / max_code, and 1 where that is zero (an all-zero row has scale 1)."""
    scale = maxima / max_code
    return torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to INT8, one scale per row: weight ≈ codes · scale[:, None].

    Args:
        weight: (N, K) float, finite; left untouched.

    Returns:
        codes (N, K) int8 in ±127 and scale (N,) in the weight's float type, 1 for an all-zero row.

    Raises:
        QuantizationError: NaN or infinity.
    """
    require_finite("a weight", weight)
    scale = nonzero_scale(weight.abs().amax(dim=1), MAX_CODE_8BIT)
    codes = (weight / scale[:, None]).round().clamp(-MAX_CODE_8BIT, MAX_CODE_8BIT)
    return codes.to(torch.int8), scale


def initial_row_scale(weight: Tensor) -> Tensor:
    """Return the row scale whose largest 4-bit value, 126, is the row's largest weight.

    Args:
        weight: (N, K) float.

    Returns:
        (N,) in the weight's type, > 0; 1 for an all-zero row.
    """
    return nonzero_scale(weight.abs().amax(dim=1), MAX_CODE_4BIT * MAX_MULTIPLIER)


def round_to_blocks(weight: Tensor, *, block_size: int) -> IntegerWeight:
    """Round a weight to 4-bit codes by nearest value, each block's range covered whole.

    The multiplier is the smallest that covers its block's largest weight, so `|error| ≤ scale / 2`
    with `scale = multiplier · row_scale`.

    Args:
        weight: (N, K) float, finite; left untouched.
        block_size: consecutive input channels that share a multiplier; divides K.

    Raises:
        QuantizationError: `block_size` does not divide K; NaN or infinity.
    """
    require_finite("a weight", weight)
    require_block_size(weight.shape[1], block_size)
    row_scale = initial_row_scale(weight)
    blocks = weight.reshape(weight.shape[0], -1, block_size) / row_scale[:, None, None]
    # The tolerance keeps a maximum of 126 + 1 ulp in multiplier 18.
    needed = (blocks.abs().amax(dim=-1) / MAX_CODE_4BIT - 1e-6).ceil()
    multipliers = needed.clamp(1, MAX_MULTIPLIER)
    codes = (blocks / multipliers[..., None]).round().clamp(-MAX_CODE_4BIT, MAX_CODE_4BIT)
    return IntegerWeight(
        codes=codes.flatten(1).to(torch.int8),
        multipliers=multipliers.to(torch.int8),
        row_scale=row_scale,
        bits=4,
    )


def round_to_rows(weight: Tensor) -> IntegerWeight:
    """Round a weight to 8-bit codes by nearest value, one scale per output channel."""
    codes, scale = quantize_rows(weight)
    ones = torch.ones(weight.shape[0], 1, dtype=torch.int8, device=weight.device)
    return IntegerWeight(codes=codes, multipliers=ones, row_scale=scale, bits=8)


def require_block_size(in_features: int, block_size: int) -> None:
    """Raise QuantizationError unless `block_size` divides `in_features`."""
    if in_features % block_size:
        raise QuantizationError(
            f"block_size={block_size} does not divide in_features={in_features}; pick a divisor"
        )


def pack_int4(codes: Tensor) -> Tensor:
    """Pack 4-bit codes two a byte, the first in the low half (ONNX and TensorRT order).

    Args:
        codes: int8 in −8 … 7, an even number of elements; flattened in row-major order.

    Returns:
        (elements / 2,) uint8.
    """
    if codes.numel() % 2:
        raise QuantizationError(f"{codes.numel()} 4-bit codes do not fill whole bytes")
    nibbles = codes.flatten().view(torch.uint8) & 0x0F
    return nibbles[0::2] | (nibbles[1::2] << 4)


def unpack_int4(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the int8 codes that `pack_int4` packed, in `shape`.

    Raises:
        QuantizationError: another type, or not one row of half as many bytes.
    """
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (math.prod(shape) // 2,):
        raise QuantizationError(
            f"packed codes are {tuple(packed.shape)} {packed.dtype}, expected "
            f"({math.prod(shape) // 2},) torch.uint8"
        )
    pairs = torch.stack([packed & 0x0F, packed >> 4], dim=1).flatten().to(torch.int8)
    return torch.where(pairs > 7, pairs - 16, pairs).reshape(shape)
