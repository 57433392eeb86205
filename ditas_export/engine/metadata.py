"""The JSON beside a plan: what it was built from, with what, and for which GPU."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from ditas_export.artifact_files import atomic_path, sha256_of_file
from ditas_export.engine.options import BuildOptions
from ditas_export.engine.products import PRODUCTS, RTX, TENSORRT
from ditas_export.errors import DitasExportError, EngineError
from ditas_export.families.identity import RecordedConfig
from ditas_export.families.registry import record_of
from ditas_export.file_signs import describe_impostor, describe_other_kind, why_unreadable
from ditas_export.onnx_export.form import FileForm
from ditas_export.paths import StrPath
from ditas_export.saved_records import Within, check_fields, from_record
from ditas_export.text_files import TextError, read_json

KIND = "ditas-export engine"
FORMAT = f"{KIND} 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as an engine sees it."""

    name: str
    compute_capability: str  # such as "8.9"

    def __post_init__(self) -> None:
        """Refuse what names no GPU."""
        check_fields(self, EngineError)

    @classmethod
    def at(cls, device: torch.device) -> Gpu:
        """Return the GPU that a CUDA device is."""
        major, minor = torch.cuda.get_device_capability(device)
        return cls(name=torch.cuda.get_device_name(device), compute_capability=f"{major}.{minor}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMetadata:
    """What is known of a plan."""

    product: str  # a key of `PRODUCTS`
    version: str
    plan_sha256: str
    plan_bytes: Annotated[int, Within(0, 2**62)]
    onnx_name: str
    onnx_sha256: str  # with its external data: `sha256_of_onnx`
    model: RecordedConfig  # "config" in the file
    form: FileForm  # of the graph that was built
    options: BuildOptions
    gpu: Gpu | None  # the one at hand when it was built, if any
    layers: dict[str, Any] | None  # the layer report; None where the log lists no layers
    replaces: EngineMetadata | None = None
    """Of the plan that lay there before, if any. The metadata are written first, then the plan: a
    build that is killed between the two leaves the earlier plan, which these describe."""

    def __post_init__(self) -> None:
        """Refuse what describes no plan, naming the value."""
        check_fields(self, EngineError)
        if self.product not in PRODUCTS:
            raise EngineError(f"product={self.product!r}; choose one of {', '.join(PRODUCTS)}")
        if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})+", self.version) is None:
            raise EngineError(f"version={self.version!r}; expected numbers, as 10.13.3")

    def to_dict(self) -> dict[str, Any]:
        """Return the metadata as JSON values."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("model", "form", "options", "gpu", "replaces")
        }
        return values | {
            "config": record_of(self.model),
            "form": self.form.to_dict(),
            "options": self.options.to_dict(),
            "gpu": None if self.gpu is None else dataclasses.asdict(self.gpu),
            "replaces": None if self.replaces is None else self.replaces.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: object) -> EngineMetadata:
        """Return what `to_dict` described.

        Raises:
            EngineError: anything else.
        """
        return from_record(cls, _with_model(values), error=EngineError)

    def save(self, path: StrPath) -> None:
        """Write indented JSON; atomic."""
        path = Path(path)
        content = {"format": FORMAT, **self.to_dict()}
        with atomic_path(path) as partial:
            partial.write_text(
                json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8"
            )

    @classmethod
    def load(cls, path: StrPath) -> EngineMetadata:
        """Read what `save` wrote; EngineError on any other file."""
        path = Path(path)
        try:
            content = read_json(path)
            if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
                raise EngineError(f"it is no {FORMAT!r} file")
            return cls.from_dict(content)
        except DitasExportError as error:
            raise EngineError(
                f"{path} does not describe an engine ({error}); build it with ditas-build"
            ) from error
        except (OSError, TextError) as error:
            why = _why_no_metadata(path, error)
            raise EngineError(
                f"{path} does not describe an engine ({why}); build it with ditas-build"
            ) from error


def _with_model(values: object) -> object:
    """Return what a file says under the names of the fields: its "config" is `model`."""
    if not isinstance(values, dict) or "config" not in values:
        return values
    renamed = {"model" if name == "config" else name: value for name, value in values.items()}
    if "replaces" in renamed:
        renamed["replaces"] = _with_model(renamed["replaces"])
    return renamed


def _why_no_metadata(path: Path, error: Exception) -> str:
    """Return why metadata cannot be read; of what lies alone it is said if that is no plan."""
    plan = path.with_suffix("")
    if path.exists() or not plan.exists():
        return why_unreadable(path, error, expects_json=True)
    sign = describe_impostor(plan) or describe_other_kind(plan)
    return f"{plan} is {sign}" if sign else "it is not there; it belongs beside the plan"


def metadata_of(
    plan: StrPath, *, hash_file: Callable[[Path], str] = sha256_of_file
) -> EngineMetadata:
    """Return the metadata of a plan: those beside it, or of what they replace the ones that fit.

    Args:
        plan: the file.
        hash_file: gives the hex SHA-256 of a file, from memory where it has it.

    Raises:
        EngineError: no plan, no metadata beside it, or those of another plan.
    """
    plan = Path(plan)
    metadata = EngineMetadata.load(metadata_path(plan))
    try:
        found = hash_file(plan)
    except OSError as error:
        why = why_unreadable(plan, error)
        raise EngineError(f"{plan} cannot be read: {why}; build it with ditas-build") from error
    for known in (metadata, metadata.replaces):
        if known is not None and known.plan_sha256 == found:
            return known
    sign = describe_impostor(plan)
    hint = f"{plan} is {sign}" if sign else f"build {plan} again"
    raise EngineError(f"{metadata_path(plan)} describes another plan; {hint}")


def is_plan_file(path: StrPath) -> bool:
    """Return whether a file is a plan with its metadata beside it."""
    path = Path(path)
    try:
        metadata_of(path)
    except EngineError:
        return False
    return True


def metadata_path(plan: StrPath) -> Path:
    """Return where the metadata of a plan lie: out.plan, out.plan.json."""
    plan = Path(plan)
    return plan.with_name(f"{plan.name}.json")


def require_matching(
    metadata: EngineMetadata,
    plan: Path,
    *,
    product: str,
    version: str,
    gpu: Gpu,
) -> None:
    """Refuse a plan that the runtime at hand cannot run, with the reason.

    Args:
        metadata: of the plan, by `metadata_of`.
        plan: its file, for messages.
        product: a key of `PRODUCTS`: the runtime.
        version: of the runtime.
        gpu: the one to run on.

    Raises:
        EngineError: another product, a version that does not run it, or a GPU that it was not built
            for.
    """
    if product != metadata.product:
        built, found = PRODUCTS[metadata.product].title, PRODUCTS[product].title
        raise EngineError(f"{plan} was built with {built}; {found} cannot run it")
    if not _runs(metadata, version):
        raise EngineError(
            f"{plan} was built with {PRODUCTS[product].title} {metadata.version} and runs with "
            f"that version only, not {version}; build it again"
        )
    if reason := _wrong_gpu(metadata, gpu):
        raise EngineError(f"{plan} {reason}; build it for {gpu.name} ({gpu.compute_capability})")


def _runs(metadata: EngineMetadata, version: str) -> bool:
    """Return whether a version runs a plan: the same, or a later one of the same major version."""
    built, found = _release(metadata.version), _release(version)
    if built == found:
        return True
    compatible = metadata.options.version_compatible
    return compatible and built[0] == found[0] and built < found


def _release(version: str) -> list[int]:
    """Return major, minor and patch; `trtexec` does not say more."""
    return [int(part) for part in version.split(".")[:3]]


def _wrong_gpu(metadata: EngineMetadata, gpu: Gpu) -> str | None:
    """Return why a plan is not for a GPU, None if it may be."""
    targets = metadata.options.compute_capabilities
    if metadata.product == RTX.name and targets and gpu.compute_capability not in targets:
        return f"was built for compute capability {', '.join(targets)}"
    if metadata.product == TENSORRT.name and metadata.gpu is not None and metadata.gpu != gpu:
        return f"was built on {metadata.gpu.name} ({metadata.gpu.compute_capability})"
    return None
