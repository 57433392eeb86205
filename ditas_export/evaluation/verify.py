"""The proof after an export: the file, reloaded, against the fake-quantized and the float model.

All three sample with the same noise and see the same x_t. One backend runs at a time: idle
onnxruntime sessions keep their threads spinning. ONNX Runtime runs the file; it has no bfloat16
kernels on CPUs, so a bfloat16 file runs in OpenVINO, and not at all where that is not installed.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditas_export.diffusion.guidance import ModelInputs
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import trajectory
from ditas_export.dit.model import DiT
from ditas_export.evaluation.inputs import inputs_at
from ditas_export.evaluation.kept_parts import KeptParts, Part
from ditas_export.evaluation.metrics import snr_db
from ditas_export.figures import finite_or_none
from ditas_export.runtime.onnxruntime_runner import (
    ACCURATE_WEIGHT_ONLY,
    OnnxRuntimeRunner,
    matmul_kernels,
)
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.torch_runner import TorchRunner

FileRunner = OnnxRuntimeRunner | OpenVINORunner
"""What runs an exported file here."""

MATCH_BOUND_DB = {torch.float32: 45.0, torch.float16: 25.0, torch.bfloat16: 22.0}
"""Least single-step SNR of the file against the fake-quantized forward, by float type.

In float32 the two differ by rounding ties alone: a code that flips by one where float sums differ
in their last bit. In float16 the runtimes round every intermediate differently as well, and more
coarsely in bfloat16: 38 to 46 dB were seen there with a trained model of 5 blocks, 34 with 28
random ones. Codes in another order give 1 dB in it, row scales 18, a smoothing left out 20. A lost
bias (34) or low-rank branch (38) hides in the rounding: the same model's float32 file shows those.
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
class FileFindings:
    """What the file gave; SNR in dB."""

    match_db: float  # against the fake-quantized forward, worst of the probed steps
    single_step_db: float  # against float at the same x_t, over all probes
    final_db: tuple[float, ...]  # against float, final latents, per seed
    kernels: Mapping[str, int]  # onnxruntime kernel -> linears; empty in another runtime
    runtime: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What verification found; SNR in dB."""

    file: FileFindings | None  # None where no runtime that is installed takes its float type
    match_bound_db: float  # least match_db that is accepted
    fake_quant_single_step_db: float  # fake-quantized against float, over all probes
    fake_quant_final_db: tuple[float, ...]  # fake-quantized against float, per seed
    settings: VerificationSettings

    @property
    def matches(self) -> bool | None:
        """Whether the file computes what was calibrated; None if it was not run."""
        return None if self.file is None else self.file.match_db >= self.match_bound_db

    @property
    def single_step_db(self) -> float:
        """Single-step SNR against float of the file, or of the fake-quantized forward alone."""
        return self.fake_quant_single_step_db if self.file is None else self.file.single_step_db

    @property
    def final_db(self) -> tuple[float, ...]:
        """SNR of the final latents of the same against float, per seed."""
        return self.fake_quant_final_db if self.file is None else self.file.final_db

    @property
    def mean_final_db(self) -> float:
        """Mean over seeds of the final latents' SNR against float."""
        return sum(self.final_db) / len(self.final_db)

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values."""
        file = self.file
        return {
            "matches_fake_quantized_forward": self.matches,
            "match_db": file and finite_or_none(file.match_db),
            "match_bound_db": self.match_bound_db,
            "single_step_snr_db": file and finite_or_none(file.single_step_db),
            "final_latents_snr_db": file and [finite_or_none(value) for value in file.final_db],
            "final_latents_snr_db_mean": file and finite_or_none(self.mean_final_db),
            "fake_quantized_single_step_snr_db": finite_or_none(self.fake_quant_single_step_db),
            "fake_quantized_final_latents_snr_db": [
                finite_or_none(value) for value in self.fake_quant_final_db
            ],
            "kernels": file and dict(file.kernels),
            "runtime": file and file.runtime,
            "seeds": list(self.settings.seeds),
            "classes": list(self.settings.classes),
            "steps": self.settings.steps,
            "cfg_scale": self.settings.cfg_scale,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Run:
    """What one backend gave."""

    probes: list[Tensor]  # outputs at the probed inputs
    finals: list[Tensor]  # final latents, one per seed
    runtime: str


def verify_file(
    float_model: DiT,
    fake_quantized: DiT,
    path: Path,
    settings: VerificationSettings,
    *,
    device: str | torch.device = "cpu",
    kept: KeptParts = KeptParts(),  # noqa: B008 (frozen)
    on_step: Callable[[int, int], None] | None = None,
) -> Verification:
    """Sample with the float model, the fake-quantized model and the file, if it runs; compare.

    The two models stay on `device`; the file runs on the CPU. What is kept of an interrupted
    verification is not run again; where all is, the file need not be there.

    Args:
        float_model: float32.
        fake_quantized: what the file must compute, in the file's float type.
        path: the exported ONNX file.
        settings: seeds, classes, steps, guidance.
        device: where the models compute.
        kept: where every seed of every model is kept, of these settings and models alone.
        on_step: called with (sampling steps done, in all).

    Raises:
        RunnerError: the runtime is missing, or refuses the file.
        ArtifactError: what is to be kept cannot be written.
    """
    dtype = fake_quantized.pos_embed.dtype
    open_file = _file_opener(dtype)
    done, total = 0, (3 if open_file else 2) * len(settings.seeds) * settings.steps

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        if on_step is not None:
            on_step(done, total)

    runs = _Runs(settings=settings, kept=kept, count=count)
    reference = runs.of("float", lambda: TorchRunner(float_model, device=device))
    expected = runs.of("fake", lambda: TorchRunner(fake_quantized, device=device))
    return Verification(
        file=_findings(path, open_file, runs, reference, expected) if open_file else None,
        match_bound_db=MATCH_BOUND_DB[dtype],
        fake_quant_single_step_db=_single_step(reference, expected),
        fake_quant_final_db=_per_seed(reference, expected),
        settings=settings,
    )


def _file_opener(dtype: torch.dtype) -> Callable[[Path], FileRunner] | None:
    """Return what opens a file of a float type; None where nothing installed runs it."""
    if dtype != torch.bfloat16:
        return partial(OnnxRuntimeRunner, session_entries=ACCURATE_WEIGHT_ONLY)
    return OpenVINORunner if importlib.util.find_spec("openvino") else None


def _findings(
    path: Path,
    open_file: Callable[[Path], FileRunner],
    runs: _Runs,
    reference: _Run,
    expected: _Run,
) -> FileFindings:
    """Run the file and hold it against the float and the fake-quantized run."""
    found = runs.of("file", lambda: open_file(path))
    is_onnxruntime = open_file is not OpenVINORunner
    kernels = runs.kept.take(
        "kernels",
        lambda: Part(facts=_counted_kernels(path) if is_onnxruntime else {}),
    )
    pairs = zip(expected.probes, found.probes, strict=True)
    return FileFindings(
        match_db=min(snr_db(wanted, got) for wanted, got in pairs),
        single_step_db=_single_step(reference, found),
        final_db=_per_seed(reference, found),
        kernels=kernels.facts,
        runtime=found.runtime,
    )


def _counted_kernels(path: Path) -> dict[str, int]:
    """Return ONNX Runtime's kernels of a file's products, in order of name, and how many each."""
    return dict(sorted(Counter(matmul_kernels(path).values()).items()))


def _single_step(reference: _Run, other: _Run) -> float:
    """Return the SNR over all probed steps."""
    return snr_db(torch.cat(reference.probes), torch.cat(other.probes))


def _per_seed(reference: _Run, other: _Run) -> tuple[float, ...]:
    """Return the SNR of the final latents, seed by seed."""
    return tuple(
        snr_db(wanted, got) for wanted, got in zip(reference.finals, other.finals, strict=True)
    )


@dataclass(slots=True, kw_only=True)
class _Runs:
    """Runs one backend after the other; the first gathers the inputs at which all are probed."""

    settings: VerificationSettings
    kept: KeptParts
    count: Callable[[int], None]
    inputs: list[ModelInputs] = field(default_factory=list)

    def of(self, name: str, open_runner: Callable[[], Runner]) -> _Run:
        """Sample every seed, then answer at the probed inputs; open the backend if need be."""
        finals = []
        with ExitStack() as stack:
            runner = cache(lambda: stack.enter_context(open_runner()))
            for seed in self.settings.seeds:
                if found := self.kept.find(f"{name}-{seed}"):
                    self.count(self.settings.steps)
                part = found or self.kept.take(
                    f"{name}-{seed}", partial(self._sampled, runner, seed)
                )
                finals.append(part.tensors["final"])
                self.inputs = self.inputs or _probed_inputs(part)
            probed = self.kept.take(f"{name}-probes", partial(self._probed, runner))
        outputs = [probed.tensors[str(index)] for index in range(len(self.inputs))]
        return _Run(probes=outputs, finals=finals, runtime=probed.facts["runtime"])

    def _sampled(self, runner: Callable[[], Runner], seed: int) -> Part:
        """Sample one seed; with its final latents goes what the very first run is probed at."""
        settings, probes = self.settings, []
        every = max(1, settings.steps // PROBES)
        for step in trajectory(
            runner(),
            classes=settings.classes,
            steps=settings.steps,
            cfg_scale=settings.cfg_scale,
            seed=seed,
        ):
            if not self.inputs and step.index % every == 0:
                probes.append(inputs_at(step, settings.cfg_scale, runner().config))
            last = step.next_latents
            self.count(1)
        gathered = {
            name: torch.stack([getattr(probe, name) for probe in probes])
            for name in (_PROBE_PARTS if probes else ())
        }
        return Part(tensors={"final": last, **gathered})

    def _probed(self, runner: Callable[[], Runner]) -> Part:
        """Answer at the probed inputs."""
        answers = {
            str(index): runner()(probe.latents, probe.timesteps, probe.class_labels)
            for index, probe in enumerate(self.inputs)
        }
        return Part(tensors=answers, facts={"runtime": runner().description})


_PROBE_PARTS = ("latents", "timesteps", "class_labels")
"""What a probe is made of."""


def _probed_inputs(part: Part) -> list[ModelInputs]:
    """Return the inputs that were gathered with a seed; none where it is not the first."""
    if _PROBE_PARTS[0] not in part.tensors:
        return []
    stacked = (part.tensors[name] for name in _PROBE_PARTS)
    return [
        ModelInputs(latents=latents, timesteps=timesteps, class_labels=labels)
        for latents, timesteps, labels in zip(*stacked, strict=True)
    ]
