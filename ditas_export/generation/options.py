"""The options of `ditas-sample`, their defaults in one place. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ditas_export.errors import RunnerError
from ditas_export.options import CheckpointHints
from ditas_export.paths import convert_path_fields
from ditas_export.runtime.options import Runtime

SamplerChoice = Literal["ddpm", "ddim", "dpm++"]
CfgChannelsChoice = Literal["3", "all"]
DeviceChoice = Literal["cpu", "cuda"]

CFG_SCALE = 4.0
"""Guidance unless another is asked for (the published one); none where a model cannot be guided."""

CHOICES: dict[str, tuple[str, ...]] = {
    "sampler": get_args(SamplerChoice),
    "cfg_channels": get_args(CfgChannelsChoice),
    "runtime": get_args(Runtime),
    "device": get_args(DeviceChoice),
}
"""Options that take one of a few values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What `ditas-sample` is asked for; the fields are its options, None leaves it to the model."""

    model: str
    output: Path
    num_heads: int | None = None
    num_classes: int | None = None
    no_null_class: bool = False
    betas: str | None = None
    classes: str | None = None  # random
    images: int | None = None
    list: Path | None = None  # of labels and seeds, in the place of classes, images and seed
    steps: int = 50
    sampler: SamplerChoice = "ddpm"
    cfg_scale: float | None = None
    cfg_channels: CfgChannelsChoice = "3"
    seed: int | None = None  # 0
    batch: int = 8
    runtime: Runtime = "auto"
    device: DeviceChoice = "cpu"
    threads: int | None = None
    vae: str | None = None
    npz: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that nothing takes.

        Raises:
            RunnerError: an unknown value, or a list beside what it says itself.
        """
        convert_path_fields(self)
        beside = [name for name in ("classes", "images", "seed") if getattr(self, name) is not None]
        if self.list is not None and beside:
            raise RunnerError(
                f"--list says which images are made; leave out --{' and --'.join(beside)}"
            )
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise RunnerError(f"{name}={value!r}; choose one of {', '.join(choices)}")
        if self.threads is not None and self.threads < 1:
            raise RunnerError(f"threads={self.threads}; use at least one")

    @property
    def hints(self) -> CheckpointHints:
        """What is said of a checkpoint that does not say it itself."""
        return CheckpointHints(
            num_heads=self.num_heads,
            num_classes=self.num_classes,
            no_null_class=self.no_null_class,
            betas=self.betas,
        )
