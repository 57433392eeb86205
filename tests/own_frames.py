"""`examples/own_family` as an installed package, calibrated once for all tests."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import CalibrationSettings, collect_states
from ditas_export.families import entry_points
from ditas_export.families.base import Conditions, FamilyModel, ModelInputs
from ditas_export.families.identity import identity_of
from ditas_export.onnx_export.export import export_onnx
from ditas_export.onnx_export.form import Layout
from ditas_export.options import Target

FOLDER = tempfile.TemporaryDirectory(prefix="ditas-export-frames-")
"""Where exported files live until the tests end."""

EXAMPLES = Path(__file__).parent.parent / "examples"


def pretend_installed(
    folder: Path, families: Sequence[tuple[str, str]], *, package: str = "own-family"
) -> None:
    """Write the metadata of a package that brings families, by name and `module:attribute`."""
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{entry_points.GROUP}]", *(f"{name} = {value}" for name, value in families)]
    info.joinpath("entry_points.txt").write_text("\n".join(lines) + "\n")


@contextmanager
def found_in(*folders: Path) -> Iterator[None]:
    """Let packages of folders be found; families that were loaded before are forgotten."""
    before, loaded = list(sys.path), dict(entry_points._LOADED)
    entry_points._LOADED.clear()
    sys.path[:0] = [str(folder) for folder in folders]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        entry_points._LOADED.clear()
        entry_points._LOADED.update(loaded)


def made() -> ModuleType:
    """Return the example's `make.py`, while the example can be imported."""
    return importlib.import_module("own_family.make")


def fed(model: FamilyModel, *, rows: int = 4, seed: int = 0) -> ModelInputs:
    """Return inputs of the example's model: what can be asked for, and the row of nothing."""
    random = torch.Generator().manual_seed(seed)
    conditions = made().random_conditions()
    labels = torch.tensor([*range(rows - 1), conditions.null])
    frames = torch.randn(rows, *model.config.latent_shape, generator=random)
    time = torch.rand(rows, generator=random)
    return ModelInputs({"frames": frames, "time": time, **conditions.inputs(labels)})


@cache
def calibrated(seed: int = 0, *, planted: float | None = None) -> QuantizedModel:
    """Return the example's model quantized to W4A8, once per test run."""
    model = made().random_model(seed=seed)
    if planted is not None:
        plant(model, planted)
    return calibrated_with(model, made().random_conditions())


def calibrated_with(
    model: FamilyModel, conditions: Conditions, *, cfg_scale: float = 1.5
) -> QuantizedModel:
    """Return a model quantized to W4A8, on what it can be asked."""
    settings = CalibrationSettings(
        steps=4, classes=(0, 1, 2, 3), cfg_scale=cfg_scale, embeddings=conditions.identity
    )
    states = collect_states(model, settings, identity=identity_of(model), conditions=conditions)
    how = QuantizationSettings(rank=4, alpha_grid=(0.4, 0.5))
    return quantize_adaln(quantize_model(model, states, how, conditions=conditions), 8)


def plant(model: FamilyModel, size: float) -> None:
    """Let a channel between the two linears of the first MLP reach a size, and count no more.

    Of numbers as large GELU is x or 0: the model's function stays near what it was.
    """
    block = model.get_submodule("blocks.0")
    gain = size / float(largest_hidden(model))
    with torch.no_grad():
        block.ff_in.weight[0] *= gain  # type: ignore[union-attr, operator]
        block.ff_in.bias[0] *= gain  # type: ignore[union-attr, operator]
        block.ff_out.weight[:, 0] /= gain  # type: ignore[union-attr, index, operator]


def largest_hidden(model: FamilyModel) -> float:
    """Return the largest that the first channel gets, which the first MLP's first linear gives."""
    seen: list[torch.Tensor] = []
    linear = model.get_submodule("blocks.0.ff_in")
    handle = linear.register_forward_hook(lambda _module, _read, given: seen.append(given))
    with torch.no_grad():
        model(**fed(model))
    handle.remove()
    return float(seen[0][..., 0].max())


@cache
def exported(target: Target = "portable", layout: Layout = "int4") -> Path:
    """Return the example's file with a float32 side, once per test run; never write to it."""
    path = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "frames.onnx"
    export_onnx(fold_smoothing(calibrated()), path, target=target, layout=layout)
    return path


def expected() -> FamilyModel:
    """Return what computes the same."""
    return fake_quantized_model(fold_smoothing(calibrated()), ranges="token")
