"""What is said of a file that was verified: exit codes, red lines, NaN by name, strict JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import TINY, exported, quantized_tiny_dit, tiny_dit, tiny_folded
from rich.console import Console
from typer.testing import CliRunner

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.cli import export as export_command
from ditas_export.cli.summary import print_summary
from ditas_export.conditions.labels import ClassLabels
from ditas_export.errors import NonFiniteError
from ditas_export.evaluation.held_out import FinalLatents, VerificationSettings
from ditas_export.evaluation.ties import NO_MATCH, Match
from ditas_export.evaluation.verify import FileFindings, Verification, verify_file
from ditas_export.onnx_export.export import export_onnx
from ditas_export.options import ExportOptions
from ditas_export.pipeline import ExportResult

SETTINGS = VerificationSettings(seeds=(0, 1), classes=(1, 2), steps=3)


def match(excess_db: float) -> Match:
    return Match(db=60.0 - excess_db, ties_db=60.0, excess_db=excess_db)


def verification(*final_db: float, excess_db: float = 0.0, **changes: Any) -> Verification:
    file = FileFindings(
        match=match(excess_db),
        runner_match=None,
        single_step_db=30.0,
        kernels={},
        runner_kernels=None,
        runtime="a runtime",
    )
    return Verification(
        file=replace(file, **changes),
        fake_quant_single_step_db=30.0,
        final=FinalLatents(seeds_db=final_db, images_db=final_db),
        settings=SETTINGS,
    )


def result(found: Verification, tmp_path: Path) -> ExportResult:
    file = tmp_path / "out.onnx"
    file.write_bytes(b"x")
    manifest = {
        "bits_per_weight": 5.0,
        "bytes_by_part": {},
        "float_linears": [],
        "noise_check": {"class_db": 39.0, "null_class_db": 38.0, "passes": True, "finding": None},
        "seconds": {},
        "verification": found.to_dict(),
    }
    quantized: Any = type("Model", (), {"linears": {}, "config": TINY})
    return ExportResult(
        quantized=quantized,
        conditions=ClassLabels(TINY),
        verification=found,
        manifest=manifest,
        file=file,
    )


@pytest.mark.parametrize(
    ("found", "flags", "code", "said"),
    [
        (verification(40.0, 41.0), [], 0, None),
        (verification(40.0, 41.0), ["--min-db", "40"], 0, None),
        (verification(40.0, 41.0), ["--min-db", "41"], 4, "40.5 dB from float's, less than"),
        (verification(math.inf, math.inf), ["--min-db", "60"], 0, None),
        (verification(12.0, 13.0), [], 0, None),
        (verification(-3.0, 1.0), [], 4, "-1.0 dB from float's, which is noise"),
        (verification(math.nan, 40.0), [], 4, "nan dB"),
        (verification(-math.inf, 40.0), [], 4, "-inf dB"),
        (verification(40.0, excess_db=30.0), ["--min-db", "50"], 1, "30.0 dB more noise"),
        (
            verification(-math.inf, match=NO_MATCH, not_finite="time step 7, image 3: NaN"),
            [],
            1,
            "not what was calibrated: time step 7, image 3: NaN",
        ),
        (
            replace(
                verification(math.nan), file=None, fake_quant_not_finite="time step 7: overflows"
            ),
            [],
            4,
            "the final latents are not finite: time step 7: overflows",
        ),
    ],
)
def test_exit_codes(
    found: Verification,
    flags: list[str],
    code: int,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = result(found, tmp_path)
    monkeypatch.setattr(export_command, "_run", lambda *_, **__: made)
    ran = CliRunner().invoke(export_command.app, [str(made.file), "--quiet", *flags])
    assert ran.exit_code == code
    if said is None:
        assert ran.stderr == ""
    else:
        assert said in ran.stderr
        assert ran.stderr.startswith("error: ")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_bound_is_a_number(value: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "out.onnx"), "--min-db", value]
    ran = CliRunner().invoke(export_command.app, arguments)
    assert ran.exit_code == 2
    assert "expected a finite number" in ran.stderr


@pytest.mark.parametrize(
    ("finals", "far"),
    [((20.1, 20.1), False), ((19.9, 19.9), True), ((math.nan, 40.0), True), ((math.inf,), False)],
)
def test_far_from_float_is_said_in_red(
    finals: tuple[float, ...], far: bool, tmp_path: Path
) -> None:
    found = verification(*finals)
    assert found.is_far_from_float == far
    console = Console(record=True, width=200, force_terminal=True)
    made = result(found, tmp_path)
    print_summary(console, made, ExportOptions(output=made.file))
    text = console.export_text(styles=True)
    assert ("other pictures" in text) == far
    assert ("\x1b[1;31m" in text) == far


def test_figures_are_strict_json() -> None:
    found = verification(
        math.nan,
        -math.inf,
        match=NO_MATCH,
        bare_session=FinalLatents(seeds_db=(math.inf, 30.0), images_db=(30.0,)),
    )
    written = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert written["final_latents_snr_db"] == [None, None]
    assert written["bare_session_final_latents_snr_db"] == [None, 30.0]


def test_an_overflow_of_a_half_precision_file_is_named(tmp_path: Path) -> None:
    """fc1 puts out 4e4 times as much: the float model holds it, and float16 does not."""
    model = tiny_dit()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight *= 4e4  # type: ignore[operator, union-attr]
            block.mlp.fc2.weight /= 4e4  # type: ignore[operator, union-attr]
    folded = fold_smoothing(quantized_tiny_dit(model, rank=0), dtype=torch.float16)
    export_onnx(folded, tmp_path / "out.onnx")
    found = verify_file(
        model, fake_quantized_model(folded, ranges="token"), tmp_path / "out.onnx", SETTINGS
    )
    assert found.matches is False
    assert found.file is not None
    assert found.file.not_finite is not None
    assert "time step 999: PyTorch" in found.file.not_finite
    assert "use bf16 or fp32" in found.file.not_finite
    json.dumps(found.to_dict(), allow_nan=False)


def test_an_overflow_is_named_of_a_file_that_nothing_runs(
    tmp_path: Path, hide_openvino: Callable[[], None]
) -> None:
    """In bfloat16 the fake-quantized forward alone was run; its head overflows here."""
    hide_openvino()
    folded = tiny_folded(dtype=torch.bfloat16)
    folded.float_parameters["final_layer.linear.bias"].fill_(torch.inf)
    fake = fake_quantized_model(folded, ranges="token")
    found = verify_file(tiny_dit(), fake, tmp_path / "unread.onnx", SETTINGS)
    assert found.file is None
    assert found.to_dict()["final_latents_snr_db"] is None
    assert found.to_dict()["fake_quantized_final_latents_snr_db"] == [None, None]
    assert found.not_finite is not None
    assert found.to_dict()["not_finite"] == found.not_finite
    assert "step 1 of 3, time step 999, image 0, 1" in found.not_finite


def test_a_float_model_that_is_not_finite_is_no_finding(tmp_path: Path) -> None:
    model = tiny_dit()
    with torch.no_grad():
        model.final_layer.linear.bias[0] = torch.nan
    fake = fake_quantized_model(tiny_folded(), ranges="token")
    with pytest.raises(NonFiniteError, match="time step 999"):
        verify_file(model, fake, exported(), SETTINGS)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_file_with_weight_only_linears_has_a_figure_for_a_bare_session(bits: int) -> None:
    folded = tiny_folded(adaln_bits=bits, rank=0)  # one form for all runners
    found = verify_file(
        tiny_dit(),
        fake_quantized_model(folded, ranges="token"),
        exported(adaln_bits=bits, rank=0),
        SETTINGS,
        weight_only=bits != 16,
    )
    assert found.file is not None
    assert found.matches
    if bits == 16:
        assert found.file.bare_session is None
        return
    assert found.file.bare_session is not None
    assert len(found.file.bare_session.seeds_db) == 2
    assert found.file.bare_session != found.final


@pytest.mark.parametrize(("own", "ours"), [(0.0, 5.0), (5.0, 0.0)])
def test_either_form_must_match(own: float, ours: float) -> None:
    assert verification(40.0, excess_db=own, runner_match=match(ours)).matches is False
    assert verification(40.0, excess_db=0.0, runner_match=match(0.0)).matches is True
