"""What the steps of an export hand to each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditas_export.calibration.noise_check import NoiseCheck
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.distributed import Ranks
from ditas_export.errors import CalibrationError
from ditas_export.families.base import Conditions
from ditas_export.families.load import LoadedModel
from ditas_export.job_files import WorkFolder
from ditas_export.options import ExportOptions
from ditas_export.report.gather import Activations
from ditas_export.timings import Timings

OnProgress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it, and how much there is in all."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExportJob:
    """What every step of an export needs."""

    options: ExportOptions
    loaded: LoadedModel
    conditions: Conditions
    noise: NoiseCheck
    ranks: Ranks
    work: WorkFolder
    timings: Timings
    on_progress: OnProgress
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solved:
    """A quantized model, and a hash of all that it depends on."""

    quantized: QuantizedModel  # as the file has it
    artifact: QuantizedModel  # as it is kept: its modulation float unless its bits were asked for
    key: str
    activations: Activations | None  # None of one that was kept: it has no inputs' maxima


def device_of(options: ExportOptions) -> torch.device:
    """Return the device that calibration runs on."""
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CalibrationError(
            f"--device cuda, but this PyTorch ({torch.__version__}) sees no CUDA GPU; "
            f"use --device cpu or install a CUDA build of torch"
        )
    return torch.device(options.device)


def digest_of(facts: Mapping[str, Any]) -> str:
    """Return a hash of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
