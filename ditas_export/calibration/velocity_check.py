"""Whether a flow's velocity holds the noise that it is fed, with the sign and at the end it says.

At the noise's end of a flow the velocity is ±(noise − E[data]), whatever the network saw. The mean
over some noises takes E[data] away: what is left, õ, is ±x̃, the noise less its own mean. The figure
is `10·log10(Σx̃² / Σ(±õ − x̃)²)`; the other end and the other sign tell which flow it is instead.
The bundled flow: 22 to 28 dB by class at its own end, −6 and less at the other and with the other
sign; of random networks −2 and less, of the bundled ε-model −5 and less.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from torch import Tensor

from ditas_export.dit.flows import FLOWS
from ditas_export.figures import decibels
from ditas_export.process import FlowEnd, FlowProcess

LEAST_VELOCITY_DB = 10.0
"""Below this a model is not taken for a trained flow."""

ENDS: Mapping[FlowEnd, float] = {"data": 0.0, "noise": 1.0}
"""The time at which there is noise, by what there is at t = 1."""


def velocity_db(noise: Tensor, outputs: Mapping[float, Tensor], process: FlowProcess) -> float:
    """Return how nearly the velocity is the noise, or its opposite; of one class for all rows.

    Args:
        noise: (N, C, H, W), what was fed.
        outputs: the same shape, what came back, by time.
        process: a flow; it says the sign and the time.
    """
    x = noise.double()
    x = x - x.mean(dim=0)
    output = outputs[ENDS[process.time_ends_at]].double()
    output = output - output.mean(dim=0)
    towards_noise = output if process.velocity_towards == "noise" else -output
    return decibels(float(x.square().sum()), float((towards_noise - x).square().sum()))


def likest_flow(noise: Tensor, outputs: Mapping[float, Tensor]) -> tuple[FlowProcess, float]:
    """Return the time and sign that outputs at both ends are likest, and the figure."""
    flows = [
        FlowProcess(time_ends_at=end, velocity_towards=towards)
        for end, towards in product(ENDS, repeat=2)
    ]
    figures = [velocity_db(noise, outputs, flow) for flow in flows]
    best = max(range(len(flows)), key=lambda index: figures[index])
    return flows[best], figures[best]


def likeness(flow: FlowProcess) -> str:
    """Return in words which flow an output looks like."""
    for family, known in FLOWS.items():
        if known == flow:
            return f"its output looks as with --family {family}"
    return (
        f"its output looks as that of a flow whose t = 1 at the {flow.time_ends_at} and whose "
        f"velocity is towards the {flow.velocity_towards}, neither SiT's nor REPA's"
    )
