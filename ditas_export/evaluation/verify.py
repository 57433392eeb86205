"""The proof after an export: the file, reloaded, against the fake-quantized and the float model.

A portable file is held against the fake-quantized forward of two forms: its own, which a session of
ONNX Runtime runs, and the one that our runners write from it. All that sample do so with the same
noise, and all are probed at the same x_t (`held_out.py`). One backend runs at a time: idle
onnxruntime sessions keep their threads spinning. ONNX Runtime runs the file; it has no bfloat16
kernels on CPUs, so a bfloat16 file runs in OpenVINO, and not at all where that is not installed.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ditas_export.diffusion.runner import Runner
from ditas_export.evaluation.along import Along, along_trajectory
from ditas_export.evaluation.held_out import (
    FAKE,
    FILE,
    FLOAT,
    FinalLatents,
    HeldOut,
    Probed,
    Sampled,
    VerificationSettings,
    opened,
)
from ditas_export.evaluation.metrics import snr_db
from ditas_export.evaluation.ties import (
    DISTURBANCE,
    DRAWS,
    NO_MATCH,
    DisturbedRunner,
    Match,
    match_of,
)
from ditas_export.families.base import Conditions, FamilyModel
from ditas_export.families.registry import conditions_of
from ditas_export.figures import finite_or_none
from ditas_export.kept_parts import KeptParts, Part
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

FAR_FROM_FLOAT_DB = 20.0
"""Mean SNR of the final latents against float below which a file is called far from it: a tenth of
the amplitude is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFindings:
    """What the file gave; SNR in dB."""

    match: Match  # as it is, against the fake-quantized forward
    runner_match: Match | None  # the same of our runners' form; None where that is the file's
    single_step_db: float  # our runner against float at the same x_t, over all probes
    kernels: Mapping[str, int]  # onnxruntime kernel -> linears, as it is; empty in another runtime
    runner_kernels: Mapping[str, int] | None  # the same of our runners' form
    runtime: str
    not_finite: str | None = None  # where it put out NaN or infinity, and the remedy
    bare_session: FinalLatents | None = None  # of an `InferenceSession` that runs it as it is

    @property
    def worst_match(self) -> Match:
        """The lesser match of the two forms that are run."""
        found = (self.match, self.runner_match)
        return max((each for each in found if each is not None), key=lambda each: each.excess_db)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What verification found; SNR in dB."""

    file: FileFindings | None  # None where no runtime that is installed takes its float type
    fake_quant_single_step_db: float  # fake-quantized against float, over all probes
    final: FinalLatents  # of our runner, or of the fake-quantized forward where there is no file
    settings: VerificationSettings
    fake_quant_not_finite: str | None = None  # where the fake-quantized forward was not, and why
    along: tuple[Along, ...] = ()  # at the probed steps of the first seed's trajectory, and its end

    @property
    def matches(self) -> bool | None:
        """Whether the file computes what was calibrated; None if it was not run."""
        return None if self.file is None else self.file.worst_match.is_right

    @property
    def single_step_db(self) -> float:
        """Single-step SNR against float of the file, or of the fake-quantized forward alone."""
        return self.fake_quant_single_step_db if self.file is None else self.file.single_step_db

    @property
    def mean_final_db(self) -> float:
        """Mean over images of the final latents' SNR against float."""
        return self.final.mean_db

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
        file, final = self.file, self.final
        by_seed = final.to_list()
        interval = [finite_or_none(bound) for bound in final.interval_db]
        return {
            "matches_fake_quantized_forward": self.matches,
            "match": file and file.match.to_dict(),
            "runner_match": file and file.runner_match and file.runner_match.to_dict(),
            "single_step_snr_db": file and finite_or_none(file.single_step_db),
            "final_latents_snr_db": file and by_seed,
            "final_latents_snr_db_mean": file and finite_or_none(final.mean_db),
            "final_latents_snr_db_interval": file and interval,
            "final_latents_snr_db_by_image": file
            and [finite_or_none(value) for value in final.images_db],
            "fake_quantized_single_step_snr_db": finite_or_none(self.fake_quant_single_step_db),
            "fake_quantized_final_latents_snr_db": None if file else by_seed,
            "trajectory": [asdict(each) for each in self.along],
            "not_finite": self.not_finite,
            "bare_session_final_latents_snr_db": file
            and file.bare_session
            and file.bare_session.to_list(),
            "kernels": file and dict(file.kernels),
            "runner_kernels": file and file.runner_kernels and dict(file.runner_kernels),
            "runtime": file and file.runtime,
            "seeds": list(self.settings.seeds[: len(by_seed)]),
            "images": len(final.images_db),
            "classes": list(self.settings.classes),
            "steps": self.settings.steps,
            "cfg_scale": self.settings.cfg_scale,
        }


def verify_file(
    float_model: FamilyModel,
    fake_quantized: FamilyModel,
    path: StrPath,
    settings: VerificationSettings,
    *,
    fake_quantized_fastest: Callable[[], FamilyModel] | None = None,
    weight_only: bool = False,
    conditions: Conditions | None = None,
    device: str | torch.device = "cpu",
    floats: KeptParts | None = None,
    kept: KeptParts | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Verification:
    """Sample with the float model and the file, if it runs; compare, and probe what it must be.

    The models stay on `device`; the file runs on the CPU. Seeds are added while the mean over
    images is less sure than the settings ask; a bare session samples the first seeds alone. What is
    kept is not run again; where all is, the file need not be there.

    Args:
        float_model: float32.
        fake_quantized: what the file must compute, in the file's float type.
        path: the exported ONNX file.
        settings: seeds, classes, steps, guidance.
        fake_quantized_fastest: makes what our runners must compute, where they run the file in a
            form of another target; held no longer than it is probed.
        weight_only: whether the file has weight-only linears, whose float inputs an ONNX Runtime
            session rounds to 8 bits unless it is told not to, as our runners tell it.
        conditions: what the classes of the settings name; the model's own if not given.
        device: where the models compute.
        floats: what the float model gave, of these settings; see `sample_held_out`.
        kept: what this very file and its fake-quantized forward gave, of these settings.
        on_step: called with (sampling steps done, in all); the steps in all grow with the seeds.

    Raises:
        RunnerError: the runtime is missing, or refuses the file.
        ArtifactError: what is to be kept cannot be written.
    """
    path = Path(path)
    dtype = fake_quantized.dtype
    open_file = _file_opener(dtype)
    differs = dtype != torch.bfloat16 and (weight_only or fake_quantized_fastest is not None)
    first = settings.first_seeds
    done, total = 0, (2 + differs) * len(first) * settings.steps

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        if on_step is not None:
            on_step(done, total)

    held_out = HeldOut(
        settings=settings,
        config=float_model.config,
        conditions=conditions_of(float_model.config) if conditions is None else conditions,
        floats=floats or KeptParts(),
        others=kept or KeptParts(),
        count=count,
    )

    def open_float() -> Runner:
        return TorchRunner(float_model, device=device)

    def open_judged() -> Runner:
        return TorchRunner(fake_quantized, device=device) if open_file is None else open_file(path)

    judged = FAKE if open_file is None else FILE
    with opened(open_float) as runner:
        reference = held_out.sampled(FLOAT, runner, first)
        wanted = held_out.probed(FLOAT, runner)
    with opened(lambda: TorchRunner(fake_quantized, device=device)) as runner:
        expected = _Expected.of(held_out, FAKE, runner, dtype)
    fastest = None
    if fake_quantized_fastest is not None:
        make = fake_quantized_fastest
        with opened(lambda: TorchRunner(make(), device=device)) as runner:
            fastest = _Expected.of(held_out, "fake-fastest", runner, dtype)
    with opened(open_judged) as runner:
        sampled = held_out.sampled(judged, runner, first)
        probed = held_out.probed(judged, runner)
    final = FinalLatents.between(reference, sampled)
    while (needed := final.seeds_needed(settings)) > len(sampled.finals):
        seeds = settings.seeds[:needed]
        total += 2 * (needed - len(sampled.finals)) * settings.steps
        done -= 2 * len(sampled.finals) * settings.steps  # they are counted again
        with opened(open_float) as runner:
            reference = held_out.sampled(FLOAT, runner, seeds)
        with opened(open_judged) as runner:
            sampled = held_out.sampled(judged, runner, seeds)
        final = FinalLatents.between(reference, sampled)
    file = bare = None
    if open_file is not None:
        if differs:
            entries = BARE_SESSION if weight_only else None
            with opened(
                lambda: OnnxRuntimeRunner(path, as_is=True, session_entries=entries)
            ) as runner:
                bare = FinalLatents.between(reference, held_out.sampled("bare", runner, first))
        file = _findings(
            path,
            held_out,
            wanted,
            expected,
            fastest,
            sampled,
            probed,
            is_listed=open_file is not OpenVINORunner,
        )
        file = replace(file, bare_session=bare)
    return Verification(
        file=file,
        fake_quant_single_step_db=_single_step(wanted, expected.answers),
        final=final,
        fake_quant_not_finite=(None if file else sampled.not_finite) or expected.answers.not_finite,
        along=along_trajectory(held_out, judged),
        settings=settings,
    )


def _file_opener(dtype: torch.dtype) -> Callable[[Path], FileRunner] | None:
    """Return what opens a file of a float type; None where nothing installed runs it."""
    if dtype != torch.bfloat16:
        return OnnxRuntimeRunner
    return OpenVINORunner if importlib.util.find_spec("openvino") else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Expected:
    """What a file must answer at the probes, and how far a right one may be from it."""

    answers: Probed
    disturbed: tuple[Probed, ...]
    width: int  # numbers of a row's hidden states

    @classmethod
    def of(
        cls, held_out: HeldOut, name: str, runner: Callable[[], Runner], dtype: torch.dtype
    ) -> _Expected:
        """Let a fake-quantized forward answer, as it is and disturbed."""

        def disturbed(seed: int) -> DisturbedRunner:
            return DisturbedRunner(runner(), size=DISTURBANCE[dtype], seed=seed)

        return cls(
            answers=held_out.probed(name, runner),
            disturbed=tuple(
                held_out.probed(f"{name}-disturbed-{seed}", partial(disturbed, seed))
                for seed in DRAWS
            ),
            width=held_out.config.num_tokens * held_out.config.hidden_size,
        )

    def match(self, found: Probed) -> Match:
        """Return how a file's answers match, all of them finite."""
        expected, disturbed = self.answers.outputs, [draw.outputs for draw in self.disturbed]
        numbers = len(expected[0]) * self.width
        return match_of(expected, found.outputs, disturbed, numbers=numbers)


def _findings(
    path: Path,
    held_out: HeldOut,
    wanted: Probed,
    expected: _Expected,
    fastest: _Expected | None,
    sampled: Sampled,
    probed: Probed,
    *,
    is_listed: bool,
) -> FileFindings:
    """Hold what the file gave against the float model's and the fake-quantized answers.

    Where our runner runs another form, `fastest` is what that must answer; the file's own form is
    probed beside it.
    """
    own = probed
    if fastest is not None:
        with opened(lambda: OnnxRuntimeRunner(path, as_is=True)) as runner:
            own = held_out.probed("as-is", runner)
    seen: list[Sampled | Probed] = [sampled, probed, own, expected.answers]
    seen += [fastest.answers] if fastest else []
    broken = next((each.not_finite for each in seen if each.not_finite), None)
    return FileFindings(
        match=NO_MATCH if broken else expected.match(own),
        runner_match=None if fastest is None or broken else fastest.match(probed),
        single_step_db=_single_step(wanted, probed),
        kernels=_kernels(held_out.others, path, as_is=True) if is_listed else {},
        runner_kernels=None if fastest is None else _kernels(held_out.others, path, as_is=False),
        runtime=probed.runtime,
        not_finite=broken,
    )


def _kernels(kept: KeptParts, path: Path, *, as_is: bool) -> Mapping[str, Any]:
    """Return ONNX Runtime's kernels of a file's products, in order of name, and how many each."""

    def count() -> Part:
        counted = Counter(matmul_kernels(path, as_is=as_is).values())
        return Part(facts=dict(sorted(counted.items())))

    return kept.take("kernels" if as_is else "kernels-fastest", count).facts


def _single_step(reference: Probed, other: Probed) -> float:
    """Return the SNR over all probed steps."""
    if other.not_finite:
        return -math.inf
    return snr_db(torch.cat(reference.outputs), torch.cat(other.outputs))
