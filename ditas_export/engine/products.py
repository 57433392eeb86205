"""The two products that build engines, and what each can be asked. Imports nothing heavy."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from ditas_export.engine.options import BuildOptions
from ditas_export.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A product of NVIDIA's that turns ONNX files into engines."""

    name: str  # as in --backend and in an engine's metadata
    title: str
    module: str
    oldest: tuple[int, int]  # major and minor version that this package builds with
    install: str
    tool: str  # its command-line program
    lacks: Mapping[str, str]  # fields of `BuildOptions` that it does not have, and why

    @property
    def is_installed(self) -> bool:
        """Whether its Python module can be found."""
        return importlib.util.find_spec(self.module) is not None

    def require_installed(self) -> None:
        """Raise EngineError, with the command to run, unless the product can be found."""
        if not self.is_installed:
            raise EngineError(f"{self.title} is not installed; {self.install}")

    def require_options(self, options: BuildOptions) -> None:
        """Raise EngineError if the options ask for something that the product does not have."""
        for name, reason in self.lacks.items():
            if getattr(options, name):
                flag = OPTION_NAMES[name]
                raise EngineError(f"{self.title} has no --{flag}: {reason}; leave it out")


OPTION_NAMES = {
    "batch": "batch",
    "workspace_gib": "workspace",
    "opt_level": "opt-level",
    "compute_capabilities": "compute-capability",
    "timing_cache": "timing-cache",
    "version_compatible": "version-compatible",
    "refit": "refit",
}
"""How the fields of `BuildOptions` are spelled on the command line and in build profiles."""

TENSORRT = Product(
    name="tensorrt",
    title="TensorRT",
    module="tensorrt",
    oldest=(10, 3),
    install='run: pip install "ditas-export[tensorrt]"',
    tool="trtexec",
    lacks={"compute_capabilities": "it builds for the GPU at hand"},
)

RTX = Product(
    name="rtx",
    title="TensorRT for RTX",
    module="tensorrt_rtx",
    oldest=(1, 7),
    install='run: pip install "ditas-export[rtx]"',
    tool="tensorrt_rtx",
    lacks={
        "timing_cache": "it times nothing when it builds",
        "version_compatible": "it comes without the lean runtime that such plans need",
    },
)

PRODUCTS = {product.name: product for product in (TENSORRT, RTX)}
"""By name, in the order in which `auto` tries them."""


def candidates(backend: str) -> tuple[Product, ...]:
    """Return the products that a --backend stands for; EngineError for an unknown one."""
    if backend == "auto":
        return tuple(PRODUCTS.values())
    if backend not in PRODUCTS:
        raise EngineError(f"backend={backend!r}; choose one of {', '.join(PRODUCTS)}, auto")
    return (PRODUCTS[backend],)


def choose_product(backend: str) -> Product:
    """Return the product to build with: the one named, or the first that is installed.

    Raises:
        EngineError: an unknown name, or nothing that is installed.
    """
    products = candidates(backend)
    if len(products) == 1:
        products[0].require_installed()
        return products[0]
    for product in products:
        if product.is_installed:
            return product
    raise EngineError(
        f"neither TensorRT nor TensorRT for RTX is installed; {RTX.install} (builds without a "
        f"GPU), or {TENSORRT.install.removeprefix('run: ')}"
    )
