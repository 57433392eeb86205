"""The proof after an export: the file, reloaded, against the fake-quantized and the float model.

A portable file is held against the fake-quantized forward of two forms: its own, which a session of
ONNX Runtime runs, and the one that our runners write from it. All that sample do so with the same
noise, and all are probed at the same x_t. One backend runs at a time: idle
onnxruntime sessions keep their threads spinning. ONNX Runtime runs the file; it has no bfloat16
kernels on CPUs, so a bfloat16 file runs in OpenVINO, and not at all where that is not installed.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditas_export.diffusion.guidance import ModelInputs
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import trajectory
from ditas_export.dit.model import DiT
from ditas_export.errors import NonFiniteError
from ditas_export.evaluation.inputs import inputs_at
from ditas_export.evaluation.kept_parts import KeptParts, Part
from ditas_export.evaluation.metrics import snr_db
from ditas_export.figures import finite_or_none
from ditas_export.paths import StrPath
from ditas_export.runtime.onnxruntime_runner import (
    BARE_SESSION,
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

FAR_FROM_FLOAT_DB = 20.0
"""Mean SNR of the final latents against float below which a file is called far from it: a tenth of
the amplitude is wrong."""

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

    match_db: float  # as it is, against the fake-quantized forward, worst of the probed steps
    runner_match_db: float | None  # the same of our runners' form; None where that is the file's
    single_step_db: float  # our runner against float at the same x_t, over all probes
    final_db: tuple[float, ...]  # our runner against float, final latents, per seed
    kernels: Mapping[str, int]  # onnxruntime kernel -> linears, as it is; empty in another runtime
    runner_kernels: Mapping[str, int] | None  # the same of our runners' form
    runtime: str
    not_finite: str | None = None  # where it put out NaN or infinity, and the remedy
    bare_session_db: tuple[float, ...] | None = None  # final_db of an `InferenceSession` as it is

    @property
    def worst_match_db(self) -> float:
        """The lesser match of the two forms that are run."""
        found = (self.match_db, self.runner_match_db)
        return min(db for db in found if db is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What verification found; SNR in dB."""

    file: FileFindings | None  # None where no runtime that is installed takes its float type
    match_bound_db: float  # least match_db that is accepted
    fake_quant_single_step_db: float  # fake-quantized against float, over all probes
    fake_quant_final_db: tuple[float, ...] | None  # the same per seed, where the file was not run
    settings: VerificationSettings
    fake_quant_not_finite: str | None = None  # where the fake-quantized forward was not, and why

    @property
    def matches(self) -> bool | None:
        """Whether the file computes what was calibrated; None if it was not run."""
        return None if self.file is None else self.file.worst_match_db >= self.match_bound_db

    @property
    def single_step_db(self) -> float:
        """Single-step SNR against float of the file, or of the fake-quantized forward alone."""
        return self.fake_quant_single_step_db if self.file is None else self.file.single_step_db

    @property
    def final_db(self) -> tuple[float, ...]:
        """SNR of the final latents of the same against float, per seed."""
        if self.file is not None:
            return self.file.final_db
        assert self.fake_quant_final_db is not None  # sampled where the file was not
        return self.fake_quant_final_db

    @property
    def mean_final_db(self) -> float:
        """Mean over seeds of the final latents' SNR against float."""
        return sum(self.final_db) / len(self.final_db)

    @property
    def not_finite(self) -> str | None:
        """Where the file, or without one the fake-quantized forward, put out NaN or infinity."""
        return self.fake_quant_not_finite if self.file is None else self.file.not_finite

    @property
    def is_far_from_float(self) -> bool:
        """Whether the final latents are so far from float's that other pictures come out."""
        return not self.mean_final_db >= FAR_FROM_FLOAT_DB

    def misses(self, min_db: float | None) -> str | None:
        """Return why the result is no success, None if it is one.

        Args:
            min_db: least mean SNR of the final latents against float that was asked for.
        """
        found = self.mean_final_db
        if self.not_finite is not None:
            return f"the final latents are not finite: {self.not_finite}"
        if math.isnan(found) or found < 0:
            return f"the final latents are {found:.1f} dB from float's, which is noise"
        if min_db is not None and found < min_db:
            return f"the final latents are {found:.1f} dB from float's, less than --min-db {min_db}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the findings as JSON values.

        A figure is null where outputs are equal, or not finite; `not_finite` says which it is.
        """
        file = self.file
        return {
            "matches_fake_quantized_forward": self.matches,
            "match_db": file and finite_or_none(file.match_db),
            "runner_match_db": file
            and file.runner_match_db
            and finite_or_none(file.runner_match_db),
            "match_bound_db": self.match_bound_db,
            "single_step_snr_db": file and finite_or_none(file.single_step_db),
            "final_latents_snr_db": file and [finite_or_none(value) for value in file.final_db],
            "final_latents_snr_db_mean": file and finite_or_none(self.mean_final_db),
            "fake_quantized_single_step_snr_db": finite_or_none(self.fake_quant_single_step_db),
            "fake_quantized_final_latents_snr_db": self.fake_quant_final_db
            and [finite_or_none(value) for value in self.fake_quant_final_db],
            "not_finite": self.not_finite,
            "bare_session_final_latents_snr_db": file
            and file.bare_session_db
            and [finite_or_none(value) for value in file.bare_session_db],
            "kernels": file and dict(file.kernels),
            "runner_kernels": file and file.runner_kernels and dict(file.runner_kernels),
            "runtime": file and file.runtime,
            "seeds": list(self.settings.seeds),
            "classes": list(self.settings.classes),
            "steps": self.settings.steps,
            "cfg_scale": self.settings.cfg_scale,
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Probed:
    """What one backend gave at the probed inputs."""

    outputs: list[Tensor]
    runtime: str
    not_finite: str | None  # why there are no numbers


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sampled:
    """What one backend sampled."""

    finals: list[Tensor]  # final latents, one per seed
    not_finite: str | None


def verify_file(
    float_model: DiT,
    fake_quantized: DiT,
    path: StrPath,
    settings: VerificationSettings,
    *,
    fake_quantized_fastest: Callable[[], DiT] | None = None,
    weight_only: bool = False,
    device: str | torch.device = "cpu",
    kept: KeptParts = KeptParts(),  # noqa: B008 (frozen)
    on_step: Callable[[int, int], None] | None = None,
) -> Verification:
    """Sample with the float model and the file, if it runs; compare, and probe what it must be.

    The models stay on `device`; the file runs on the CPU. What is kept of an interrupted
    verification is not run again; where all is, the file need not be there.

    Args:
        float_model: float32.
        fake_quantized: what the file must compute, in the file's float type.
        path: the exported ONNX file.
        settings: seeds, classes, steps, guidance.
        fake_quantized_fastest: makes what our runners must compute, where they run the file in a
            form of another target; held no longer than it is probed.
        weight_only: whether the file has weight-only linears, whose float inputs an ONNX Runtime
            session rounds to 8 bits unless it is told not to, as our runners tell it.
        device: where the models compute.
        kept: where every seed of every model is kept, of these settings and models alone.
        on_step: called with (sampling steps done, in all).

    Raises:
        RunnerError: the runtime is missing, or refuses the file.
        ArtifactError: what is to be kept cannot be written.
    """
    path = Path(path)
    dtype = fake_quantized.pos_embed.dtype
    open_file = _file_opener(dtype)
    differs = dtype != torch.bfloat16 and (weight_only or fake_quantized_fastest is not None)
    done, total = 0, (2 + differs) * len(settings.seeds) * settings.steps

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        if on_step is not None:
            on_step(done, total)

    runs = _Runs(settings=settings, kept=kept, count=count)
    with _opened(lambda: TorchRunner(float_model, device=device)) as runner:
        reference, wanted = runs.sampled("float", runner), runs.probed("float", runner)
    finals = file = None
    with _opened(lambda: TorchRunner(fake_quantized, device=device)) as runner:
        expected = runs.probed("fake", runner)
        if open_file is None:
            fake = runs.sampled("fake", runner)
            finals = _per_seed(reference, fake)
            expected = replace(expected, not_finite=fake.not_finite or expected.not_finite)
    fastest = None
    if fake_quantized_fastest is not None:
        make = fake_quantized_fastest
        with _opened(lambda: TorchRunner(make(), device=device)) as runner:
            fastest = runs.probed("fake-fastest", runner)
    if open_file is not None:
        file = _findings(path, open_file, runs, reference, wanted, expected, fastest)
        if differs:
            entries = BARE_SESSION if weight_only else None
            with _opened(
                lambda: OnnxRuntimeRunner(path, as_is=True, session_entries=entries)
            ) as runner:
                bare = runs.sampled("bare", runner)
            file = replace(file, bare_session_db=_per_seed(reference, bare))
    return Verification(
        file=file,
        match_bound_db=MATCH_BOUND_DB[dtype],
        fake_quant_single_step_db=_single_step(wanted, expected),
        fake_quant_final_db=finals,
        fake_quant_not_finite=expected.not_finite,
        settings=settings,
    )


def _file_opener(dtype: torch.dtype) -> Callable[[Path], FileRunner] | None:
    """Return what opens a file of a float type; None where nothing installed runs it."""
    if dtype != torch.bfloat16:
        return OnnxRuntimeRunner
    return OpenVINORunner if importlib.util.find_spec("openvino") else None


@contextmanager
def _opened(open_runner: Callable[[], Runner]) -> Iterator[Callable[[], Runner]]:
    """Yield what gives a runner, opened when it is first asked for and closed in the end."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(open_runner()))


def _findings(
    path: Path,
    open_file: Callable[[Path], FileRunner],
    runs: _Runs,
    reference: _Sampled,
    wanted: _Probed,
    expected: _Probed,
    fastest: _Probed | None,
) -> FileFindings:
    """Run the file and hold it against the float run and the fake-quantized answers.

    Where our runner runs another form, `fastest` is what that must answer; the file's own form is
    probed beside it.
    """
    with _opened(lambda: open_file(path)) as runner:
        sampled, probed = runs.sampled("file", runner), runs.probed("file", runner)
    own = probed
    if fastest is not None:
        with _opened(lambda: OnnxRuntimeRunner(path, as_is=True)) as runner:
            own = runs.probed("as-is", runner)
    is_listed = open_file is not OpenVINORunner
    seen = (sampled, probed, own, expected, fastest)
    broken = next((each.not_finite for each in seen if each and each.not_finite), None)
    return FileFindings(
        match_db=-math.inf if broken else _match(expected, own),
        runner_match_db=None if fastest is None or broken else _match(fastest, probed),
        single_step_db=_single_step(wanted, probed),
        final_db=_per_seed(reference, sampled),
        kernels=_kernels(runs.kept, path, as_is=True) if is_listed else {},
        runner_kernels=None if fastest is None else _kernels(runs.kept, path, as_is=False),
        runtime=probed.runtime,
        not_finite=broken,
    )


def _match(expected: _Probed, found: _Probed) -> float:
    """Return the worst SNR of the probed steps, all of them finite."""
    pairs = zip(expected.outputs, found.outputs, strict=True)
    return min(snr_db(wanted, got) for wanted, got in pairs)


def _kernels(kept: KeptParts, path: Path, *, as_is: bool) -> Mapping[str, Any]:
    """Return ONNX Runtime's kernels of a file's products, in order of name, and how many each."""

    def count() -> Part:
        counted = Counter(matmul_kernels(path, as_is=as_is).values())
        return Part(facts=dict(sorted(counted.items())))

    return kept.take("kernels" if as_is else "kernels-fastest", count).facts


def _single_step(reference: _Probed, other: _Probed) -> float:
    """Return the SNR over all probed steps."""
    if other.not_finite:
        return -math.inf
    return snr_db(torch.cat(reference.outputs), torch.cat(other.outputs))


def _per_seed(reference: _Sampled, other: _Sampled) -> tuple[float, ...]:
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

    def sampled(self, name: str, runner: Callable[[], Runner]) -> _Sampled:
        """Sample every seed."""
        parts: list[Part] = []
        for seed in self.settings.seeds:
            if found := self.kept.find(f"{name}-{seed}"):
                self.count(self.settings.steps)
            part = found or self.kept.take(
                f"{name}-{seed}", partial(self._trajectory, runner, seed)
            )
            parts.append(part)
            self.inputs = self.inputs or _probed_inputs(part)
        return _Sampled(
            finals=[part.tensors["final"] for part in parts],
            not_finite=_first_not_finite(*parts),
        )

    def probed(self, name: str, runner: Callable[[], Runner]) -> _Probed:
        """Answer at the probed inputs."""
        part = self.kept.take(f"{name}-probes", partial(self._answers, runner))
        return _Probed(
            outputs=[part.tensors[str(index)] for index in range(len(self.inputs))],
            runtime=part.facts["runtime"],
            not_finite=_first_not_finite(part),
        )

    def _trajectory(self, runner: Callable[[], Runner], seed: int) -> Part:
        """Sample one seed; with its final latents goes what the very first run is probed at."""
        settings, probes = self.settings, []
        every = max(1, settings.steps // PROBES)
        facts: dict[str, Any] = {}
        steps = trajectory(
            runner(),
            classes=settings.classes,
            steps=settings.steps,
            cfg_scale=settings.cfg_scale,
            seed=seed,
        )
        try:
            for step in steps:
                if not self.inputs and step.index % every == 0:
                    probes.append(inputs_at(step, settings.cfg_scale, runner().config))
                last = step.next_latents
                self.count(1)
        except NonFiniteError as error:
            if not self.inputs:
                raise  # the float model itself
            last = torch.full_like(self.inputs[0].latents[: len(settings.classes)], torch.nan)
            facts["not_finite"] = str(error)
        gathered = {
            name: torch.stack([getattr(probe, name) for probe in probes])
            for name in (_PROBE_PARTS if probes else ())
        }
        return Part(tensors={"final": last, **gathered}, facts=facts)

    def _answers(self, runner: Callable[[], Runner]) -> Part:
        """Answer at the probed inputs."""
        facts: dict[str, Any] = {"runtime": runner().description}
        answers = {}
        for index, probe in enumerate(self.inputs):
            try:
                answer = runner()(probe.latents, probe.timesteps, probe.class_labels)
            except NonFiniteError as error:
                answer = torch.full((1,), torch.nan)
                facts.setdefault("not_finite", f"time step {int(probe.timesteps[0])}: {error}")
            answers[str(index)] = answer
        return Part(tensors=answers, facts=facts)


_PROBE_PARTS = ("latents", "timesteps", "class_labels")
"""What a probe is made of."""


def _first_not_finite(*parts: Part) -> str | None:
    """Return where the first of some parts put out NaN or infinity, None if none did."""
    return next((part.facts["not_finite"] for part in parts if "not_finite" in part.facts), None)


def _probed_inputs(part: Part) -> list[ModelInputs]:
    """Return the inputs that were gathered with a seed; none where it is not the first."""
    if _PROBE_PARTS[0] not in part.tensors:
        return []
    stacked = (part.tensors[name] for name in _PROBE_PARTS)
    return [
        ModelInputs(latents=latents, timesteps=timesteps, class_labels=labels)
        for latents, timesteps, labels in zip(*stacked, strict=True)
    ]
