"""From the sampler's final latents to pixels: a VAE's decoder in PyTorch or in ONNX Runtime.

Images are decoded one at a time. Memory is that of one image, whatever the batch, and an image's
pixels do not depend on its batch mates, not by one bit.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ditas_export.artifact_files import sha256_of_tensors
from ditas_export.diffusion.runner import Closing
from ditas_export.errors import RunnerError
from ditas_export.families.base import ModelConfig
from ditas_export.file_signs import ONNX_SUFFIXES, has_suffix
from ditas_export.onnx_export.external_data import plain_files, sha256_of_onnx
from ditas_export.paths import StrPath
from ditas_export.process import VaeFactors
from ditas_export.runtime.faults import faults_as_errors
from ditas_export.runtime.onnxruntime_runner import CPU, CUDA, open_session, session_options
from ditas_export.runtime.open_runner import device_index
from ditas_export.vae.load import load_latent_decoder
from ditas_export.vae.shape import LATENTS_NAME, VaeShape, read_vae_shape, require_fitting_vae

NO_VAE = "none"
"""Says that latents are to stay latents."""


class Decoder(Protocol):
    """A VAE's decoder, whatever runs it; a context manager."""

    @property
    def in_channels(self) -> int:
        """Channels of the latents that it takes, C."""
        ...

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along one side."""
        ...

    @property
    def factors(self) -> VaeFactors | None:
        """How its latents are scaled; None where its file does not say."""
        ...

    @property
    def description(self) -> str:
        """One line: which VAE, backend, version and device."""
        ...

    @property
    def sha256(self) -> str:
        """Hash of its weights: what its pixels depend on beside the backend."""
        ...

    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels.

        Args:
            latents: (N, C, h, w) float32, as the sampler leaves them.

        Returns:
            (N, 3, H, W) float32 in [-1, 1], on the latents' device.
        """
        ...

    def __enter__(self) -> Self:
        """Return the decoder, ready."""
        ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free what it holds; it cannot decode afterwards."""
        ...


class _ImageByImage(Closing):
    """A `Decoder` that checks its latents and decodes them one by one.

    A backend gives `_backend`, None once closed, `_decode` and `description`.
    """

    def __init__(self, shape: VaeShape) -> None:
        self._shape = shape
        self._sha256 = ""
        self._backend: Any = None

    @property
    @abstractmethod
    def description(self) -> str:
        """One line: which VAE, backend, version and device."""

    @property
    def sha256(self) -> str:
        """Hash of its weights."""
        return self._sha256

    @property
    def in_channels(self) -> int:
        """Channels of the latents that it takes, C."""
        return self._shape.in_channels

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, along one side."""
        return self._shape.scale

    @property
    def factors(self) -> VaeFactors | None:
        """How its latents are scaled; None where its file does not say."""
        return self._shape.factors

    def __call__(self, latents: Tensor) -> Tensor:
        """Return pixels, (N, 3, H, W) float32 in [-1, 1], on the latents' device.

        Raises:
            RunnerError: latents that do not fit the VAE, or a closed decoder.
        """
        if self._backend is None:
            raise RunnerError("this decoder is closed; open the VAE again")
        if latents.ndim != 4 or not len(latents) or latents.shape[1] != self.in_channels:
            raise RunnerError(
                f"latents are {tuple(latents.shape)}; the VAE takes (N, {self.in_channels}, h, w), "
                f"one image at least"
            )
        with faults_as_errors(self.description):
            images = [self._decoded(image[None].detach().float()) for image in latents]
        return torch.cat(images).to(latents.device)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Return the pixels of one image, held against the shape that the VAE has."""
        images = self._decode(latents)
        sides = tuple(side * self.scale for side in latents.shape[2:])
        if tuple(images.shape) != (1, 3, *sides) or images.dtype != torch.float32:
            raise ValueError(
                f"it gave {tuple(images.shape)} {images.dtype}, expected {(1, 3, *sides)} "
                f"torch.float32"
            )
        return images

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Return the pixels of one image, (1, 3, H, W) float32, on any device."""

    def close(self) -> None:
        """Free the weights or the session."""
        self._backend = None


class VaeDecoder(_ImageByImage):
    """Decodes with diffusers' `AutoencoderKL` in float32.

    Args:
        name: the VAE's folder, a pipeline's, or a hub id; see `load_latent_decoder`.
        device: where it runs.

    Raises:
        RunnerError: no such VAE, or no such device.
        CheckpointError: a `config.json` that is no JSON.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise RunnerError(
                f"device {device} was asked for, but this PyTorch ({torch.__version__}) sees no "
                f"CUDA GPU; use --device cpu, or install a CUDA build of torch"
            )
        decoder = load_latent_decoder(name)
        super().__init__(decoder.shape)
        self._sha256 = sha256_of_tensors(decoder.state_dict())
        self._backend = decoder.to(self._device)
        self._name = name

    @property
    def description(self) -> str:
        """The VAE, version and device."""
        return f"{self._name} (AutoencoderKL, PyTorch {torch.__version__} on {self._device})"

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        """Run the VAE's decoder."""
        images: Tensor = self._backend(latents.to(self._device))
        return images


class OnnxVaeDecoder(_ImageByImage):
    """Decodes with a file that `export_vae_decoder` wrote, in ONNX Runtime.

    Args:
        path: the file.
        device: "cpu", or "cuda" or "cuda:N" for the CUDA provider on that GPU.
        threads: of one operator; None leaves the choice to ONNX Runtime.

    Raises:
        RunnerError: ONNX Runtime is missing, has no such provider, or refuses the file.
        OnnxExportError: the file does not say which VAE it decodes for.
    """

    def __init__(self, path: StrPath, device: str = "cpu", *, threads: int | None = None) -> None:
        path = Path(path)
        super().__init__(read_vae_shape(path))
        self._sha256 = sha256_of_onnx(path)
        index = device_index(device)
        with plain_files(path) as plain:
            self._backend = open_session(
                plain,
                session_options(threads, {}),
                CUDA if device.startswith("cuda") else CPU,
                index,
                source=path,
            )
        self._path = path
        self._providers = ", ".join(self._backend.get_providers())

    @property
    def description(self) -> str:
        """The file and the execution providers."""
        return f"{self._path} (onnxruntime, {self._providers})"

    def _decode(self, latents: Tensor) -> Tensor:
        """Run the session."""
        feed = {LATENTS_NAME: latents.cpu().contiguous().numpy()}
        (images,) = self._backend.run(None, feed)
        return torch.from_numpy(np.asarray(images))


def open_decoder(
    vae: StrPath | None, *, config: ModelConfig, device: str, threads: int | None = None
) -> Decoder | None:
    """Return the decoder of a model's latents, None where none is wanted.

    Args:
        vae: a `vae_decoder.onnx` by its suffix, in any case, what `VaeDecoder` takes, or "none".
        config: of the model.
        device: where it runs.
        threads: of a file in ONNX Runtime; PyTorch's are the process's.

    Raises:
        RunnerError: the VAE cannot be opened, takes latents of another number of channels, or
            scales them otherwise than the model records.
        OnnxExportError: a file that holds no VAE.
    """
    if vae is None or vae == NO_VAE:
        return None
    vae = str(vae)
    in_onnx = has_suffix(vae, ONNX_SUFFIXES)
    decoder: Decoder = (
        OnnxVaeDecoder(Path(vae), device, threads=threads) if in_onnx else VaeDecoder(vae, device)
    )
    require_fitting_vae(
        f"the VAE {vae}", in_channels=decoder.in_channels, factors=decoder.factors, config=config
    )
    return decoder
