"""The flows that have DiT's tensors, SiT's and REPA's, which differ in time and signs.

Sources: Ma et al. 2024 (SiT; github.com/willisma/SiT, whose t is 1 at the data) and Yu et al. 2025
(REPA; github.com/sihyun-yu/REPA, whose t is 1 at the noise). Both train on straight paths and feed
t from 0 to 1 as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ditas_export.dit.facts import Fact, Facts
from ditas_export.errors import CheckpointError
from ditas_export.options import FamilyChoice
from ditas_export.process import FlowProcess

FLOWS: Mapping[FamilyChoice, FlowProcess] = {
    "sit": FlowProcess(),
    "repa": FlowProcess(time_ends_at="noise", velocity_towards="noise"),
}
"""The process of each family that is a flow."""

_OF_DIFFUSIONS = (
    "beta_schedule", "beta_start", "beta_end", "train_timesteps", "variance", "fixed_variance",
    "rescale_timesteps",
)  # fmt: skip
"""What a record or an option says of diffusions alone."""


def flow_of(facts: Facts, where: str) -> FlowProcess | None:
    """Return the flow that a model was trained as; None for DiT's diffusion.

    Args:
        facts: of records and options.
        where: the file, for messages.

    Raises:
        CheckpointError: a velocity of which nothing tells the signs, or two that contradict.
    """
    family, velocity = facts.get("family"), _says_velocity(facts)
    if family is None and velocity is not None:
        raise CheckpointError(
            f"{where}: {velocity.where}: the model predicts something else than the noise; for a "
            f"velocity on straight paths pass --family sit (t = 1 at the data) or --family repa "
            f"(t = 1 at the noise), another is not followed (yet)"
        )
    if family is None or family.value not in FLOWS:
        if family is not None and velocity is not None:
            raise _contradiction(family, velocity, "a flow", where)
        return None
    prediction = facts.get("prediction")
    if prediction is not None and prediction.value == "epsilon":
        raise _contradiction(family, prediction, "one that predicts noise", where)
    for field in _OF_DIFFUSIONS:
        if field in facts and facts[field].value is not False:
            raise _contradiction(family, facts[field], f"{field}, which no flow has", where)
    vae = facts["vae"].value if "vae" in facts else None
    return replace(FLOWS[family.value], vae=vae)


def _says_velocity(facts: Facts) -> Fact | None:
    """Return what says that a velocity is predicted."""
    prediction = facts.get("prediction")
    if prediction is not None and prediction.value == "velocity":
        return facts.get("flow", prediction)
    return facts.get("flow")


def _contradiction(family: Fact, other: Fact, what: str, where: str) -> CheckpointError:
    """Return the error of two that cannot both be right."""
    is_told = any(fact.where.startswith("--") for fact in (family, other))
    remedy = "leave the option out" if is_told else "correct the record"
    return CheckpointError(
        f"{where}: {family.where} gives family {family.value!r}, but {other.where} gives {what}; "
        f"{remedy}"
    )
