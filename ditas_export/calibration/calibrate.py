"""From a float model and its calibration states to a `QuantizedModel`, resumable block by block."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ditas_export import __version__
from ditas_export.artifact_files import (
    differences,
    load_tensors,
    save_tensors,
    sha256_of_tensors,
)
from ditas_export.calibration.artifact_header import LinearFacts, wanted_of_linear
from ditas_export.calibration.calibration_settings import CalibrationSettings
from ditas_export.calibration.methods import ALPHA_GRID, Method, method_named
from ditas_export.calibration.quantized_model import (
    QuantizedLinear,
    QuantizedModel,
    linear_from_parts,
    linear_to_parts,
)
from ditas_export.calibration.row_shares import rank_batches
from ditas_export.calibration.solve import SAMPLE_TOKENS, LinearSettings
from ditas_export.calibration.states import (
    CalibrationStates,
    sampling_facts,
    walk_states,
)
from ditas_export.calibration.walk import walk
from ditas_export.distributed import SINGLE, Ranks
from ditas_export.dit.fitting import Wanted, require_fits
from ditas_export.errors import ArtifactError, QuantizationError
from ditas_export.families.base import Block, Conditions, FamilyModel, ModelConfig
from ditas_export.families.registry import family_of, linear_shapes
from ditas_export.fast_matmul import fast_float32_matmul
from ditas_export.options import WALK_TOKENS
from ditas_export.paths import StrPath
from ditas_export.quantization.ranges import Ranges
from ditas_export.saved_records import from_record
from ditas_export.timings import Timings

BLOCK_FORMAT = "ditas-export solved block 2"

BLOCK_SIZES = {8: (16, 24, 32, 48, 64, 96, 128), 16: (32, 64, 128)}
"""Allowed block sizes by activation bits: weight-only kernels take powers of two from 32."""

DEFAULT_BLOCK_SIZE = 48
WIDTH_PER_RANK = 36
"""`rank auto` is the paper's share, 32 of 1152."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSettings:
    """How a model is quantized; None stands for the default that fits the model."""

    weight_bits: int = 4
    activation_bits: int = 8
    method: str | Method = "ditas-plus"  # a name, or a recipe of one's own
    rank: int | None = None
    block_size: int | None = None
    ranges: Ranges = "token"
    alpha_grid: tuple[float, ...] = ALPHA_GRID
    walk_tokens: int = WALK_TOKENS

    def __post_init__(self) -> None:
        """Refuse what no method or kernel takes."""
        if self.weight_bits not in (4, 8):
            raise QuantizationError(f"weight bits are 4 or 8, not {self.weight_bits}")
        if self.activation_bits not in BLOCK_SIZES:
            raise QuantizationError(f"activation bits are 8 or 16, not {self.activation_bits}")
        if self.rank is not None and self.rank < 0:
            raise QuantizationError(f"rank={self.rank} is negative; 0 means no low-rank branch")
        if self.walk_tokens < 1:
            raise QuantizationError(f"walk_tokens={self.walk_tokens}; the walk takes at least one")
        if not self.alpha_grid or not all(0 <= alpha <= 1 for alpha in self.alpha_grid):
            raise QuantizationError(f"alpha_grid={self.alpha_grid}; give values in [0, 1]")
        allowed = BLOCK_SIZES[self.activation_bits]
        if self.block_size is not None and self.block_size not in allowed:
            raise QuantizationError(
                f"block_size={self.block_size} is not allowed with {self.activation_bits}-bit "
                f"activations; pick one of {allowed}"
            )
        if isinstance(self.method, str):
            method_named(self.method)

    @property
    def recipe(self) -> Method:
        """The method's levers."""
        return method_named(self.method) if isinstance(self.method, str) else self.method

    def rank_for(self, config: ModelConfig) -> int:
        """Return the rank of the low-rank branch: as asked, or the paper's share of the width.

        8-bit weights have no branch unless one is asked for.
        """
        if self.recipe.low_rank == "none":
            return 0
        if self.rank is not None:
            return self.rank
        return 0 if self.weight_bits == 8 else round(config.hidden_size / WIDTH_PER_RANK)

    def block_size_for(self, in_features: int) -> int:
        """Return the block size of a linear with `in_features` inputs.

        Raises:
            QuantizationError: the block size asked for does not divide, or no allowed one does.
        """
        if self.weight_bits == 8:
            return in_features
        allowed = BLOCK_SIZES[self.activation_bits]
        fitting = [size for size in allowed if in_features % size == 0]
        if self.block_size is not None:
            if self.block_size not in fitting:
                raise QuantizationError(
                    f"block_size={self.block_size} does not divide {in_features} inputs; "
                    f"pick one of {fitting}"
                )
            return self.block_size
        if not fitting:
            raise QuantizationError(
                f"no allowed block size {allowed} divides {in_features} inputs; use 8-bit weights"
            )
        small = [size for size in fitting if size <= DEFAULT_BLOCK_SIZE]
        return small[-1] if small else fitting[0]

    def require_fits(self, config: ModelConfig) -> None:
        """Refuse what no linear of this model can have.

        Raises:
            QuantizationError: a rank above the smaller side of a linear, or a block size that does
                not divide its inputs.
        """
        rank = self.rank_for(config)
        for name, (rows, columns) in linear_shapes(config).items():
            self.block_size_for(columns)
            if rank > min(rows, columns):
                raise QuantizationError(
                    f"rank={rank}, but {name} has {rows} outputs of {columns} inputs; use "
                    f"{min(rows, columns)} at most"
                )

    def walked_states(self, calibration: CalibrationSettings, config: ModelConfig) -> int:
        """Return how many states the walk sees: those of `walk_tokens`, guidance halves counted."""
        wanted = self.walk_tokens // (calibration.rows_per_state * config.num_tokens)
        return min(max(1, wanted), calibration.steps * len(calibration.classes))

    def notes(self, config: ModelConfig) -> list[str]:
        """Return what a user should know of the defaults that were chosen for this model."""
        found = [f"rank {self.rank_for(config)}"]
        for width in sorted({columns for _, columns in linear_shapes(config).values()}):
            size = self.block_size_for(width)
            if self.weight_bits == 4 and size != DEFAULT_BLOCK_SIZE and self.block_size is None:
                found.append(
                    f"block size {size} for {width} inputs: {DEFAULT_BLOCK_SIZE} does not fit"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "method": self.recipe.name,
            "rank": self.rank,
            "block_size": self.block_size,
            "ranges": self.ranges,
            "alpha_grid": list(self.alpha_grid),
            "walk_tokens": self.walk_tokens,
        }


@fast_float32_matmul()
def quantize_model(
    model: FamilyModel,
    states: CalibrationStates,
    settings: QuantizationSettings,
    *,
    conditions: Conditions | None = None,
    progress: StrPath | None = None,
    ranks: Ranks = SINGLE,
    on_linear: Callable[[str, QuantizedLinear], None] | None = None,
    timings: Timings | None = None,
) -> QuantizedModel:
    """Quantize every block linear of a model; the same result on every rank.

    Args:
        model: float32; left untouched. The walk runs on its device.
        states: made with this model.
        settings: method, bits, block size, rank.
        conditions: what the classes of the states' settings name; the model's own if not given.
        progress: a folder that gets a file for every block; the blocks in it that were solved with
            the same model, states and settings are not solved again. Rank 0 alone reads and writes
            it.
        ranks: the processes that share the work.
        on_linear: called with each finished linear, in walk order.
        timings: where the time goes.

    Raises:
        QuantizationError: a rank or block size that does not fit the model.
        CalibrationError: an output that is not finite, or more ranks than batches of states.
        ArtifactError: a file of a block cannot be written, or states of another model.
    """
    progress = None if progress is None else Path(progress)
    config, device = model.config, model.device
    if config != states.identity.config:
        odd = differences(states.identity.config.to_dict(), config.to_dict())
        raise ArtifactError(f"the states are of another model: {'; '.join(odd)}; calibrate again")
    rank = settings.rank_for(config)
    by_linear = {
        name: LinearSettings(
            method=settings.recipe,
            weight_bits=settings.weight_bits,
            activation_bits=settings.activation_bits,
            ranges=settings.ranges,
            block_size=settings.block_size_for(columns),
            rank=rank,
            alpha_grid=settings.alpha_grid,
        )
        for name, (_, columns) in linear_shapes(config).items()
    }
    count = settings.walked_states(states.settings, config)
    inputs = walk_states(states, count=count, conditions=conditions)
    key = solving_key(states, settings)
    blocks = family_of(config).blocks(config)
    last_of = {block.linears[-1]: index for index, block in enumerate(blocks)}
    known = ranks.first(lambda: _read_blocks(progress, key, blocks))
    linears: dict[str, QuantizedLinear] = {}
    solved = walk(
        model,
        config,
        inputs.to(device),
        {name: maxima.to(device) for name, maxima in states.input_maxima.items()},
        by_linear.__getitem__,
        known=known,
        ranks=ranks,
        timings=timings,
    )
    for name, linear in solved:
        linears[name] = linear
        if on_linear is not None:
            on_linear(name, linear)
        if progress is not None and name in last_of and name not in known:
            index = last_of[name]
            ranks.first(partial(_write_block, progress, key, index, blocks[index], linears))
    quantized_weights = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    return QuantizedModel(
        identity=states.identity,
        float_parameters={
            name: tensor.detach().cpu()
            for name, tensor in model.state_dict().items()
            if name not in quantized_weights
        },
        linears=linears,
        activation_bits=settings.activation_bits,
        settings=settings.to_dict() | {"calibration": states.settings.to_dict()},
        provenance={"ditas-export": __version__, "torch": torch.__version__},
    )


def peak_bytes(
    config: ModelConfig,
    calibration: CalibrationSettings,
    settings: QuantizationSettings,
    ranks: Ranks = SINGLE,
) -> int:
    """Return the bytes that the walk of this rank will hold beside the model, to about a third.

    Two streams of hidden states; with them either the attention's outputs in both, or what the
    widest linear takes to solve: its second moment, factors and copies, ten matrices of its inputs
    squared.
    Then batches on their way through a linear, and the sample that α is searched on.

    Raises:
        CalibrationError: more ranks than batches of states.
    """
    total = settings.walked_states(calibration, config) * calibration.rows_per_state
    batches = rank_batches(total, config.num_tokens, ranks)
    sizes = [int(batch.stop - batch.start) for _, batch in batches]
    stream = sum(sizes) * config.num_tokens * config.hidden_size * 4
    widest = max(columns for _, columns in linear_shapes(config).values())
    moment = widest**2 * 8
    batch_bytes = max(sizes) * config.num_tokens * widest * 4
    sample = SAMPLE_TOKENS * widest * 4
    return 2 * stream + max(2 * stream, 10 * moment) + 6 * batch_bytes + 2 * sample


def solving_key(states: CalibrationStates, settings: QuantizationSettings) -> str:
    """Return a hash of everything that a solved linear depends on; an upgrade mixes nothing."""
    tensors = {"latents": states.latents, "timesteps": states.timesteps, **states.input_maxima}
    facts = {
        **sampling_facts(states.identity, states.settings),
        "states": sha256_of_tensors(tensors),
        "quantization": settings.to_dict(),
        "recipe": asdict(settings.recipe),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _block_file(folder: Path, block: int) -> Path:
    """Return the file of a block's linears."""
    return folder / f"{block:03d}.safetensors"


def _write_block(
    folder: Path, key: str, index: int, block: Block, linears: Mapping[str, QuantizedLinear]
) -> None:
    """Keep the linears of a solved block; atomic."""
    tensors, facts = {}, {}
    for name in block.linears:
        parts, facts[name] = linear_to_parts(linears[name])
        tensors.update({f"{name}.{part}": tensor for part, tensor in parts.items()})
    header = {"key": key, "linears": facts}
    save_tensors(_block_file(folder, index), tensors, file_format=BLOCK_FORMAT, header=header)


@dataclass(frozen=True, slots=True, kw_only=True)
class _BlockHeader:
    """What the header of a block says."""

    key: str
    linears: Mapping[str, LinearFacts]


def _wanted_of_block(linears: Mapping[str, LinearFacts], block: Block) -> dict[str, Wanted]:
    """Return what a file of a block must hold; ArtifactError where it is of another one."""
    if sorted(block.linears) != sorted(linears):
        raise ArtifactError(f"it is not of {block.path}")
    return {
        f"{name}.{part}": each
        for name in block.linears
        for part, each in wanted_of_linear(linears[name]).items()
    }


def _read_blocks(
    folder: Path | None, key: str, blocks: Sequence[Block]
) -> dict[str, QuantizedLinear]:
    """Return the linears of the first blocks that an interrupted run with the same key solved."""
    known: dict[str, QuantizedLinear] = {}
    for index, block in enumerate(blocks if folder is not None else ()):
        assert folder is not None  # or there is no block to look for
        try:
            tensors, header = load_tensors(_block_file(folder, index), file_format=BLOCK_FORMAT)
            stated = from_record(_BlockHeader, header, error=ArtifactError)
            require_fits(tensors, _wanted_of_block(stated.linears, block), error=ArtifactError)
        except ArtifactError:
            return known  # none, not ours, or damaged: it is written anew
        if stated.key != key:
            return known
        for name in block.linears:
            known[name] = linear_from_parts(name, tensors, stated.linears[name])
    return known
