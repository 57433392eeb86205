"""The walk: block by block, linear by linear, with two streams of hidden states.

The float stream passes through the float model, the quantized stream through everything quantized
so far; each linear is solved against the float stream's output. Methods without target correction
walk with the float stream on both sides. Only hidden states are kept, (rows, T, D) per stream, and
the attention outputs of the current block: memory does not grow with depth.

Ranks share the rows in whole batches, and sums over batches are in float64: how many ranks there
are moves last bits only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ditas_export.calibration.quantized_dit import QuantizedLinear
from ditas_export.calibration.solve import (
    LinearInputs,
    LinearSettings,
    SolvedLinear,
    solve_linear,
)
from ditas_export.distributed import SINGLE, Ranks
from ditas_export.dit.model import DiT, DiTBlock, modulate
from ditas_export.dit.sites import LinearKind, LinearSite
from ditas_export.errors import CalibrationError
from ditas_export.figures import decibels
from ditas_export.quantization.integer import inner_codes, joined_rows
from ditas_export.quantization.ranges import activation_codes
from ditas_export.timings import Timings

ROWS_PER_BATCH = 16
"""Rows (state and guidance half) that pass through a linear at once, where they are short."""

TOKENS_PER_BATCH = 1024
"""Tokens that pass through a linear at once, long rows fewer at a time: what a wide linear makes of
them stays in the processor's cache, and is not asked of the system anew each time."""

MEASURED_STRIDE = 3
"""Every third token of fc1's output is measured; nothing else is made of that output. Three has no
divisor in common with the width of any image."""

ALL = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WalkStates:
    """The model inputs that the walk sees."""

    latents: Tensor  # (rows, C, H, W) float32
    timesteps: Tensor  # (rows,) int64
    class_labels: Tensor  # (rows,) int64


@dataclass(slots=True)
class _Streams:
    """This rank's hidden states of both streams, (rows, T, D) each."""

    floats: Tensor
    quantized: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """Which rows are this rank's."""

    ranks: Ranks
    batches: list[tuple[int, slice]]  # number of the batch, rows of all ranks
    total: int  # rows of all ranks

    @property
    def rows(self) -> slice:
        """This rank's rows among those of all ranks."""
        return slice(self.batches[0][1].start, self.batches[-1][1].stop)

    def local_batches(self) -> Iterator[tuple[int, slice]]:
        """Yield the batches, their rows counted from this rank's first."""
        for number, rows in self.batches:
            yield number, slice(rows.start - self.rows.start, rows.stop - self.rows.start)


def rms(x: Tensor, ranks: Ranks = SINGLE) -> Tensor:
    """Return the root mean square over the first dimension, never zero; a vector gives a scalar.

    With ranks, over the first dimension of all of theirs.
    """
    total = ranks.sum_(x.square().sum(dim=0, dtype=torch.float64))
    count = int(ranks.sum_(torch.tensor(x.shape[0])))
    return (total / count).sqrt().clamp(min=1e-12).to(x.dtype)


def row_batches(rows: int, row_tokens: int = 1) -> Iterator[slice]:
    """Yield slices that cover all rows, of at most 16 rows and, past one row, 1024 tokens."""
    size = max(1, min(ROWS_PER_BATCH, TOKENS_PER_BATCH // row_tokens))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def rank_batches(rows: int, row_tokens: int, ranks: Ranks) -> list[tuple[int, slice]]:
    """Return this rank's batches of rows with their numbers: neighbours, shared evenly.

    Raises:
        CalibrationError: more ranks than batches.
    """
    batches = list(enumerate(row_batches(rows, row_tokens)))
    if len(batches) < ranks.world_size:
        raise CalibrationError(
            f"{ranks.world_size} processes for {rows} rows of calibration states; "
            f"launch at most {len(batches)}, or give the walk more states (--walk-tokens, "
            f"--samples, --steps)"
        )
    first, last = (len(batches) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    return batches[first:last]


SettingsOf = Callable[[LinearSite], LinearSettings]


def walk(
    model: DiT,
    states: WalkStates,
    step_maxima: Mapping[str, Tensor],
    settings_of: SettingsOf,
    *,
    known: Mapping[str, QuantizedLinear],
    ranks: Ranks = SINGLE,
    timings: Timings | None = None,
) -> Iterator[tuple[LinearSite, QuantizedLinear]]:
    """Yield every linear of the model, quantized, in walk order; the same on every rank.

    Args:
        model: float32, on the device that computes; left untouched.
        states: the inputs to walk with, on the same device.
        step_maxima: site name -> (steps, K), largest |x| per time step and channel.
        settings_of: how to quantize a site.
        known: linears solved by an earlier, interrupted walk: passed through, not solved again.
        ranks: the processes that share the rows.
        timings: where the time goes.

    Raises:
        CalibrationError: a linear's output is not finite, or more ranks than batches of rows.
    """
    with torch.no_grad():
        total = states.latents.shape[0]
        batches = rank_batches(total, model.config.num_tokens, ranks)
        share = _Share(ranks=ranks, batches=batches, total=total)
        embedded = [
            model.embed(states.latents[rows], states.timesteps[rows], states.class_labels[rows])
            for _, rows in batches
        ]
        hidden = torch.cat([part[0] for part in embedded])
        conditioning = torch.cat([part[1] for part in embedded])
        del embedded
        streams = _Streams(floats=hidden, quantized=hidden.clone())
        timings = timings or Timings()
        for index, block in enumerate(model.blocks):
            walker = _BlockWalk(
                block, index, conditioning, streams, share, step_maxima, settings_of, timings
            )
            yield from walker.run(known)


Inputs = Callable[[slice, slice], tuple[Tensor, Tensor]]
"""From rows and tokens of each to a linear's input in both streams, (rows, tokens, K) each."""


class _BlockWalk:
    """One block's four linears: where their inputs come from and where their outputs go."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        conditioning: Tensor,
        streams: _Streams,
        share: _Share,
        step_maxima: Mapping[str, Tensor],
        settings_of: SettingsOf,
        timings: Timings,
    ) -> None:
        assert isinstance(block, DiTBlock)
        self.block = block
        self.index = index
        self.streams = streams
        self.share = share
        self.step_maxima = step_maxima
        self.settings_of = settings_of
        self.timings = timings
        (
            self.shift_msa,
            self.scale_msa,
            self.gate_msa,
            self.shift_mlp,
            self.scale_mlp,
            self.gate_mlp,
        ) = block.adaLN_modulation(conditioning).chunk(6, dim=1)

    def run(
        self, known: Mapping[str, QuantizedLinear]
    ) -> Iterator[tuple[LinearSite, QuantizedLinear]]:
        """Yield the block's linears and leave both streams at the block's end."""
        streams = self.streams
        mixed = _Streams(
            floats=torch.empty_like(streams.floats), quantized=torch.empty_like(streams.quantized)
        )

        def keep_mixed(rows: slice, y_float: Tensor, y_quantized: Tensor) -> None:
            mixed.floats[rows] = self.block.attn.mix(y_float)
            mixed.quantized[rows] = self.block.attn.mix(y_quantized)

        def add_attention(rows: slice, y_float: Tensor, y_quantized: Tensor) -> None:
            gate = self.gate_msa[rows].unsqueeze(1)
            streams.floats[rows] += gate * y_float
            streams.quantized[rows] += gate * y_quantized

        def add_mlp(rows: slice, y_float: Tensor, y_quantized: Tensor) -> None:
            gate = self.gate_mlp[rows].unsqueeze(1)
            streams.floats[rows] += gate * y_float
            streams.quantized[rows] += gate * y_quantized

        def qkv_inputs(rows: slice, tokens: slice) -> tuple[Tensor, Tensor]:
            shift, scale = self.shift_msa[rows], self.scale_msa[rows]
            norm = self.block.norm1
            return (
                modulate(norm(streams.floats[rows, tokens]), shift, scale),
                modulate(norm(streams.quantized[rows, tokens]), shift, scale),
            )

        def proj_inputs(rows: slice, tokens: slice) -> tuple[Tensor, Tensor]:
            return mixed.floats[rows, tokens], mixed.quantized[rows, tokens]

        def fc1_inputs(rows: slice, tokens: slice) -> tuple[Tensor, Tensor]:
            shift, scale = self.shift_mlp[rows], self.scale_mlp[rows]
            norm = self.block.norm2
            return (
                modulate(norm(streams.floats[rows, tokens]), shift, scale),
                modulate(norm(streams.quantized[rows, tokens]), shift, scale),
            )

        qkv = self._solve("attn.qkv", self.block.attn.qkv, qkv_inputs, known)
        self._advance(qkv, self.block.attn.qkv, qkv_inputs, keep_mixed)
        yield qkv.site, qkv.finished()

        proj = self._solve("attn.proj", self.block.attn.proj, proj_inputs, known)
        self._advance(proj, self.block.attn.proj, proj_inputs, add_attention)
        mixed.floats = mixed.quantized = torch.empty(0)  # done with
        yield proj.site, proj.finished()

        fc1 = self._solve("mlp.fc1", self.block.mlp.fc1, fc1_inputs, known)

        def fc2_inputs(rows: slice, tokens: slice) -> tuple[Tensor, Tensor]:
            x_float, x_quantized = fc1_inputs(rows, tokens)
            y_float = self.block.mlp.fc1(x_float)
            corrects = fc1.settings.method.target_correction
            y_quantized = fc1.output(x_quantized) if corrects else y_float
            return self.block.mlp.act(y_float), self.block.mlp.act(y_quantized)

        measured = slice(None, None, MEASURED_STRIDE)
        self._advance(fc1, self.block.mlp.fc1, fc1_inputs, lambda *_: None, tokens=measured)
        yield fc1.site, fc1.finished()

        fc2 = self._solve("mlp.fc2", self.block.mlp.fc2, fc2_inputs, known)
        self._advance(fc2, self.block.mlp.fc2, fc2_inputs, add_mlp)
        yield fc2.site, fc2.finished()

    def _solve(
        self,
        kind: LinearKind,
        linear: nn.Module,
        inputs: Inputs,
        known: Mapping[str, QuantizedLinear],
    ) -> _WalkedLinear:
        """Quantize one linear, or take it from `known`."""
        assert isinstance(linear, nn.Linear)
        site = LinearSite(self.index, kind)
        settings = self.settings_of(site)
        maxima = self.step_maxima[site.name]
        if site.name in known:
            return _WalkedLinear(site, settings, maxima, known=known[site.name])

        row_tokens = self.streams.floats.shape[1]

        def batches(stride: int) -> Iterator[tuple[Tensor, Tensor]]:
            """From batch to batch other tokens come first, so that every position is seen."""
            step = min(stride, row_tokens)
            for number, rows in self.share.local_batches():
                x_float, x_quantized = inputs(rows, slice(number % step, None, step))
                yield x_float.flatten(0, 1), x_quantized.flatten(0, 1)

        source = LinearInputs(
            tokens=self.share.total * row_tokens, batches=batches, ranks=self.share.ranks
        )
        with self.timings.part("passing on"):
            weights = self._output_weights(kind, linear, inputs)
        solved = solve_linear(
            linear.weight, linear.bias, maxima, source, weights, settings, self.timings
        )
        return _WalkedLinear(site, settings, maxima, solved=solved)

    def _output_weights(
        self,
        kind: LinearKind,
        linear: nn.Linear,
        inputs: Inputs,
    ) -> Tensor:
        """Return what an error of each output channel counts downstream, to first order, (N,).

        proj, fc2: the gate that multiplies the channel. fc1: the column of fc2 that reads it. q:
        the channel of k that it meets, and the reverse; v: the column of proj that reads it; the
        three are levelled to count the same. Rescaling two sides of a channel against each other,
        as planted or natural outliers do, then changes nothing.
        """
        ranks = self.share.ranks
        if kind == "attn.proj":
            return rms(self.gate_msa, ranks)
        if kind == "mlp.fc2":
            return rms(self.gate_mlp, ranks)
        if kind == "mlp.fc1":
            return rms(self.block.mlp.fc2.weight)
        stride = -(-self.share.total // ROWS_PER_BATCH)
        rows = slice(-self.share.rows.start % stride, None, stride)
        q, k, v = rms(linear(inputs(rows, ALL)[0]).flatten(0, 1), ranks).chunk(3)
        reader = rms(self.block.attn.proj.weight)
        return torch.cat([k / rms(q * k), q / rms(q * k), reader / rms(reader * v)])

    def _advance(
        self,
        walked: _WalkedLinear,
        linear: nn.Module,
        inputs: Inputs,
        consume: Callable[[slice, Tensor, Tensor], None],
        *,
        tokens: slice = ALL,
    ) -> None:
        """Pass both streams through a linear, measure its error, hand the outputs on."""
        with self.timings.part("passing on"):
            for _, rows in self.share.local_batches():
                x_float, x_quantized = inputs(rows, tokens)
                y_float = linear(x_float)
                y_quantized = walked.output(x_quantized)
                walked.measure(y_float, y_quantized)
                if not walked.settings.method.target_correction:
                    y_quantized = y_float
                consume(rows, y_float, y_quantized)
            walked.reduce(self.share.ranks)
            walked.require_finite()


class _WalkedLinear:
    """A solved linear while the streams pass through it."""

    def __init__(
        self,
        site: LinearSite,
        settings: LinearSettings,
        maxima: Tensor,
        *,
        solved: SolvedLinear | None = None,
        known: QuantizedLinear | None = None,
    ) -> None:
        source = solved if solved is not None else known
        assert source is not None
        self.site = site
        self.settings = settings
        self.solved = source
        self.known = known
        device = maxima.device
        self.smoothing = source.smoothing_scale.to(device)
        self.step_ranges = (maxima / self.smoothing).amax(dim=1)
        weight = source.weight.to(device)
        self.low_rank = None if source.low_rank is None else source.low_rank.to(device)
        self.matrix = joined_rows(weight, self.low_rank) * weight.row_scale[:, None]
        self.bias = source.bias.to(device)
        self.signal = 0.0
        self.noise = 0.0

    def output(self, x: Tensor) -> Tensor:
        """Return the quantized linear's output, (…, N), for its unsmoothed input (…, K)."""
        x = x / self.smoothing
        if self.settings.activation_bits == 16:
            if self.low_rank is not None:
                inner = functional.linear(x, self.low_rank.right(x.dtype))
                x = torch.cat([x, inner], dim=-1)
            return functional.linear(x, self.matrix, self.bias)
        codes, steps = activation_codes(
            x, ranges=self.settings.ranges, static_range=float(self.step_ranges.amax())
        )
        if self.low_rank is not None:
            products = functional.linear(codes, self.low_rank.right_codes.to(codes.dtype))
            codes = torch.cat([codes, inner_codes(products, self.low_rank.divisor)], dim=-1)
        return functional.linear(codes * steps, self.matrix, self.bias)

    def measure(self, y_float: Tensor, y_quantized: Tensor) -> None:
        """Add a batch of outputs to the error's account."""
        self.signal += _energy(y_float)
        self.noise += _energy(y_quantized - y_float)

    def reduce(self, ranks: Ranks) -> None:
        """Add up the accounts of all ranks."""
        totals = ranks.sum_(torch.tensor([self.signal, self.noise], dtype=torch.float64))
        self.signal, self.noise = totals.tolist()

    def require_finite(self) -> None:
        """Raise CalibrationError if any output had NaN or infinity."""
        if not torch.tensor(self.signal + self.noise).isfinite():
            raise CalibrationError(
                f"{self.site.name} puts out NaN or infinity on the calibration states; "
                f"check the checkpoint, or --num-heads"
            )

    def finished(self) -> QuantizedLinear:
        """Return the artefact's record of this linear, on the CPU."""
        if self.known is not None:
            return self.known
        return QuantizedLinear(
            weight=self.solved.weight,
            low_rank=self.solved.low_rank,
            bias=self.solved.bias,
            smoothing_scale=self.solved.smoothing_scale,
            alpha=self.solved.alpha,
            step_ranges=self.step_ranges.cpu(),
            output_snr_db=decibels(self.signal, self.noise),
        )


def _energy(y: Tensor) -> float:
    """Return Σ y²: of each token in float32, of all of them in float64."""
    return float(y.square().sum(dim=-1).sum(dtype=torch.float64))
