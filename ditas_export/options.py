"""The options of the main job, their defaults in one place. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from ditas_export.errors import OnnxExportError
from ditas_export.saved_records import Above, Within, check_fields

Precision = Literal["fp32", "fp16", "bf16"]

FamilyChoice = Literal["dit", "sit", "repa"]
"""Whose process a model of DiT's tensors has: DiT's diffusion, SiT's or REPA's flow."""

Target = Literal["portable", "onnxruntime", "tensorrt"]
"""Whose forms a file has where runtimes differ.

Every runtime takes every form, but for two: TensorRT does not take ONNX Runtime's (UINT8
activations, opset 23), and ONNX Runtime has no bfloat16 kernels on CPUs.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preferences:
    """What is written for a target unless something else is asked for."""

    precision: Precision
    layout: Literal["int4", "int8"]  # of 4-bit weights under INT8 activations


PREFERENCES: Mapping[Target, Preferences] = {
    "portable": Preferences(precision="fp32", layout="int4"),
    # ONNX Runtime has no INT8 kernels with a float16 side on CPUs.
    "onnxruntime": Preferences(precision="fp32", layout="int4"),
    # Its builder expands INT4 weights in kernels of their own, at every run.
    "tensorrt": Preferences(precision="fp16", layout="int8"),
}
"""By target."""

CFG_SCALE = 1.5
"""Guidance of calibration and proof unless another is asked for (the paper's); none where a model
cannot be guided."""

WALK_TOKENS = 76_800
"""Tokens that the walk sees, where there are as many: a quarter of the paper's setting at 256
pixels, a sixteenth at 512, all of the bundled model's. What moments need is a number of tokens,
however many states they come from."""

FAST_WALK_TOKENS = 19_200
"""The same with `fast`: a quarter."""

VAE_FILE = "vae_decoder.onnx"
"""The VAE's decoder, beside the model that makes its latents."""

LARGEST_SEED = 2**62
"""torch takes seeds of 64 bits; verification adds to that of the calibration."""

DEFAULTS: Mapping[str, Any] = {
    "classes": "random",
    "w": 4,
    "a": 8,
    "method": "ditas-plus",
    "adaln": 8,
    "steps": 50,
    "samples": 12,
    "seed": 0,
}
"""What is taken where an option is not given, and no states or artefact decide it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointHints:
    """What a caller knows of a checkpoint that does not say it itself; the fields are options."""

    num_heads: Annotated[int, Within(1, 65_536)] | None = None
    num_classes: Annotated[int, Within(0, 10_000_000)] | None = None  # the null row not counted
    no_null_class: bool = False  # every row of the label table is a class
    betas: str | None = None  # NAME[,START,END[,STEPS]]
    family: str | None = None  # a `FamilyChoice`, or one of another package
    lora: Path | None = None  # a folder or a file, merged before anything else
    lora_alpha: Annotated[float, Above(0, 1e6)] | None = None  # where nothing else says it

    @property
    def given(self) -> list[str]:
        """The options that say something, as flags."""
        return [
            "--" + field.name.replace("_", "-")
            for field in fields(self)
            if getattr(self, field.name) not in (None, False)
        ]


NO_HINTS = CheckpointHints()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What `ditas-export` is asked for; the fields are its options, None is not given.

    An option that is given and contradicts the artefact or the states that are taken is an error.
    """

    output: Path
    model: str = "digits"
    num_heads: Annotated[int, Within(1, 65_536)] | None = None
    num_classes: Annotated[int, Within(0, 10_000_000)] | None = None
    no_null_class: bool = False
    betas: str | None = None
    family: str | None = None  # a `FamilyChoice`, or one of another package
    lora: Path | None = None
    lora_alpha: Annotated[float, Above(0, 1e6)] | None = None
    classes: str | None = None
    embeddings: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    w: Annotated[int, Within(1, 64)] | None = None
    a: Annotated[int, Within(1, 64)] | None = None
    method: str | None = None
    rank: Annotated[int, Within(0, 65_536)] | None = None
    block_size: Annotated[int, Within(1, 65_536)] | None = None
    alpha_grid: tuple[Annotated[float, Within(0, 1)], ...] | None = None
    walk_tokens: Annotated[int, Within(1, 2**40)] | None = None
    fast: bool = False
    ranges: Literal["token", "static"] | None = None
    layout: Literal["int4", "int8"] | None = None
    precision: Precision | None = None
    target: Target = "portable"
    adaln: Literal[16, 8, 4] | None = None
    steps: Annotated[int, Within(2, 100_000)] | None = None
    cfg_scale: float | None = None
    samples: Annotated[int, Within(1, 2**40)] | None = None
    seed: Annotated[int, Within(0, LARGEST_SEED)] | None = None
    save_calibration: Path | None = None
    calibration: Path | None = None
    save_artifact: Path | None = None
    artifact: Path | None = None
    reference: Path | None = None
    min_db: Annotated[float, Within(-1e6, 1e6)] | None = None
    vae: str | None = None
    report: Path | None = None

    def __post_init__(self) -> None:
        """Refuse values that no form of the file has.

        Raises:
            OnnxExportError: an unknown value, 8-bit weights in the 4-bit layout, ranges of float
                activations, or a bf16 file for onnxruntime.
        """
        check_fields(self, OnnxExportError)
        if self.w == 8 and self.layout == "int4" and self.artifact is None:
            raise OnnxExportError("8-bit weights have no int4 layout; use --layout int8")
        if self.w == 8 and self.block_size is not None:
            raise OnnxExportError(
                "8-bit weights have a scale per row, no blocks; use no block-size"
            )
        if self.a == 16 and self.ranges is not None:
            raise OnnxExportError("float activations have no ranges; leave out --ranges")
        if self.precision == "bf16" and self.target == "onnxruntime":
            raise OnnxExportError(
                "onnxruntime has no bfloat16 kernels on CPUs; with --precision bf16 use --target "
                "tensorrt or portable"
            )

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

    @property
    def float_side(self) -> Precision:
        """The float type of the file: as asked, or the target's."""
        return self.precision or PREFERENCES[self.target].precision

    @property
    def manifest_path(self) -> Path:
        """The manifest lies beside the file: out.onnx, out.json."""
        return self.output.with_suffix(".json")

    @property
    def stats_path(self) -> Path:
        """What a report shows lies beside the file: out.onnx, out.stats.safetensors."""
        return stats_path_of(self.output)

    @property
    def vae_path(self) -> Path | None:
        """The VAE's decoder lies beside the file, if one is asked for."""
        return None if self.vae is None else self.output.with_name(VAE_FILE)

    @property
    def rejected(self) -> Path:
        """Where a file goes that does not compute what was calibrated: out.rejected.onnx."""
        return self.output.with_name(f"{self.output.stem}.rejected{self.output.suffix}")

    @property
    def command(self) -> tuple[str, ...]:
        """The words of a command that asks for the same."""
        words = ["ditas-export"]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "output" or value is None or value is False or value == field.default:
                continue
            words.append("--" + field.name.replace("_", "-"))
            if isinstance(value, tuple):
                words.append(",".join(map(str, value)))
            elif value is not True:
                words.append(str(value))
        return (*words, str(self.output))

    def or_default(self, name: str) -> Any:
        """Return an option as given, or its default."""
        value = getattr(self, name)
        return DEFAULTS[name] if value is None else value


def stats_path_of(file: Path) -> Path:
    """Return where the statistics of an exported file, or of its manifest, lie: beside it."""
    return file.with_suffix(".stats.safetensors")
