"""How far a file is from float along one trajectory, from what its verification kept."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ditas_export.evaluation.held_out import FLOAT, STATES, HeldOut
from ditas_export.evaluation.metrics import snr_db
from ditas_export.figures import finite_or_none


@dataclass(frozen=True, slots=True, kw_only=True)
class Along:
    """What a file and the float model gave at one step of the first trajectory."""

    step: int
    time: float | None  # what the model was fed; None once the last step is done
    state_snr_db: float | None  # of x_t; None at the start, where it is the same noise
    single_step_snr_db: float | None  # of the outputs at the float model's x_t


def along_trajectory(held_out: HeldOut, judged: str) -> tuple[Along, ...]:
    """Return the figures of the first seed at every probed step, and of the final latents.

    Args:
        held_out: of a verification that is done.
        judged: the name under which the file, or its fake-quantized forward, sampled.
    """
    seed, images = held_out.settings.seeds[0], len(held_out.settings.classes)
    reference = held_out.kept(FLOAT, f"{FLOAT}-{seed}")
    other = held_out.kept(judged, f"{judged}-{seed}")
    wanted, got = (held_out.kept(name, f"{name}-probes") for name in (FLOAT, judged))
    what, when = held_out.names[:2]
    found = [
        Along(
            step=step,
            time=float(reference[when][index][0]),
            state_snr_db=_db(reference[what][index][:images], other[STATES][index])
            if step
            else None,
            single_step_snr_db=_db(wanted[str(index)], got[str(index)]),
        )
        for index, step in enumerate(held_out.probed_steps)
    ]
    last = _db(reference["final"], other["final"])
    end = Along(step=held_out.settings.steps, time=None, state_snr_db=last, single_step_snr_db=None)
    return (*found, end)


def _db(reference: Tensor, output: Tensor) -> float | None:
    """Return the SNR of an output, None where there is no figure."""
    if reference.shape != output.shape:  # what stands for an output that is not finite
        return None
    return finite_or_none(snr_db(reference, output))
