"""What `ditas-build --dry-run` prints; needs neither product."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import typer

from ditas_export.cli.build_settings import BuildSettings
from ditas_export.engine.build import input_shapes
from ditas_export.engine.make import BuiltForm
from ditas_export.engine.options import BuildOptions
from ditas_export.engine.products import OPTION_NAMES, Product, candidates
from ditas_export.engine.trtexec import command_line
from ditas_export.errors import EngineError
from ditas_export.onnx_export.external_data import require_external_data
from ditas_export.onnx_export.file_facts import read_config, require_form_for_tensorrt
from ditas_export.onnx_export.manifest import require_own_manifest
from ditas_export.plain_text import one_line


def print_commands(model: Path, plan: Path, settings: BuildSettings) -> None:
    """Print the command line of every program that the backend stands for.

    Raises:
        EngineError: the file has to be expanded first, or no program has the options.
        OnnxExportError: the file does not say which model it holds, or is in ONNX Runtime's form.
    """
    read_config(model)  # says first what is wrong with the file
    require_form_for_tensorrt(model)
    require_external_data(model)
    require_own_manifest(model)
    wanted = BuiltForm.of(model, settings.layout, as_is=settings.as_is)
    if wanted.is_expanded and settings.layout is not None:
        raise EngineError(
            f"{model} has to be expanded first, which no program of NVIDIA's does; write it with "
            f"ditas-export --layout int8, or build without --trtexec"
        )
    if wanted.is_relowered:
        typer.echo(
            f"# of {model} as it is; ditas-build takes fewer kernels, by writing it for TensorRT "
            f"first, as ditas-export --target tensorrt does",
            err=True,
        )
    refusals = []
    for product in candidates(settings.backend):
        try:
            words = command_line(model, plan, product=product, options=settings.options)
        except EngineError as error:
            refusals.append(str(error))
            continue
        typer.echo(shlex.join(words))
    if len(refusals) == len(candidates(settings.backend)):
        raise EngineError("; ".join(refusals))
    for refusal in refusals:
        typer.echo(f"# {one_line(str(refusal))}")


def print_intent(model: Path, plan: Path, settings: BuildSettings, *, as_json: bool) -> None:
    """Print what would be built, with what.

    Raises:
        EngineError: no product that the backend stands for has the options.
        OnnxExportError: the file does not say which model it holds, or is in ONNX Runtime's form.
    """
    read_config(model)  # says first what is wrong with the file
    require_form_for_tensorrt(model)
    require_external_data(model)
    require_own_manifest(model)
    products = candidates(settings.backend)
    _require_possible(products, settings.options)
    wanted = BuiltForm.of(model, settings.layout, as_is=settings.as_is)
    intent = {
        "model": str(model),
        "relowers": wanted.is_relowered,
        "expands": wanted.is_expanded,
        "plan": str(plan),
        "backends": {product.name: _presence(product) for product in products},
        "shapes": input_shapes(read_config(model), settings.options.batch),
        "options": settings.options.to_dict(),
    }
    if as_json:
        typer.echo(json.dumps(intent, indent=2, allow_nan=False))
        return
    typer.echo(f"{model}{f' ({wanted})' if str(wanted) else ''} -> {plan}")
    for product in products:
        typer.echo(f"  {product.title}: {_presence(product)}")
    for name, shapes in input_shapes(read_config(model), settings.options.batch).items():
        typer.echo(f"  {name}: {' | '.join('x'.join(map(str, shape)) for shape in shapes)}")
    for name, value in settings.options.to_dict().items():
        if name != "batch" and value not in (None, False, []):
            typer.echo(f"  {OPTION_NAMES[name]}: {value}")


def _require_possible(products: tuple[Product, ...], options: BuildOptions) -> None:
    """Raise EngineError unless the product that would build, or any if none is here, can."""
    refusals = []
    for product in [product for product in products if product.is_installed][:1] or products:
        try:
            product.require_options(options)
        except EngineError as error:
            refusals.append(str(error))
        else:
            return
    raise EngineError("; ".join(refusals))


def _presence(product: Product) -> str:
    """Return whether a product is here, and if not, what brings it."""
    return "installed" if product.is_installed else f"not installed; {product.install}"
