"""A VAE's decoder, loaded from what diffusers wrote.

Its interface is the sampler's: latents as a model leaves them, pixels in [-1, 1] out. The scaling
that the VAE's `config.json` records is inside, so no caller has to know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditas_export.dit.diffusers_folder import HUB_ID, STATISTICS, find_weights, variant_of
from ditas_export.dit.tensor_files import abbreviated, read_json, refuse_other_kinds
from ditas_export.errors import RunnerError
from ditas_export.process import VaeFactors
from ditas_export.vae.shape import VaeShape

IMAGE_CHANNELS = 3

_CLASS = "AutoencoderKL"
_HUB_PATTERNS = tuple(
    tuple(
        f"{folder}{name}"
        for folder in ("vae/", "")
        for name in ("config.json", f"diffusion_pytorch_model*.{kind}*")
    )
    for kind in ("safetensors", "bin")
)
"""What to fetch of a hub model; the second group only if the first brings no weights."""


class LatentDecoder(nn.Module):
    """The decoding half of an `AutoencoderKL`, in float32, behind the sampler's interface.

    As diffusers' pipelines compute it, z = latents / scaling_factor + shift_factor, or, where the
    VAE's config has statistics of the latents by channel (Stable Diffusion XL's pipeline),
    z = latents · latents_std / scaling_factor + latents_mean.
    """

    latents_mean: Tensor | None  # (1, C, 1, 1)
    latents_std: Tensor | None

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.factors = VaeFactors(
            scaling_factor=vae.config.scaling_factor,
            shift_factor=vae.config.shift_factor or 0.0,
        )
        self.shape = VaeShape(
            in_channels=vae.config.latent_channels,
            scale=2 ** (len(vae.config.block_out_channels) - 1),
            factors=self.factors,
        )
        for name in STATISTICS:
            values = vae.config[name]
            self.register_buffer(name, None if values is None else _by_channel(values))
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Return pixels (N, 3, H, W) in [-1, 1]; latents are (N, C, h, w), both float32."""
        if self.latents_mean is None or self.latents_std is None:
            z = latents / self.factors.scaling_factor + self.factors.shift_factor
        else:
            z = latents * self.latents_std / self.factors.scaling_factor + self.latents_mean
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        images: Tensor = self.decoder(z)
        return images.clamp(-1.0, 1.0)


def _by_channel(values: Sequence[float]) -> Tensor:
    """Return one value per channel as (1, C, 1, 1) float32."""
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def load_latent_decoder(name: str) -> LatentDecoder:
    """Load a VAE and keep its decoder, in float32 on the CPU, without gradients.

    Args:
        name: a folder written by diffusers, of the VAE or of a whole pipeline; or the id of such a
            folder on the Hugging Face hub.

    Raises:
        RunnerError: nothing there, a hub that cannot be reached, another kind of model, missing or
            damaged weights, a VAE of no RGB images, or one whose config scales its latents as no
            pipeline does.
        CheckpointError: a `config.json` that is no JSON.
    """
    folder = _vae_folder(Path(name) if Path(name).is_dir() else _download(name))
    _require_autoencoder(folder)
    vae = _load(folder)
    if vae.config.out_channels != IMAGE_CHANNELS:
        raise RunnerError(
            f"the VAE {name} makes images of {vae.config.out_channels} channels; expected "
            f"{IMAGE_CHANNELS} (RGB)"
        )
    _require_known_scaling(name, vae.config)
    return LatentDecoder(vae).eval().requires_grad_(requires_grad=False)


def _vae_folder(path: Path) -> Path:
    """Return the VAE's folder of a pipeline, or the folder itself."""
    return path / "vae" if (path / "vae").is_dir() else path


def _require_autoencoder(folder: Path) -> None:
    """Refuse a folder that holds no `AutoencoderKL`."""
    path = folder / "config.json"
    if not path.is_file():
        raise RunnerError(
            f"{folder} is no VAE folder: it has no config.json; expected what "
            f"{_CLASS}.save_pretrained writes, or a pipeline's folder with that in vae/"
        )
    found = read_json(path).get("_class_name")
    if found != _CLASS:
        raise RunnerError(f"{path} describes a {found}, expected {_CLASS}; pass a VAE's folder")


def _require_known_scaling(name: str, config: Any) -> None:
    """Refuse statistics of the latents that are not whole, or that come with a shift as well."""
    given = {each: config[each] for each in STATISTICS if config[each] is not None}
    if not given:
        return
    lengths = {each: len(values) for each, values in given.items()}
    if lengths != dict.fromkeys(STATISTICS, config.latent_channels):
        raise RunnerError(
            f"the config.json of the VAE {name} has {lengths} values; expected "
            f"{config.latent_channels} of {' and '.join(STATISTICS)} each, or neither"
        )
    if config.shift_factor:
        raise RunnerError(
            f"the config.json of the VAE {name} has both latents_mean and shift_factor; expected "
            f"one of them, as they shift the latents twice"
        )


def _load(folder: Path) -> Any:
    """Return the `AutoencoderKL` of a folder, in float32; refuse one that is not whole."""
    weights = next(iter(find_weights(folder)), None)
    if weights is None:
        raise RunnerError(
            f"{folder} has a config.json but none of diffusion_pytorch_model*.safetensors or .bin"
        )
    refuse_other_kinds(weights)
    from diffusers import AutoencoderKL

    try:
        vae, report = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
            folder,
            torch_dtype=torch.float32,
            variant=variant_of(weights),
            use_safetensors=".safetensors" in weights.name,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises what safetensors, pickle and torch raise
        raise RunnerError(f"{weights} cannot be loaded: {_reason(error)}; get it again") from error
    if odd := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        names = abbreviated(sorted(map(str, odd)))
        raise RunnerError(f"{weights} does not fit its config.json ({names}); get both again")
    return vae


def _download(name: str) -> Path:
    """Return the local copy of a hub model's VAE."""
    if not HUB_ID.fullmatch(name):
        raise RunnerError(
            f"{name}: no such folder; expected a VAE's folder written by diffusers, a pipeline's, "
            f"or a hub id such as stabilityai/sd-vae-ft-ema"
        )
    import huggingface_hub

    folder = Path()
    try:
        for patterns in _HUB_PATTERNS:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
            if find_weights(_vae_folder(folder)):
                break
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        raise RunnerError(
            f"{name} is no folder here and could not be had from the hub ({_reason(error)}); check "
            f"the name and the network, or download it and pass the folder"
        ) from error
    return folder


def _reason(error: Exception) -> str:
    """Return the first line of an error, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
