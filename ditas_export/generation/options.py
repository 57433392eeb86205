"""The options of `ditas-sample`, their defaults in one place. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ditas_export.diffusion.options import CfgChannels, SamplerName
from ditas_export.errors import RunnerError
from ditas_export.options import LARGEST_SEED, CheckpointHints
from ditas_export.runtime.options import Runtime
from ditas_export.saved_records import Above, Within, check_fields

DeviceChoice = Literal["cpu", "cuda"]

CFG_SCALE = 4.0
"""Guidance unless another is asked for (the published one); none where a model cannot be guided."""

MOST_IMAGES = 10_000_000
"""Images of one folder; their files have numbers of six digits and more."""

MOST_THREADS = 4096
"""Threads of a backend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOptions:
    """What `ditas-sample` is asked for; the fields are its options, None leaves it to the model."""

    model: str
    output: Path
    num_heads: Annotated[int, Within(1, 65_536)] | None = None
    num_classes: Annotated[int, Within(0, 10_000_000)] | None = None
    no_null_class: bool = False
    betas: str | None = None
    family: str | None = None
    lora: Path | None = None
    lora_alpha: Annotated[float, Above(0, 1e6)] | None = None
    classes: str | None = None  # random; of embeddings the prompts' numbers
    embeddings: Path | None = None
    images: Annotated[int, Within(1, MOST_IMAGES)] | None = None
    list: Path | None = None  # of labels and seeds, in the place of classes, images and seed
    steps: Annotated[int, Within(1, 100_000)] = 50
    sampler: SamplerName | None = None
    shift: float | None = None
    cfg_scale: float | None = None
    cfg_channels: CfgChannels | None = None
    guidance_interval: tuple[Annotated[float, Within(0, 1)], ...] | None = None  # LO, HI
    seed: Annotated[int, Within(0, LARGEST_SEED)] | None = None  # 0
    batch: Annotated[int, Within(1, 65_536)] = 8
    runtime: Runtime = "auto"
    device: DeviceChoice = "cpu"
    threads: Annotated[int, Within(1, MOST_THREADS)] | None = None
    vae: str | None = None
    npz: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that nothing takes.

        Raises:
            RunnerError: an unknown value, or a list beside what it says itself.
        """
        beside = [name for name in ("classes", "images", "seed") if getattr(self, name) is not None]
        if self.list is not None and beside:
            raise RunnerError(
                f"--list says which images are made; leave out --{' and --'.join(beside)}"
            )
        check_fields(self, RunnerError)

    @property
    def hints(self) -> CheckpointHints:
        """What is said of a checkpoint that does not say it itself."""
        return CheckpointHints(
            num_heads=self.num_heads,
            num_classes=self.num_classes,
            no_null_class=self.no_null_class,
            betas=self.betas,
            family=self.family,
            lora=self.lora,
            lora_alpha=self.lora_alpha,
        )
