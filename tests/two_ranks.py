"""What each of two real processes does for `test_distributed.py`; torchrun runs this file.

`torchrun --standalone --nproc-per-node 2 two_ranks.py FOLDER` leaves what rank R found in
FOLDER/R.pt; then rank 1 dies.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from quantized_fixture import TINY, tiny_dit
from torch import Tensor

from ditas_export.calibration import walk
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.output_weights import output_weights
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.row_shares import Share, rank_batches
from ditas_export.calibration.solve import JointMoments, LinearInputs, sample_tokens
from ditas_export.calibration.states import CalibrationSettings, CalibrationStates, collect_states
from ditas_export.conditions.labels import labelled_inputs
from ditas_export.distributed import Ranks, launched_ranks
from ditas_export.errors import CalibrationError, DitasExportError
from ditas_export.families.identity import identity_of
from ditas_export.families.registry import family_of

CALIBRATION = CalibrationSettings(steps=6, classes=(3, 7, 1, 4, 9))
QUANTIZATION = QuantizationSettings(rank=2, alpha_grid=(0.3, 0.4, 0.5))


class Stop(Exception):  # noqa: N818
    """Stands for Ctrl-C."""


def sampled(ranks: Ranks) -> CalibrationStates:
    """60 rows for the walk: four batches, the last one short."""
    return collect_states(tiny_dit(), CALIBRATION, identity=identity_of(tiny_dit()), ranks=ranks)


def token_batches() -> list[tuple[Tensor, Tensor]]:
    """Seven batches of 731 tokens of 48 channels, not centred; the other stream drifts.

    More tokens than the sample takes; its stride does not divide rank 0's share.
    """
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(7):
        x = 0.5 + torch.randn(731, 48, generator=generator)
        batches.append((x, 1.02 * x + 0.1 * torch.randn(731, 48, generator=generator)))
    return batches


def weight() -> Tensor:
    """24 outputs of 48 channels."""
    return torch.randn(24, 48, generator=torch.Generator().manual_seed(1))


def reduced(ranks: Ranks) -> tuple[JointMoments, Tensor, Tensor]:
    """The moments, the output weights of a block, and this rank's part of the token sample."""
    batches = token_batches()
    first, last = (7 * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    mine = batches[first:last]

    def batches(stride: int) -> list[tuple[Tensor, Tensor]]:
        return [(x[::stride], x_hat[::stride]) for x, x_hat in mine]

    inputs = LinearInputs(tokens=7 * 731, batches=batches, ranks=ranks)
    moments = JointMoments.accumulate(weight(), mine, ranks)
    return moments, block_weights(ranks), sample_tokens(inputs)[0]


def block_weights(ranks: Ranks) -> Tensor:
    """What the output channels of the first block's linears count, one after the other."""
    model = tiny_dit()
    rows, share = 48, Share.of(48, TINY.num_tokens, ranks)
    generator = torch.Generator().manual_seed(2)
    side = TINY.input_size
    inputs = labelled_inputs(
        torch.randn(rows, TINY.in_channels, side, side, generator=generator),
        torch.arange(rows) * 20,
        torch.arange(rows) % TINY.num_classes,
    )
    family = family_of(TINY)
    block = family.blocks(TINY)[0]
    with torch.no_grad():
        entered = family.enter(model, inputs.rows(share.rows))
    module = model.get_submodule(block.path)
    return torch.cat(list(output_weights(module, block, *entered, share).values()))


def quantized(ranks: Ranks, states: CalibrationStates, **settings: Any) -> QuantizedModel:
    """The tiny model."""
    return quantize_model(tiny_dit(), states, QUANTIZATION, ranks=ranks, **settings)


def resumed(ranks: Ranks, states: CalibrationStates, progress: Path) -> tuple[bool, int]:
    """Whether an interrupted walk left this rank's file; how many linears were left to solve."""

    def stop(name: str, _: object) -> None:
        if name == "blocks.1.attn.qkv":
            raise Stop

    progress.mkdir()
    try:
        quantized(ranks, states, progress=progress, on_linear=stop)
    except Stop:
        ranks.barrier()
    left = bool(list(progress.iterdir()))
    with mock.patch.object(walk, "solve_linear", wraps=walk.solve_linear) as solve:
        quantized(ranks, states, progress=progress)
    return left, solve.call_count


def message(function: Callable[[], object]) -> str:
    """What a function refused with."""
    try:
        function()
    except DitasExportError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def ill_sampling(ranks: Ranks) -> None:
    """NaN on rank 1 alone."""
    model = tiny_dit()
    if ranks.rank == 1:
        model.blocks[1].mlp.fc1.bias[3] = float("nan")  # type: ignore[union-attr, index, operator]
    collect_states(model, CALIBRATION, identity=identity_of(model), ranks=ranks)


def ill_walk(ranks: Ranks, states: CalibrationStates) -> None:
    """Infinity in the output of rank 1 alone, which its moments do not see."""
    model = tiny_dit()
    if ranks.rank == 1:
        model.blocks[1].attn.proj.bias[3] = float("inf")  # type: ignore[union-attr, index, operator]
    settings = QuantizationSettings(method="linear")
    quantize_model(model, states, settings, ranks=ranks)


def run_out_of_memory() -> None:
    """Stop as a process does that gets no memory."""
    raise MemoryError("no memory")


def stopped(ranks: Ranks, share: Callable[[Callable[[], None]], object], rank: int) -> str:
    """What every rank hears of one that stops by another error than a refusal."""
    try:
        share(lambda: run_out_of_memory() if ranks.rank == rank else None)
    except (MemoryError, DitasExportError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refuse() -> None:
    """Refuse."""
    raise CalibrationError("no good")


def calibrate(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Everything that two ranks must do as one does."""
    states = sampled(ranks)
    return {
        "states": (states.latents, states.timesteps, dict(states.input_maxima)),
        "reduced": reduced(ranks),
        "quantized": quantized(ranks, states),
        "resumed": resumed(ranks, states, folder / f"progress-{ranks.rank}"),
        "first": ranks.first(lambda: ranks.rank),
        "ill": [
            message(lambda: ill_sampling(ranks)),
            message(lambda: ill_walk(ranks, states)),
            message(lambda: ranks.first(refuse)),
            stopped(ranks, ranks.first, 0),
            stopped(ranks, ranks.together, 1),
            message(lambda: rank_batches(16, 16, ranks)),
        ],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with launched_ranks("cpu") as ranks:
        torch.save(calibrate(ranks, folder), folder / f"{ranks.rank}.pt")
        if ranks.rank == 1:
            raise KeyError("a bug of rank 1")
        ranks.barrier()
        (folder / "not stopped").touch()
