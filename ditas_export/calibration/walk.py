"""The walk: stage by stage, group by group, with two streams of what passes between the stages.

The float stream passes through the float model, the quantized stream through everything quantized
so far; each group of linears is solved against the float stream's output. Methods without target
correction walk with the float stream on both sides. Only what passes on is kept, (rows, T, …) per
stream: memory does not grow with depth.

The walk knows a family's tables and nothing else of a model. A linear's input is what its stage
hands to it: the stage runs on a batch of rows until it gets there. What was solved runs as the file
will, as `FakeQuantLinear`, in ONNX Runtime's form.

Ranks share the rows in whole batches, and sums over batches are in float64: how many ranks there
are moves last bits only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.calibration.modules import FakeQuantLinear
from ditas_export.calibration.output_weights import output_weights
from ditas_export.calibration.quantized_model import QuantizedLinear
from ditas_export.calibration.row_shares import Share, rank_batches
from ditas_export.calibration.solve import (
    LinearInputs,
    LinearSettings,
    SolvedLinear,
    solve_linear,
)
from ditas_export.distributed import SINGLE, Ranks
from ditas_export.errors import CalibrationError
from ditas_export.families.base import (
    ALL,
    Block,
    FamilyModel,
    Group,
    ModelConfig,
    ModelInputs,
    Stage,
    State,
)
from ditas_export.families.registry import family_of
from ditas_export.figures import decibels
from ditas_export.timings import Timings

MEASURED_STRIDE = 3
"""Every third token of a linear's output is measured where nothing else is made of that output.
Three has no divisor in common with the width of any image."""

SettingsOf = Callable[[str], LinearSettings]
"""From a linear's module path to how it is quantized; of one method in all of them."""


def walk(
    model: FamilyModel,
    config: ModelConfig,
    states: ModelInputs,
    step_maxima: Mapping[str, Tensor],
    settings_of: SettingsOf,
    *,
    known: Mapping[str, QuantizedLinear],
    ranks: Ranks = SINGLE,
    timings: Timings | None = None,
) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield every linear of the model, quantized, in walk order; the same on every rank.

    Args:
        model: float32, on the device that computes; left untouched.
        config: of the model.
        states: the inputs to walk with, on the same device.
        step_maxima: module path -> (steps, K), largest |x| per time step and channel.
        settings_of: how to quantize a linear.
        known: linears solved by an earlier, interrupted walk: passed through, not solved again.
        ranks: the processes that share the rows.
        timings: where the time goes.

    Raises:
        CalibrationError: a linear's output is not finite, more ranks than batches of rows, or
            linears of different inputs under one s.
    """
    family, rows = family_of(config), states.latents.shape[0]
    for block in family.blocks(config):
        _require_one_input(block)
    with torch.no_grad():
        batches = rank_batches(rows, config.num_tokens, ranks)
        entered = [family.enter(model, states.rows(batch)) for _, batch in batches]
        floats = _joined([state for state, _ in entered])
        constants = _joined([fixed for _, fixed in entered])
        del entered
        walker = _Walker(
            model=model,
            quantized=_sharing(model, family.module(config)),
            floats=floats,
            streams={name: value.clone() for name, value in floats.items()},
            constants=constants,
            share=Share(ranks=ranks, batches=batches, total=rows),
            states=states,
            step_maxima=step_maxima,
            settings_of=settings_of,
            known=known,
            timings=timings or Timings(),
        )
        for block in family.blocks(config):
            yield from walker.run(block)


def _require_one_input(block: Block) -> None:
    """Refuse groups whose linears read different inputs: nothing solves them together (yet)."""
    for group in block.groups():
        if not group.reads_one_input:
            raise CalibrationError(
                f"{' and '.join(map(block.name, group.linears))} read different inputs under one "
                f"s, which the walk does not solve (yet); its folds can be proved by prove_folds"
            )


def _joined(parts: Sequence[State]) -> dict[str, Tensor]:
    """Return states of batches as one, their rows one after the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _sharing(model: nn.Module, other: nn.Module) -> nn.Module:
    """Return another module with the tensors of a model; its linears can be replaced."""
    other.load_state_dict(model.state_dict(), assign=True)
    return other.eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Walker:
    """What a walk holds: both models, and what passes on in each."""

    model: nn.Module
    quantized: nn.Module  # the same, but for the linears that are solved
    floats: dict[str, Tensor]  # this rank's rows
    streams: dict[str, Tensor]  # the same of the quantized model
    constants: dict[str, Tensor]
    share: Share
    states: ModelInputs  # of all ranks: their masks are asked for
    step_maxima: Mapping[str, Tensor]
    settings_of: SettingsOf
    known: Mapping[str, QuantizedLinear]
    timings: Timings

    def run(self, block: Block) -> Iterator[tuple[str, QuantizedLinear]]:
        """Yield a block's linears, and leave both streams at its end."""
        module = self.model.get_submodule(block.path)
        weights: Mapping[str, Tensor] = {}
        if any(name not in self.known for name in block.linears):
            with self.timings.part("passing on"):
                weights = output_weights(
                    module, block, self.floats, self.constants, self.share, masks=self._masks(block)
                )
        for stage in block.stages:
            steps = _StageWalk(self, block, stage)
            for group in stage.groups:
                walked = steps.solve(group, weights)
                with self.timings.part("passing on"):
                    passes = steps.measure if group is not stage.groups[-1] else steps.advance
                    passes(group, walked)
                    for linear in walked:
                        linear.reduce(self.share.ranks)
                        linear.require_finite()
                for linear in walked:
                    yield linear.name, linear.finished()
        for name in block.linears:
            self.quantized.set_submodule(name, nn.Identity())  # its memory is given back

    def _masks(self, block: Block) -> dict[str, Tensor]:
        """Return the masks that a block's groups name, by input."""
        names = {group.mask for group in block.groups() if group.mask is not None}
        return {name: self.states[name] for name in names}


class _StageWalk:
    """One stage of a block: where its linears' inputs come from, and what it passes on."""

    def __init__(self, walker: _Walker, block: Block, stage: Stage) -> None:
        self.walker = walker
        self.block = block
        self.stage = stage
        self.module = walker.model.get_submodule(block.path)
        self.quantized = walker.quantized.get_submodule(block.path)
        first = block.name(stage.groups[0].linears[0])
        self.corrects = walker.settings_of(first).method.target_correction

    def inputs(self, group: Group, rows: slice, tokens: slice) -> tuple[Tensor, Tensor]:
        """Return what a group reads in both streams, (rows, tokens, K) each.

        Where the group has a mask, the real tokens alone, (real tokens, K).
        """
        x = self._read(self.module, self.walker.floats, group, rows, tokens)
        x = self._real(group, x, rows, tokens)
        if not self.corrects:
            return x, x
        x_quantized = self._read(self.quantized, self.walker.streams, group, rows, tokens)
        return x, self._real(group, x_quantized, rows, tokens)

    def _real(self, group: Group, x: Tensor, rows: slice, tokens: slice = ALL) -> Tensor:
        """Return the real tokens of x (rows, tokens, …), x itself where all are."""
        if group.mask is None:
            return x
        first = self.walker.share.rows.start
        mask = self.walker.states[group.mask][first + rows.start : first + rows.stop, tokens]
        return x[mask != 0]

    def _read(
        self, module: nn.Module, state: State, group: Group, rows: slice, tokens: slice
    ) -> Tensor:
        """Run a module until it gets to a group's linears, and return what they read."""
        at_once = tokens if group.is_token_wise else ALL
        part = {name: value[rows, at_once] for name, value in state.items()}

        def stop(_module: nn.Module, read: tuple[Tensor, ...]) -> None:
            raise _ReachedError(read[0])

        handle = module.get_submodule(group.linears[0]).register_forward_pre_hook(stop)
        try:
            self.stage.run(module, part, self._constants(rows))
        except _ReachedError as reached:
            return reached.read if group.is_token_wise else reached.read[:, tokens]
        finally:
            handle.remove()
        raise AssertionError(f"a stage of {self.block.path} does not run {group.linears[0]}")

    def _constants(self, rows: slice) -> State:
        """Return some rows of the constants."""
        return {name: value[rows] for name, value in self.walker.constants.items()}

    def solve(self, group: Group, weights: Mapping[str, Tensor]) -> list[_WalkedLinear]:
        """Quantize a group's linears, or take them from the known ones, and put them in place."""
        walker = self.walker
        names = [self.block.name(path) for path in group.linears]
        settings, maxima = walker.settings_of(names[0]), walker.step_maxima[names[0]]
        solved: Sequence[SolvedLinear | QuantizedLinear]
        if all(name in walker.known for name in names):
            solved = [walker.known[name] for name in names]
        else:
            linears = [self.module.get_submodule(path) for path in group.linears]
            together = solve_linear(
                torch.cat([linear.weight for linear in linears]),  # type: ignore[misc]
                torch.cat([linear.bias for linear in linears]),  # type: ignore[misc]
                maxima,
                self._source(group),
                torch.cat([weights[name] for name in names]),
                settings,
                walker.timings,
            )
            solved = together.split([linear.out_features for linear in linears])  # type: ignore[misc]
        walked = [
            _WalkedLinear(name, settings, maxima, each)
            for name, each in zip(names, solved, strict=True)
        ]
        for path, linear in zip(group.linears, walked, strict=True):
            self.quantized.set_submodule(path, linear.module)
        return walked

    def _source(self, group: Group) -> LinearInputs:
        """Return where a group's inputs come from."""
        share, states = self.walker.share, self.walker.states
        row_tokens = self._read(self.module, self.walker.floats, group, slice(0, 1), ALL).shape[1]
        total = share.total * row_tokens
        if group.mask is not None:
            total = int(states[group.mask].count_nonzero())

        def batches(stride: int) -> Iterator[tuple[Tensor, Tensor]]:
            """From batch to batch other tokens come first, so that every position is seen."""
            step = min(stride, row_tokens)
            for number, rows in share.local_batches():
                x, x_quantized = self.inputs(group, rows, slice(number % step, None, step))
                if x.numel():  # or no token of these is real
                    yield x.flatten(0, -2), x_quantized.flatten(0, -2)

        return LinearInputs(tokens=total, batches=batches, ranks=share.ranks)

    def measure(self, group: Group, walked: Sequence[_WalkedLinear]) -> None:
        """Measure the error of linears after which the stage goes on."""
        for _, rows in self.walker.share.local_batches():
            x, x_quantized = self.inputs(group, rows, slice(None, None, MEASURED_STRIDE))
            for path, linear in zip(group.linears, walked, strict=True):
                linear.measure(self.module.get_submodule(path)(x), linear.module(x_quantized))

    def advance(self, group: Group, walked: Sequence[_WalkedLinear]) -> None:
        """Pass both streams through the stage, and measure the error of its last linears."""
        walker = self.walker
        floats: dict[str, Tensor] = {}
        streams: dict[str, Tensor] = {}
        for _, rows in walker.share.local_batches():
            with _watched(self.module, group) as seen:
                passed = self._run(self.module, walker.floats, rows)
            passed_quantized = passed
            if self.corrects:
                with _watched(self.quantized, group) as seen_quantized:
                    passed_quantized = self._run(self.quantized, walker.streams, rows)
            for path, linear in zip(group.linears, walked, strict=True):
                x, y = seen[path]
                y_quantized = seen_quantized[path][1] if self.corrects else linear.module(x)
                linear.measure(self._real(group, y, rows), self._real(group, y_quantized, rows))
            _put(floats, walker.floats, passed, rows)
            _put(streams, walker.streams, passed_quantized, rows)
        for state, passed_on in ((walker.floats, floats), (walker.streams, streams)):
            state.clear()
            state.update(passed_on)

    def _run(self, module: nn.Module, state: State, rows: slice) -> State:
        """Run the stage on some rows."""
        part = {name: value[rows] for name, value in state.items()}
        return self.stage.run(module, part, self._constants(rows))


class _ReachedError(Exception):
    """A stage got to the linear where it was to stop; `read` is what that linear reads."""

    def __init__(self, read: Tensor) -> None:
        super().__init__()
        self.read = read


@contextmanager
def _watched(module: nn.Module, group: Group) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield what a group's linears read and give while the module runs, by path in the block."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(path: str) -> Any:
        def keep(_module: nn.Module, read: tuple[Tensor, ...], given: Tensor) -> None:
            seen[path] = read[0], given

        return module.get_submodule(path).register_forward_hook(keep)

    handles = [watch(path) for path in group.linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _put(made: dict[str, Tensor], state: State, passed: State, rows: slice) -> None:
    """Write what a batch passes on, in the place of what it passed on before where there is one."""
    for name, value in passed.items():
        if name not in made:
            before = state.get(name)
            if before is None or before.shape[1:] != value.shape[1:]:
                before = value.new_empty(next(iter(state.values())).shape[0], *value.shape[1:])
            made[name] = before
        made[name][rows] = value


class _WalkedLinear:
    """A solved linear while the streams pass through it."""

    def __init__(
        self,
        name: str,
        settings: LinearSettings,
        maxima: Tensor,
        solved: SolvedLinear | QuantizedLinear,
    ) -> None:
        self.name = name
        self.solved = solved
        smoothing = solved.smoothing_scale.to(maxima.device)
        self.step_ranges = (maxima / smoothing).amax(dim=1)
        self.module = FakeQuantLinear(
            FoldedLinear(
                weight=solved.weight,
                low_rank=solved.low_rank,
                bias=solved.bias,
                input_multiplier=solved.smoothing_scale.reciprocal(),
                static_range=float(self.step_ranges.amax()),
            ),
            ranges=settings.ranges,
            activation_bits=settings.activation_bits,
            target="onnxruntime",
        ).to(maxima.device)
        self.signal = 0.0
        self.noise = 0.0

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
                f"{self.name} puts out NaN or infinity on the calibration states; "
                f"check the checkpoint, or --num-heads"
            )

    def finished(self) -> QuantizedLinear:
        """Return the artefact's record of this linear, on the CPU."""
        if isinstance(self.solved, QuantizedLinear):
            return self.solved
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
