"""What verification samples for an export: which noise, and what is kept of it, and where.

The float model's trajectories are made in the sampling pass and depend on nothing that follows.
What a file sampled depends on its numbers. Both are kept with the quantized model, so that the next
export of it runs only what nobody has run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.diffusion.classes import parse_classes
from ditas_export.evaluation.held_out import VerificationSettings, sample_held_out
from ditas_export.export_job import ExportJob, Solved, device_of, digest_of
from ditas_export.export_manifest import versions
from ditas_export.families.base import Conditions
from ditas_export.families.identity import ModelIdentity
from ditas_export.kept_parts import KeptParts, Part
from ditas_export.options import ExportOptions
from ditas_export.quantization.ranges import Ranges

VERIFICATION_SEEDS = 4
"""At most; two where they settle the mean."""

VERIFICATION_IMAGES = 4
"""Of a seed."""

VERIFICATION_SEED_OFFSET = 1000
"""Verification samples noise that calibration did not see."""


def held_out_settings(
    *, seed: int, cfg_scale: float, conditions: Conditions
) -> VerificationSettings:
    """Return what is sampled to verify: noise that calibration did not see, guided as it was.

    Args:
        seed: of the calibration.
        cfg_scale: of the calibration.
        conditions: what the model is asked for.
    """
    first = seed + VERIFICATION_SEED_OFFSET
    return VerificationSettings(
        seeds=tuple(range(first, first + VERIFICATION_SEEDS)),
        classes=parse_classes(
            "random", conditions=conditions, count=VERIFICATION_IMAGES, seed=first
        ),
        cfg_scale=cfg_scale,
    )


def sample_beforehand(job: ExportJob, *, seed: int, cfg_scale: float) -> None:
    """Let the float model sample what its files will be held against, unless it has."""
    model = job.loaded.model
    settings = held_out_settings(seed=seed, cfg_scale=cfg_scale, conditions=job.conditions)
    key = _float_key(job.loaded.identity, job.conditions, settings)
    sample_held_out(
        model,
        settings,
        KeptParts(folder=job.work.part("heldout", key)),
        conditions=job.conditions,
        device=device_of(job.options),
        on_step=lambda done, total: job.on_progress("held out", done, total),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Proofs:
    """What an export has of earlier proofs, and the keys under which its own is kept."""

    settings: VerificationSettings
    floats: KeptParts  # of the float model
    has_floats: bool  # whether those came with the artefact
    known: Mapping[str, Part]  # what a file of these very numbers sampled, from the artefact
    float_key: str
    numbers_key: str

    @classmethod
    def of(cls, job: ExportJob, solved: Solved, ranges: Ranges) -> Proofs:
        """Return what the quantized model, or an interrupted run, has for this export."""
        quantized = solved.quantized
        calibration = quantized.settings["calibration"]
        settings = held_out_settings(
            seed=calibration["seed"],
            cfg_scale=calibration["cfg_scale"],
            conditions=job.conditions,
        )
        float_key = _float_key(quantized.identity, job.conditions, settings)
        numbers_key = _numbers_key(job.options, quantized, ranges, float_key)
        floats = _under(float_key, solved.artifact.proofs)
        return cls(
            settings=settings,
            floats=KeptParts(
                folder=job.work.part("heldout", float_key),
                parts=floats,
            ),
            has_floats=bool(floats),
            known=_under(numbers_key, solved.artifact.proofs),
            float_key=float_key,
            numbers_key=numbers_key,
        )

    @property
    def taken(self) -> tuple[str, ...]:
        """Whose samples come with the artefact: they are its maker's word."""
        return tuple(
            who for who, has in (("float", self.has_floats), ("file", bool(self.known))) if has
        )

    def kept_with(self, artifact: QuantizedModel, kept: KeptParts) -> QuantizedModel:
        """Return an artefact with what was sampled now: final latents, and the float model's."""
        of_file = {name: part for name, part in kept.parts.items() if _is_sampled(name)}
        own = {self.float_key: self.floats.parts, self.numbers_key: of_file}
        added = {
            f"{key}/{name}": part for key, parts in own.items() for name, part in parts.items()
        }
        return replace(artifact, proofs=dict(artifact.proofs) | added)


def _is_sampled(name: str) -> bool:
    """Return whether a part is what a file sampled: what it must be is probed at every export."""
    backend, _, seed = name.rpartition("-")
    return backend in ("file", "bare") and seed.isdigit()


def _float_key(
    identity: ModelIdentity, conditions: Conditions, settings: VerificationSettings
) -> str:
    """Return a hash of all that the float model's trajectories depend on."""
    named = {} if conditions.identity is None else {"embeddings": conditions.identity}
    facts: dict[str, Any] = named | {
        "fingerprint": identity.fingerprint,
        "settings": asdict(settings),
        "torch": versions()["torch"],
    }
    return digest_of(facts)[:16]


def _numbers_key(
    options: ExportOptions, quantized: QuantizedModel, ranges: Ranges, float_key: str
) -> str:
    """Return a hash of what a file of one quantized model computes, and of what runs it.

    The layout is not part of it: both hold the same numbers.
    """
    facts = {
        "floats": float_key,
        "adaln": quantized.adaln_bits,
        "form": [ranges, options.target, options.float_side],
        "versions": versions(),
    }
    return digest_of(facts)[:16]


def _under(key: str, proofs: Mapping[str, Part]) -> dict[str, Part]:
    """Return the parts of one key, by their own names."""
    prefix = f"{key}/"
    return {
        name.removeprefix(prefix): part for name, part in proofs.items() if name.startswith(prefix)
    }
