"""What diffusers wrote: which folder, which weights, and what its JSON files say.

A pipeline's folder has the transformer in `transformer/`, its average in `transformer_ema/` where
there is one, and the process and the VAE that it was trained with in `scheduler/` and `vae/`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditas_export.dit.facts import Fact, facts_of_values, merged
from ditas_export.dit.record_entries import NOT_FOLLOWED_ENTRIES
from ditas_export.dit.tensor_files import read_json
from ditas_export.errors import CheckpointError
from ditas_export.process import VaeFactors

HUB_PATTERNS = (
    (
        "transformer/config.json",
        "transformer/*.safetensors*",
        "transformer_ema/config.json",
        "transformer_ema/*.safetensors*",
        "config.json",
        "diffusion_pytorch_model*.safetensors*",
        "scheduler/scheduler_config.json",
        "vae/config.json",
        "model_index.json",
    ),
    ("transformer/*.bin*", "transformer_ema/*.bin*", "diffusion_pytorch_model*.bin*"),
)
"""What to fetch of a hub model; the second group only if the first brings no weights."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""How the hub names a repository."""

_TRANSFORMERS = ("transformer_ema", "transformer")
"""Folders of a pipeline, the better one first."""

_OF_PIPELINES = ("model_index.json", "scheduler/scheduler_config.json", "vae/config.json")
"""Files of which a pipeline's folder has one."""

STATISTICS = ("latents_mean", "latents_std")
"""Entries of a VAE's config that have a value per channel, or None."""

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders
"""diffusers' classes of a DiT."""

PIXART = "PixArtTransformer2DModel"
"""diffusers' class of a PixArt."""

_FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
"""Settings of diffusers' class that make it a DiT."""

_DEFAULTS: dict[str, int | float] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
"""Settings that may vary, all positive, and what diffusers takes where they are not written."""

_FOLLOWED_SCHEDULERS = {
    "DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler",
    "DDIMInverseScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "SASolverScheduler", "TCDScheduler", "LCMScheduler",
}  # fmt: skip
"""diffusers' schedulers over betas of discrete steps."""


_STEM = "diffusion_pytorch_model"
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
_HALVES = {"fp16", "bf16", "fp8", "float16", "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusersFolder:
    """A transformer's folder, its files found and its records read."""

    folder: Path  # of the transformer
    weights: Path  # a file, or an index of shards
    facts: Mapping[str, Fact]  # of config.json, scheduler/ and vae/
    norm_eps: float
    vae: Path | None  # the pipeline's folder, where a VAE lies in it
    notes: tuple[str, ...]


def open_folder(path: Path) -> DiffusersFolder:
    """Find a DiT in a folder, its own or a pipeline's, and read what its files say.

    Raises:
        CheckpointError: no such folder, a class or setting of another model, no weights, or records
            that are not followed or differ.
    """
    folder = transformer_folder(path)
    settings = _settings(folder)
    return opened(path, folder, _facts_of_settings(settings, folder), norm_eps=settings["norm_eps"])


def transformer_folder(path: Path) -> Path:
    """Return the folder of the transformer to take: the first that has weights."""
    folders = transformer_folders(path)
    return next((each for each in folders if find_weights(each)), folders[0])


def opened(
    path: Path, folder: Path, facts: Mapping[str, Fact], *, norm_eps: float
) -> DiffusersFolder:
    """Find a transformer's weights, and read what its pipeline's files say beside its own.

    Args:
        path: of the transformer, or of a pipeline.
        folder: of the transformer.
        facts: of its config.json.
        norm_eps: of its config.json.

    Raises:
        CheckpointError: no weights, or records that are not followed or differ.
    """
    weights, notes = _weights(folder)
    notes[:0] = _choice_notes(path, folder)
    pipeline = _pipeline_of(path, folder)
    if pipeline is not None and (pipeline / "scheduler").is_dir():
        scheduler = pipeline / "scheduler" / "scheduler_config.json"
        facts = merged(facts, _facts_of_scheduler(scheduler), where=str(path))
        notes += _scheduler_notes(scheduler)
    has_vae = pipeline is not None and (pipeline / "vae" / "config.json").is_file()
    if pipeline is not None and has_vae:
        vae = pipeline / "vae" / "config.json"
        facts = merged(facts, _facts_of_vae(vae), where=str(path))
        notes += _vae_notes(vae)
    return DiffusersFolder(
        folder=folder,
        weights=weights,
        facts=facts,
        norm_eps=norm_eps,
        vae=pipeline if has_vae else None,
        notes=tuple(notes),
    )


def transformer_folders(path: Path) -> list[Path]:
    """Return the transformers' folders of a pipeline, the averaged one's first, or `path` alone.

    A folder without config.json is no transformer's.
    """
    inner = (path / name for name in _TRANSFORMERS)
    return [folder for folder in inner if (folder / "config.json").is_file()] or [path]


def class_of(path: Path) -> str | None:
    """Return the class of diffusers that a transformer's or a pipeline's folder says it holds.

    A folder of before there were classes of their own says `Transformer2DModel` of a PixArt too.
    """
    config = transformer_folders(path)[0] / "config.json"
    written = read_json(config) if config.is_file() else {}
    name = written.get("_class_name")
    if name == CLASSES[1] and written.get("norm_type") == "ada_norm_single":
        return PIXART
    return name if isinstance(name, str) else None


def find_weights(folder: Path) -> list[Path]:
    """Return diffusers' weight files and indices in a folder, the ones to take first first.

    Averaged ones before plain ones before `non_ema`, full precision before half, safetensors before
    pickles.
    """
    if not folder.is_dir():
        return []
    return sorted(
        (
            path
            for path in folder.glob(f"{_STEM}*")
            if path.is_file() and re.search(r"\.(safetensors|bin)(\.|$)", path.name)
            if not _SHARD.search(path.name)
        ),
        key=_worse,
    )


def variant_of(path: Path) -> str | None:
    """Return the variant in a weight file's name, as diffusers takes it; None where it has none."""
    known = {"", "safetensors", "bin", "index", "json"}
    words = [word for word in path.name.removeprefix(_STEM).split(".") if word not in known]
    return ".".join(words) or None


def _choice_notes(path: Path, folder: Path) -> list[str]:
    """Return what is to be said of the choice between a pipeline's transformers."""
    averaged, plain = (path / name for name in _TRANSFORMERS)
    if folder == averaged:
        beside = f" ({plain.name}/ is not used)" if plain.is_dir() else ""
        return [f"took the averaged weights, {averaged.name}/{beside}"]
    if folder == plain and averaged.is_dir():
        return [f"took the raw weights, {plain.name}/: {averaged.name}/ has no whole model"]
    return []


def _worse(path: Path) -> tuple[int, int, int, str]:
    """Return what weight files are sorted by."""
    words = set(re.split(r"[._-]", path.name.removeprefix(_STEM)))
    average = 2 if "non" in words else 0 if "ema" in words else 1
    return average, len(words & _HALVES), "bin" in words, path.name


def _weights(folder: Path) -> tuple[Path, list[str]]:
    """Return the weight file of a folder, and what is to be said of the choice."""
    found = find_weights(folder)
    if not found:
        here = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(
            f"{folder} has a config.json but none of {_STEM}*.safetensors or .bin; found "
            f"{', '.join(here)[:200]}"
        )
    others = ", ".join(path.name for path in found[1:])
    return found[0], [f"took {found[0].name}; not used: {others}"] if others else []


def _pipeline_of(path: Path, folder: Path) -> Path | None:
    """Return the pipeline's folder: what was passed, or what a passed transformer lies in.

    A link may lie in one, or lead to one.
    """
    if folder != path:
        return path
    return next(
        (
            place.parent
            for place in (path.absolute(), path.resolve())
            if place.name in _TRANSFORMERS
            and any((place.parent / name).is_file() for name in _OF_PIPELINES)
        ),
        None,
    )


def _settings(folder: Path) -> dict[str, Any]:
    """Return `config.json` with diffusers' defaults, of a class and with settings of a DiT."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{folder} holds a LoRA adapter (adapter_config.json), not a model; pass the "
                f"model and this as --lora, or merge it first, W + (alpha/r) B A for every adapted "
                f"linear (in PEFT: merge_and_unload())"
            )
        raise CheckpointError(
            f"{folder} is a folder without config.json; expected one written by diffusers, or "
            f"the path of a checkpoint file"
        )
    written = read_json(path)
    name = written.get("_class_name")
    if name not in CLASSES:
        raise CheckpointError(f"{path} describes a {name}, expected {CLASSES[0]}")
    settings = _DEFAULTS | _FIXED | {"interpolation_scale": None, "out_channels": None} | written
    for key, expected in _FIXED.items():
        if settings[key] != expected:
            raise CheckpointError(f"{path} has {key}={settings[key]!r}; a DiT has {expected!r}")
    if settings["interpolation_scale"] not in (None, 1):
        raise CheckpointError(
            f"{path} has interpolation_scale={settings['interpolation_scale']!r}; a DiT's "
            f"positions are not scaled"
        )
    size = settings["sample_size"]
    if isinstance(size, list) and len(size) == 2 and size[0] != size[1]:
        raise CheckpointError(
            f"{path} has sample_size={size}: a grid that is not square is not followed (yet)"
        )
    if isinstance(size, list) and len(size) == 2:
        settings["sample_size"] = size[0]
    for key, default in _DEFAULTS.items():
        value = settings[key]
        if isinstance(value, bool) or not isinstance(value, type(default)) or value <= 0:
            raise CheckpointError(
                f"{path} has {key}={value!r}; expected a positive {type(default).__name__}"
            )
    return settings


def _facts_of_settings(settings: Mapping[str, Any], folder: Path) -> dict[str, Fact]:
    """Return what `config.json` says, under our names."""
    channels, out = settings["in_channels"], settings["out_channels"]
    out = channels if out is None else out
    if out not in (channels, 2 * channels):
        raise CheckpointError(
            f"{folder / 'config.json'} has out_channels={out!r}; a DiT of in_channels={channels} "
            f"has {channels}, or {2 * channels} where the variance is learned"
        )
    values = {
        "num_heads": ("num_attention_heads", settings["num_attention_heads"]),
        "hidden_size": (
            "num_attention_heads * attention_head_dim",
            settings["num_attention_heads"] * settings["attention_head_dim"],
        ),
        "depth": ("num_layers", settings["num_layers"]),
        "patch_size": ("patch_size", settings["patch_size"]),
        "in_channels": ("in_channels", channels),
        "input_size": ("sample_size", settings["sample_size"]),
        "num_classes": ("num_embeds_ada_norm", settings["num_embeds_ada_norm"]),
        "learn_sigma": ("out_channels", out == 2 * channels),
    }
    facts = {field: Fact(value, f"config.json {key}") for field, (key, value) in values.items()}
    return facts | {"family": Fact("dit", "config.json _class_name")}


def _facts_of_scheduler(path: Path) -> dict[str, Fact]:
    """Return what a pipeline's `scheduler_config.json` says; its class's defaults fill gaps.

    Raises:
        CheckpointError: a process that is not followed.
    """
    written = read_json(path)
    name = str(written.get("_class_name"))
    if name not in _FOLLOWED_SCHEDULERS:
        raise CheckpointError(
            f"{path} describes a {name[:60]}, whose process is not followed; expected a scheduler "
            f"over betas of a model that predicts noise, such as DDPMScheduler or DDIMScheduler"
        )
    needed = ["beta_schedule", "beta_start", "beta_end", "num_train_timesteps"]
    if name.startswith("DDPM"):
        needed.append("variance_type")
    if missing := [key for key in needed if written.get(key) is None]:
        written |= _scheduler_defaults(name, missing, path)
    values = {
        key: value for key, value in written.items() if key in {*needed, *NOT_FOLLOWED_ENTRIES}
    }
    values["prediction_type"] = written.get("prediction_type", "epsilon")
    facts = facts_of_values(values, where=str(path), path=f"{path.name} ")
    if facts["beta_schedule"].value == "squaredcos_cap_v2":  # has no ends, whatever is written
        facts = {key: fact for key, fact in facts.items() if key not in ("beta_start", "beta_end")}
    return facts


def _scheduler_notes(path: Path) -> list[str]:
    """Return one line for each setting of a scheduler that changes pictures and is not followed."""
    written = read_json(path)
    kept = [key for key in ("clip_sample", "thresholding") if written.get(key)]
    return [f"{path.name} has {key}=true, which is not followed: x0 is not clipped" for key in kept]


def _facts_of_vae(path: Path) -> dict[str, Fact]:
    """Return the factors in a VAE's `config.json`.

    Raises:
        CheckpointError: no factors that latents survive.
    """
    written = read_json(path)
    scaling = written.get("scaling_factor")
    if scaling is None and written.get("_class_name") != "AutoencoderKL":
        return {}
    try:
        factors = VaeFactors(
            scaling_factor=0.18215 if scaling is None else scaling,  # AutoencoderKL's default
            shift_factor=written.get("shift_factor") or 0.0,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; correct the record") from None
    return {"vae": Fact(factors, f"{path.parent.name}/{path.name}")}


def _vae_notes(path: Path) -> list[str]:
    """Return a line for statistics of latents, which are the decoder's and not the process's."""
    found = [name for name in STATISTICS if read_json(path).get(name) is not None]
    return [
        f"{path.parent.name}/{path.name} has {' and '.join(found)}: the VAE's decoder applies them "
        f"channel by channel, and the model's file records the scaling factor alone"
        for _ in found[:1]
    ]


def _scheduler_defaults(name: str, keys: list[str], path: Path) -> dict[str, Any]:
    """Return what one of diffusers' schedulers takes where nothing is written."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    if lost := [key for key in keys if key not in parameters]:
        raise CheckpointError(f"{path} has no {', '.join(lost)}; expected all of the schedule")
    return {key: parameters[key].default for key in keys}
