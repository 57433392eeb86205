"""One linear: from the activations on both sides of it to integers.

Notation: x_f is the input in the float model, x_q the input after everything quantized so far,
x̂ = Q(x_q / s) what the quantized linear reads. Everything minimises

    ‖Ŵ x̂ + b̂ − (W x_f + b)‖²,    Ŵ = (codes · multipliers + left_codes @ right) · row_scale,

first without rounding, in closed form from second moments (the target), then on the grid.

Ranks share the tokens: what is summed over tokens is summed over ranks, and rank 0 solves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ditas_export.calibration.methods import FIXED_ALPHA, Method
from ditas_export.distributed import SINGLE, Ranks
from ditas_export.quantization.integer import (
    IntegerWeight,
    LowRank,
    round_to_blocks,
    round_to_rows,
)
from ditas_export.quantization.low_rank import (
    Factors,
    SampledCodes,
    fit_output_error,
    fit_weight_error,
    integer_low_rank,
)
from ditas_export.quantization.ranges import (
    Ranges,
    activation_codes,
    token_codes,
)
from ditas_export.quantization.rounding import (
    InputMoments,
    compensated_blocks,
    compensated_rows,
    damped,
    ridge_of,
    rounding_order,
    upper_cholesky,
)
from ditas_export.quantization.smoothing import channel_maxima, smoothing_scale
from ditas_export.timings import Timings

RIDGE = 0.01
"""λ of the target and of rounding, relative to the mean diagonal of H."""

LOW_RANK_ITERATIONS = 10
"""Alternations of rounding and low-rank fit (DiTAS, section 4.1). Four cost 0.1 dB of a linear's
output, and half a dB of the final latents (the bundled model and its twin)."""

Batches = Callable[[int], Iterable[tuple[Tensor, Tensor]]]
"""From a stride to (x_f, x_q), each (some tokens, K), of every stride-th token, evenly spread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInputs:
    """Where a linear's inputs come from; they are computed again at every pass."""

    tokens: int  # of all ranks
    batches: Batches  # of this rank
    ranks: Ranks = SINGLE


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSettings:
    """How one linear is quantized."""

    method: Method
    weight_bits: int
    activation_bits: int
    ranges: Ranges
    block_size: int  # for 4 bits; divides K
    rank: int  # 0: no low-rank branch
    alpha_grid: Sequence[float]

    @property
    def has_branch(self) -> bool:
        """Whether the linear gets a low-rank branch."""
        return self.method.low_rank != "none" and self.rank > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SolvedLinear:
    """What solving gives: everything of a quantized linear but its ranges and measured error."""

    weight: IntegerWeight
    low_rank: LowRank | None
    bias: Tensor  # (N,) float32
    smoothing_scale: Tensor  # (K,) float32
    alpha: float | None = None

    def matrix(self) -> Tensor:
        """Return Ŵ, (N, K) float32, but for the rounding of the low-rank inner product."""
        weight = self.weight.dequantize()
        if self.low_rank is None:
            return weight
        return weight + self.low_rank.dequantize(self.weight.row_scale)

    def split(self, sizes: Sequence[int]) -> list[SolvedLinear]:
        """Return its rows as linears of so many outputs each, in order; they share all else."""
        found, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            found.append(
                replace(
                    self,
                    weight=self.weight.rows(rows),
                    low_rank=None if self.low_rank is None else self.low_rank.rows(rows),
                    bias=self.bias[rows],
                )
            )
            start += size
        return found

    def to(self, device: torch.device | str) -> SolvedLinear:
        """Return the linear on another device."""
        return replace(
            self,
            weight=self.weight.to(device),
            low_rank=None if self.low_rank is None else self.low_rank.to(device),
            bias=self.bias.to(device),
            smoothing_scale=self.smoothing_scale.to(device),
        )


def round_activations(
    x: Tensor, *, activation_bits: int, ranges: Ranges, static_range: float
) -> Tensor:
    """Return x̂: x / s on the grid that ships; x itself for float activations."""
    if activation_bits == 16:
        return x
    codes, steps = activation_codes(x, ranges=ranges, static_range=static_range)
    return codes.mul_(steps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class JointMoments:
    """Moments over tokens of x̂ and of the float output W x_f, centred, and their means."""

    quantized: Tensor  # H = E[x̂ x̂ᵀ], (K, K) float64
    cross: Tensor  # W C = E[W x_f x̂ᵀ], (N, K) float64
    quantized_mean: Tensor  # (K,) float64
    output_mean: Tensor  # (N,) float64

    @classmethod
    def accumulate(
        cls, weight: Tensor, batches: Iterable[tuple[Tensor, Tensor]], ranks: Ranks = SINGLE
    ) -> JointMoments:
        """Average over all ranks' batches of (x_f, x̂), each (tokens, K) float32; at least one.

        W is applied to the tokens where it makes them fewer numbers, else to the sums. What is
        summed is counted from the first batch's means: products of large constants would leave no
        digits of what varies about them.
        """
        narrowing = weight.shape[0] < weight.shape[1]
        sums: list[Tensor] = []
        origins: list[Tensor] = []
        count = 0
        for x_float, x_hat in batches:
            seen = x_float @ weight.mT if narrowing else x_float
            if not sums:
                means = ranks.broadcast([part.mean(dim=0) for part in (x_hat, seen)])
                origins = [mean.to(x_hat.device) for mean in means]
                shapes = (x_hat.shape[1:] * 2, (seen.shape[1], x_hat.shape[1]),
                          x_hat.shape[1:], seen.shape[1:])  # fmt: skip
                sums = [torch.zeros(shape, dtype=torch.float64, device=x_hat.device)
                        for shape in shapes]  # fmt: skip
            x_hat, seen = x_hat - origins[0], seen - origins[1]
            _add_upper_gram(sums[0], x_hat)
            _add_product(sums[1], seen, x_hat)
            sums[2] += x_hat.sum(dim=0)
            sums[3] += seen.sum(dim=0)
            count += x_hat.shape[0]
        tokens = int(ranks.sum_(torch.tensor(count)))
        upper, cross, quantized_mean, seen_mean = (ranks.sum_(total).div_(tokens) for total in sums)
        quantized = upper.triu_()
        quantized += quantized.triu(diagonal=1).mT
        quantized.addr_(quantized_mean, quantized_mean, alpha=-1)
        cross.addr_(seen_mean, quantized_mean, alpha=-1)
        quantized_mean, seen_mean = quantized_mean + origins[0], seen_mean + origins[1]
        if not narrowing:
            cross, seen_mean = weight.double() @ cross, weight.double() @ seen_mean
        return cls(
            quantized=quantized,
            cross=cross,
            quantized_mean=quantized_mean,
            output_mean=seen_mean,
        )


PRODUCT_PANEL = 384
"""Rows of a sum of products that are made at once, before they are added in float64: what is below
the diagonal of a Gram matrix is hardly made, and a panel's memory is small enough to be used again.
"""


def _add_upper_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x to (K, K) `total` on and above the diagonal; what is below it means nothing."""
    for start in range(0, x.shape[1], PRODUCT_PANEL):
        rows = slice(start, start + PRODUCT_PANEL)
        total[rows, start:] += x[:, rows].mT @ x[:, start:]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add aᵀ b to (N, K) `total`."""
    for start in range(0, a.shape[1], PRODUCT_PANEL):
        rows = slice(start, start + PRODUCT_PANEL)
        total[rows] += a[:, rows].mT @ b


def solve_linear(
    weight: Tensor,
    bias: Tensor,
    step_maxima: Tensor,
    inputs: LinearInputs,
    output_weights: Tensor,
    settings: LinearSettings,
    timings: Timings | None = None,
) -> SolvedLinear:
    """Quantize one linear by the method named in `settings`; the same result on every rank.

    Args:
        weight: W, (N, K) float32.
        bias: b, (N,) float32.
        step_maxima: (steps, K): largest |x_f| per time step and channel.
        inputs: the two streams' inputs to this linear.
        output_weights: (N,), > 0: what an error of each output channel counts downstream; used by
            methods with target correction, whose α and low rank share one error over all channels.
        settings: method, bits, block size, rank.
        timings: where the time goes.

    Returns:
        The linear, on the CPU.

    Raises:
        QuantizationError: a second moment that is not positive definite, as with NaN.
    """
    method, timings = settings.method, timings or Timings()
    if not method.target_correction:
        output_weights = torch.ones_like(output_weights)
    with timings.part("alpha search"):
        smoothing, alpha = _choose_smoothing(weight, step_maxima, inputs, output_weights, settings)
    moments = None
    if method.compensated_rounding or method.target_correction:
        with timings.part("moments"):
            batches = _quantized_batches(inputs, smoothing, step_maxima, settings)
            moments = JointMoments.accumulate(weight, batches, inputs.ranks)
    with timings.part("rounding and low rank"):
        target = _Target(
            weight=weight,
            bias=bias,
            smoothing=smoothing,
            output_weights=output_weights,
            sample=sample_codes(inputs, smoothing) if settings.has_branch else None,
            settings=settings,
        )
        solve = partial(_solve_by_weight, target)
        if moments is not None:
            solve = partial(_solve_by_moments, target, moments)
        return replace(inputs.ranks.first(lambda: solve().to("cpu")), alpha=alpha)


def _choose_smoothing(
    weight: Tensor,
    step_maxima: Tensor,
    inputs: LinearInputs,
    output_weights: Tensor,
    settings: LinearSettings,
) -> tuple[Tensor, float | None]:
    """Return s, (K,), and its α; ones and None without smoothing."""
    method = settings.method
    weight_max = weight_maxima(weight, method)
    if method.smoothing == "none":
        return torch.ones_like(weight_max), None
    input_max = step_maxima.amax(dim=0)
    if method.smoothing == "one-step":
        input_max = step_maxima[step_maxima.shape[0] // 2]
    alpha = FIXED_ALPHA
    if method.alpha_search:
        alpha = search_alpha(weight, input_max, step_maxima, inputs, output_weights, settings)
    return smoothing_scale(input_max, weight_max, alpha), alpha


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Target:
    """A linear to round, its smoothing chosen."""

    weight: Tensor  # W, (N, K)
    bias: Tensor  # (N,)
    smoothing: Tensor  # s, (K,)
    output_weights: Tensor  # (N,)
    sample: SampledCodes | None  # for the low-rank branch, where there is one
    settings: LinearSettings

    def solved(
        self, weight: IntegerWeight, factors: Factors | None, *, mends_mean: bool
    ) -> SolvedLinear:
        """Return the linear of a rounded weight, its low-rank factors made integers.

        Args:
            weight: rounded.
            factors: None without a branch.
            mends_mean: the bias will take up the mean of what they leave.
        """
        low_rank = None
        if factors is not None:
            assert self.sample is not None  # a method with factors has a branch
            low_rank = integer_low_rank(
                factors, weight.row_scale, self.output_weights, self.sample, centred=mends_mean
            )
        return SolvedLinear(
            weight=weight, low_rank=low_rank, bias=self.bias, smoothing_scale=self.smoothing
        )


def _solve_by_weight(target: _Target) -> SolvedLinear:
    """Round W · s for its own sake."""
    rounded, factors = _round_to_weight(target.weight * target.smoothing, target.settings)
    return target.solved(rounded, factors, mends_mean=False)


def _solve_by_moments(target: _Target, moments: JointMoments) -> SolvedLinear:
    """Round the best real weight, or W · s, for the least output error."""
    settings = target.settings
    order, cholesky = _ordered_cholesky(moments, settings)
    inputs = InputMoments.from_cholesky(cholesky)
    matrix = (target.weight * target.smoothing)[:, order]
    if settings.method.target_correction:
        ridge = ridge_of(moments.quantized, RIDGE)
        corrected = corrected_target(matrix, moments.cross[:, order], ridge, cholesky)
        matrix = corrected.to(matrix.dtype)
    rounded, factors = _round_to_target(matrix, inputs, target.output_weights, settings)
    back = order.argsort()
    factors = None if factors is None else factors.take(back)
    solved = target.solved(rounded.take(back), factors, mends_mean=True)
    # The moments are centred: what the weights leave of the means is the bias's to mend.
    shift = moments.output_mean - solved.matrix().double() @ moments.quantized_mean
    return replace(solved, bias=(target.bias.double() + shift).float())


def _ordered_cholesky(moments: JointMoments, settings: LinearSettings) -> tuple[Tensor, Tensor]:
    """Return the order in which a linear's columns are rounded, (K,) int64, and R in that order.

    As they are given in 8 bits, where activations make most of the error, and without compensation,
    which has no order.
    """
    moment = damped(moments.quantized, RIDGE)
    if settings.weight_bits == 8 or not settings.method.compensated_rounding:
        return torch.arange(moment.shape[0], device=moment.device), upper_cholesky(moment)
    return rounding_order(moment, block_size=settings.block_size)


def weight_maxima(weight: Tensor, method: Method) -> Tensor:
    """Return b, (K,): what smoothing holds against each channel's largest input.

    The largest weight of each input channel (DiTAS, eq. 4); with target correction, the largest
    relative to its row, for every row has a scale of its own: a row that is large as a whole (V
    rows with outliers) is no reason to smooth differently.
    """
    if method.target_correction:
        largest = weight.abs().amax(dim=1, keepdim=True)
        weight = weight / torch.where(largest > 0, largest, torch.ones_like(largest))
    return channel_maxima(weight)


def corrected_target(smoothed: Tensor, cross: Tensor, ridge: Tensor, cholesky: Tensor) -> Tensor:
    """Return W* = (W C + λ W diag(s)) (H + λI)⁻¹: the best real weight for the quantized input.

    Args:
        smoothed: W diag(s), (N, K).
        cross: W C = E[W x_f x̂ᵀ], (N, K) float64.
        ridge: λ, a scalar.
        cholesky: R, (K, K) float64, upper: R Rᵀ = H + λI, H = E[x̂ x̂ᵀ].

    Returns:
        (N, K) float64.
    """
    target = torch.addcmul(cross, smoothed.to(cross.dtype), ridge)
    for factor, upper in ((cholesky.mT, False), (cholesky, True)):
        torch.linalg.solve_triangular(factor, target, upper=upper, left=False, out=target)
    return target


def search_alpha(
    weight: Tensor,
    input_max: Tensor,
    step_maxima: Tensor,
    inputs: LinearInputs,
    output_weights: Tensor,
    settings: LinearSettings,
) -> float:
    """Return the α of the grid with the least output error on a sample of tokens and outputs.

    The error is that of weights rounded to nearest, ‖Q(x_q / s) Q(s · W) − x_f W‖², whatever the
    rounding that follows: to search with compensated rounding costs more and gains nothing that
    could be measured on the bundled model. Where there are more than five, every α is tried on a
    quarter of the sample, and the best five on all of it.

    Source: DiTAS, Algorithm 1.
    """
    x_float, x_quantized = sample_tokens(inputs)
    weight_max = weight_maxima(weight, settings.method)
    stride = -(-weight.shape[0] // SAMPLE_OUTPUTS)
    weight, output_weights = weight[::stride], output_weights[::stride]
    wanted = x_float @ weight.mT

    def loss(alpha: float, every: int) -> float:
        """Return the error of every `every`-th token, summed."""
        smoothing = smoothing_scale(input_max, weight_max, alpha)
        static_range = float((step_maxima / smoothing).amax())
        rounded = _round_once(weight * smoothing, settings).dequantize()
        total = 0.0
        for x_q, y in zip(
            torch.split(x_quantized[::every], SEARCH_BATCH),
            torch.split(wanted[::every], SEARCH_BATCH),
            strict=True,
        ):
            x_hat = round_activations(
                x_q / smoothing,
                activation_bits=settings.activation_bits,
                ranges=settings.ranges,
                static_range=static_range,
            )
            error = (x_hat @ rounded.mT - y) * output_weights
            total += float(error.square().sum(dtype=torch.float64))
        return total

    def ranked(candidates: Sequence[float], every: int) -> list[float]:
        """Return the candidates, that of the least error first."""
        losses = torch.tensor([loss(alpha, every) for alpha in candidates], dtype=torch.float64)
        order = inputs.ranks.sum_(losses).argsort(stable=True)
        return [candidates[index] for index in order.tolist()]

    candidates = settings.alpha_grid
    if len(candidates) > SHORT_LIST:
        candidates = ranked(candidates, 4)[:SHORT_LIST]
    return ranked(candidates, 1)[0]


SAMPLE_TOKENS = 4096
"""Tokens on which α is searched, and a branch's divisors are chosen."""

SEARCH_BATCH = 1024
"""Tokens of the sample that are tried at once."""

SHORT_LIST = 5
"""Values of α that are tried on all of the sample."""

SAMPLE_OUTPUTS = 768
"""Outputs of a linear on which α is searched, evenly spread."""


def sample_tokens(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """Return this rank's part of an even sample of about 4096 tokens, (tokens, K) per stream."""
    floats, quantized = zip(*inputs.batches(-(-inputs.tokens // SAMPLE_TOKENS)), strict=True)
    return torch.cat(floats), torch.cat(quantized)


def sample_codes(inputs: LinearInputs, smoothing: Tensor) -> SampledCodes:
    """Return the quantized input of an even sample of about 4096 tokens, of all ranks."""
    codes, ranges = token_codes(sample_tokens(inputs)[1] / smoothing)
    gathered = inputs.ranks.gather((codes.to(torch.int8).cpu(), ranges.cpu()))
    return SampledCodes(
        codes=torch.cat([part[0] for part in gathered]).to(smoothing.device),
        ranges=torch.cat([part[1] for part in gathered]).to(smoothing.device),
    )


def _quantized_batches(
    inputs: LinearInputs, smoothing: Tensor, step_maxima: Tensor, settings: LinearSettings
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield (x_f, x̂) batch by batch."""
    static_range = float((step_maxima / smoothing).amax())
    for x_float, x_quantized in inputs.batches(1):
        yield (
            x_float,
            round_activations(
                x_quantized / smoothing,
                activation_bits=settings.activation_bits,
                ranges=settings.ranges,
                static_range=static_range,
            ),
        )


def _round_once(smoothed: Tensor, settings: LinearSettings) -> IntegerWeight:
    """Round W · s to the nearest codes."""
    if settings.weight_bits == 8:
        return round_to_rows(smoothed)
    return round_to_blocks(smoothed, block_size=settings.block_size)


def _round_to_weight(
    smoothed: Tensor, settings: LinearSettings
) -> tuple[IntegerWeight, Factors | None]:
    """Round W · s to nearest, with LoRA-AO where the method has it; the best iterate is kept."""
    rounded = _round_once(smoothed, settings)
    if not settings.has_branch:
        return rounded, None
    best: tuple[IntegerWeight, Factors | None] = (rounded, None)
    best_error = float("inf")
    for _ in range(LOW_RANK_ITERATIONS):
        error_left = (smoothed - rounded.dequantize()).double()
        factors = fit_weight_error(error_left, settings.rank).to(torch.float32)
        addition = factors.product()
        error = float(((smoothed - rounded.dequantize() - addition) ** 2).sum())
        if error < best_error:
            best, best_error = (rounded, factors), error
        rounded = _round_once(smoothed - addition, settings)
    return best


def _round_to_target(
    target: Tensor, moments: InputMoments, output_weights: Tensor, settings: LinearSettings
) -> tuple[IntegerWeight, Factors | None]:
    """Round the target on the grid, with the low-rank branch alternated; best iterate kept."""

    def rounding(matrix: Tensor, whitened: Tensor) -> tuple[IntegerWeight, Tensor]:
        """Return the integers and the whitened error that they leave."""
        if not settings.method.compensated_rounding:
            rounded = _round_once(matrix, settings)
            return rounded, moments.whiten(matrix - rounded.dequantize())
        if settings.weight_bits == 8:
            return compensated_rows(matrix, whitened, moments)
        return compensated_blocks(matrix, whitened, moments, block_size=settings.block_size)

    target = target.mT.contiguous().mT  # a column in one piece, as all that is made of it
    whitened_target = moments.whiten(target)
    if not settings.has_branch:
        return rounding(target, whitened_target)[0], None
    left = target.new_zeros(target.shape[0], settings.rank)
    right = whitened_right = target.new_zeros(settings.rank, target.shape[1])
    best: tuple[IntegerWeight, Factors] | None = None
    best_error = float("inf")
    for _ in range(LOW_RANK_ITERATIONS):
        rounded, whitened = rounding(
            _less_product(target, left, right), _less_product(whitened_target, left, whitened_right)
        )
        whitened.mT.addmm_(whitened_right.mT, left.mT)  # what codes alone leave of the target
        factors = fit_output_error(whitened, moments, settings.rank, output_weights)
        factors = factors.to(target.dtype)
        left, right = factors.left, factors.right()
        whitened_right = moments.whiten(right)
        whitened.mT.addmm_(whitened_right.mT, left.mT, alpha=-1)
        by_row = torch.linalg.vector_norm(whitened, dim=1) * output_weights
        error = float(by_row.square().sum(dtype=torch.float64))
        if best is None or error < best_error:
            best, best_error = (rounded, factors), error
    assert best is not None  # there is a first alternation
    return best


def _less_product(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return matrix − left @ right, (N, K), a column in one piece."""
    return torch.addmm(matrix.mT, right.mT, left.mT, alpha=-1).mT
