"""The proof after an export: the file, reloaded, against the fake-quantized and the float model.

All three sample with the same noise and see the same x_t. One backend runs at a time: idle
onnxruntime sessions keep their threads spinning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditas_export.diffusion.guidance import ModelInputs
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import trajectory
from ditas_export.dit.model import DiT
from ditas_export.evaluation.inputs import model_inputs
from ditas_export.evaluation.metrics import snr_db
from ditas_export.runtime.onnxruntime_runner import (
    ACCURATE_WEIGHT_ONLY,
    OnnxRuntimeRunner,
    matmul_kernels,
)
from ditas_export.runtime.torch_runner import TorchRunner

MATCH_BOUND_DB = {torch.float32: 45.0, torch.float16: 25.0}
"""Least single-step SNR of the file against the fake-quantized forward, by float type.

In float32 the two differ by rounding ties alone: a code that flips by one where float sums differ
in their last bit. In float16 the runtimes round every intermediate differently as well.
"""

PROBES = 5
"""Steps of a trajectory at which single-step outputs are compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationSettings:
    """How much is sampled to verify a file."""

    seeds: tuple[int, ...]
    classes: tuple[int, ...]
    steps: int = 25
    cfg_scale: float = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What verification found; SNR in dB."""

    match_db: float  # file against fake-quantized forward, worst of the probed steps
    match_bound_db: float  # least match_db that is accepted
    single_step_db: float  # file against float at the same x_t, over all probes
    final_db: tuple[float, ...]  # file against float, final latents, per seed
    fake_quant_final_db: tuple[float, ...]  # fake-quantized against float, per seed
    kernels: Mapping[str, int]  # onnxruntime kernel -> linears that it runs
    runtime: str
    settings: VerificationSettings

    @property
    def matches(self) -> bool:
        """Whether the file computes what was calibrated."""
        return self.match_db >= self.match_bound_db

    @property
    def mean_final_db(self) -> float:
        """Mean over seeds of the final latents' SNR against float."""
        return sum(self.final_db) / len(self.final_db)

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        return {
            "matches_fake_quantized_forward": self.matches,
            "match_db": _finite(self.match_db),
            "match_bound_db": self.match_bound_db,
            "single_step_snr_db": _finite(self.single_step_db),
            "final_latents_snr_db": [_finite(value) for value in self.final_db],
            "final_latents_snr_db_mean": _finite(self.mean_final_db),
            "fake_quantized_final_latents_snr_db": [
                _finite(value) for value in self.fake_quant_final_db
            ],
            "kernels": dict(self.kernels),
            "runtime": self.runtime,
            "seeds": list(self.settings.seeds),
            "classes": list(self.settings.classes),
            "steps": self.settings.steps,
            "cfg_scale": self.settings.cfg_scale,
        }


def _finite(decibels: float) -> float | None:
    """Return a ratio as JSON takes it: None where the outputs are equal or not finite."""
    return round(decibels, 3) if math.isfinite(decibels) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """What one backend gave."""

    probes: list[Tensor]  # outputs at the probed inputs
    finals: list[Tensor]  # final latents, one per seed


def verify_file(
    float_model: DiT,
    fake_quantized: DiT,
    path: Path,
    settings: VerificationSettings,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> Verification:
    """Sample with the float model, the fake-quantized model and the file; compare.

    Args:
        float_model: float32.
        fake_quantized: what the file must compute, in the file's float type.
        path: the exported ONNX file.
        settings: seeds, classes, steps, guidance.
        on_step: called with (sampling steps done, in all).
    """
    done, total = 0, 3 * len(settings.seeds) * settings.steps

    def count() -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    dtype = fake_quantized.pos_embed.dtype
    inputs: list[ModelInputs] = []
    with TorchRunner(float_model) as runner:
        reference = _run(runner, settings, inputs, count, gather=True)
    with TorchRunner(fake_quantized) as runner:
        expected = _run(runner, settings, inputs, count)
    with OnnxRuntimeRunner(path, session_entries=ACCURATE_WEIGHT_ONLY) as session:
        found = _run(session, settings, inputs, count)
        description = session.description
    matches = [
        snr_db(wanted, got) for wanted, got in zip(expected.probes, found.probes, strict=True)
    ]
    return Verification(
        match_db=min(matches),
        match_bound_db=MATCH_BOUND_DB[dtype],
        single_step_db=snr_db(torch.cat(reference.probes), torch.cat(found.probes)),
        final_db=_per_seed(reference, found),
        fake_quant_final_db=_per_seed(reference, expected),
        kernels=Counter(matmul_kernels(path).values()),
        runtime=description,
        settings=settings,
    )


def _per_seed(reference: _Run, other: _Run) -> tuple[float, ...]:
    """Return the SNR of the final latents, seed by seed."""
    return tuple(
        snr_db(wanted, got) for wanted, got in zip(reference.finals, other.finals, strict=True)
    )


def _run(
    runner: Runner,
    settings: VerificationSettings,
    inputs: list[ModelInputs],
    count: Callable[[], None],
    *,
    gather: bool = False,
) -> _Run:
    """Sample every seed; then answer at the probed inputs, which the float run gathers."""
    finals = []
    every = max(1, settings.steps // PROBES)
    for seed in settings.seeds:
        for step in trajectory(
            runner,
            classes=settings.classes,
            steps=settings.steps,
            cfg_scale=settings.cfg_scale,
            seed=seed,
        ):
            if gather and seed == settings.seeds[0] and step.index % every == 0:
                inputs.append(model_inputs(step, settings.cfg_scale, runner.config.null_class))
            last = step.next_latents
            count()
        finals.append(last)
    probes = [runner(probe.latents, probe.timesteps, probe.class_labels) for probe in inputs]
    return _Run(probes=probes, finals=finals)
