"""Checkpoints of every kind to the same `DiT`, strictly checked.

Shape is inferred from the tensors. The number of heads leaves no trace in them: it comes from the
caller, the file's own record (safetensors metadata `num_heads`, diffusers' `config.json`), or the
published size of the same depth and width, and is asked for otherwise.

A diffusers folder keeps diffusers' constants (time-step frequencies over 127 instead of 128, and
the second norm's eps), so the model computes what `DiTTransformer2DModel` computes.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ditas_export.dit.identity import ModelIdentity, identity_of
from ditas_export.dit.layouts import DIFFUSERS, OFFICIAL, Geometry, assemble, infer_geometry
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.dit.presets import preset_num_heads
from ditas_export.dit.tensor_files import TensorFile, read_json, read_tensor_file
from ditas_export.errors import CheckpointError

BUNDLED_MODEL = "digits"
"""Name of the small trained model that comes with the package; write `./digits` for a path."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_PATTERNS = (
    (
        "transformer/config.json",
        "transformer/*.safetensors*",
        "config.json",
        "diffusion_pytorch_model*.safetensors*",
    ),
    ("transformer/*.bin*", "diffusion_pytorch_model*.bin*"),
)
"""What to fetch of a hub model; the second group only if the first brings no weights."""

_WEIGHT_FILES = tuple(
    f"diffusion_pytorch_model{variant}{kind}"
    for kind in (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
    for variant in ("", ".fp16")
)
_DIFFUSERS_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the latter in old folders
_DIFFUSERS_FIXED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
"""Settings of diffusers' class that make it a DiT."""

_DIFFUSERS_DEFAULTS: dict[str, int | float] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
"""Settings that may vary, all positive, and what diffusers takes where they are not written."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedDiT:
    """A checkpoint, ready to run."""

    model: DiT  # float32, evaluation mode, no gradients; tensors may be mapped from the file
    source: str  # one line: what was read
    identity: ModelIdentity  # the same for the same numbers and configuration, whatever the file
    dtype: torch.dtype  # float type of the block linears in the file


def load_dit(source: str | Path, *, num_heads: int | None = None) -> LoadedDiT:
    """Load a DiT.

    Args:
        source: `digits` for the bundled model; a `.pt` or `.safetensors` file with the published
            names (of a training checkpoint, the averaged weights); a folder written by diffusers,
            of the transformer or of a whole pipeline; or such a folder's id on the Hugging Face
            hub.
        num_heads: attention heads, where the file does not say.

    Raises:
        CheckpointError: nothing there, a damaged or unsafe file, another kind of model, tensors
            that do not make a DiT, or an unknown number of heads.
    """
    if source == BUNDLED_MODEL:
        folder = importlib.resources.files("ditas_export.dit") / "bundled"
        with importlib.resources.as_file(folder / f"{BUNDLED_MODEL}.safetensors") as path:
            return _load_file(path, num_heads, what=f"{BUNDLED_MODEL} (bundled)")
    path = Path(source)
    if path.is_dir():
        return _load_diffusers(path, num_heads, what=str(source))
    if path.is_file():
        return _load_file(path, num_heads, what=str(source))
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _load_diffusers(_download(source), num_heads, what=source)
    raise CheckpointError(
        f"{source}: no such file or folder; expected `{BUNDLED_MODEL}`, a checkpoint file, a "
        f"diffusers folder, or a hub id such as facebook/DiT-XL-2-256"
    )


def _load_file(path: Path, num_heads: int | None, *, what: str) -> LoadedDiT:
    """Load a file with the published names."""
    file = read_tensor_file(path)
    if DIFFUSERS.patch_weight in file.tensors:
        raise CheckpointError(
            f"{path} has diffusers' tensor names; pass its folder, whose config.json is needed"
        )
    geometry = infer_geometry(file.tensors, OFFICIAL, where=what)
    tokens = file.tensors["pos_embed"].shape[1:2] if "pos_embed" in file.tensors else ()
    config = DiTConfig(
        **asdict(geometry),
        input_size=math.isqrt(math.prod(tokens)) * geometry.patch_size,
        num_heads=_resolve_heads(num_heads, _recorded_heads(file, path), geometry, path),
    )
    state = assemble(file.tensors, OFFICIAL, config, where=what)
    dtype = file.tensors[OFFICIAL.fc1_weight].dtype
    described = f"{what}, part {file.part!r}" if file.part else what
    return _loaded(config, state, source=described, dtype=dtype)


def _load_diffusers(path: Path, num_heads: int | None, *, what: str) -> LoadedDiT:
    """Load a folder written by diffusers."""
    folder = _transformer_folder(path)
    settings = _diffusers_settings(folder)
    weights = _weight_file(folder)
    if weights is None:
        raise CheckpointError(f"{folder} has a config.json but none of {', '.join(_WEIGHT_FILES)}")
    tensors = read_tensor_file(weights).tensors
    geometry = infer_geometry(tensors, DIFFUSERS, where=what)
    _check_against_settings(geometry, settings, folder)
    config = DiTConfig(
        **asdict(geometry),
        input_size=settings["sample_size"],
        num_heads=_resolve_heads(num_heads, settings["num_attention_heads"], geometry, folder),
        mlp_norm_eps=settings["norm_eps"],
        frequency_shift=1,
    )
    state = assemble(tensors, DIFFUSERS, config, where=what)
    dtype = tensors[DIFFUSERS.fc1_weight].dtype
    return _loaded(config, state, source=f"{what} (diffusers)", dtype=dtype)


def _transformer_folder(path: Path) -> Path:
    """Return the transformer's folder of a pipeline, or the folder itself."""
    return path / "transformer" if (path / "transformer").is_dir() else path


def _weight_file(folder: Path) -> Path | None:
    """Return the first of diffusers' weight files that is there."""
    return next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)


def _diffusers_settings(folder: Path) -> dict[str, Any]:
    """Return `config.json` with diffusers' defaults, of a class and with settings of a DiT."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is a folder without config.json; expected one written by diffusers, or "
            f"the path of a checkpoint file"
        )
    written = read_json(path)
    name = written.get("_class_name")
    if name not in _DIFFUSERS_CLASSES:
        raise CheckpointError(f"{path} describes a {name}, expected {_DIFFUSERS_CLASSES[0]}")
    settings = _DIFFUSERS_DEFAULTS | _DIFFUSERS_FIXED | written
    for key, expected in _DIFFUSERS_FIXED.items():
        if settings[key] != expected:
            raise CheckpointError(f"{path} has {key}={settings[key]!r}; a DiT has {expected!r}")
    for key, default in _DIFFUSERS_DEFAULTS.items():
        value = settings[key]
        if not isinstance(value, type(default)) or value <= 0:
            raise CheckpointError(
                f"{path} has {key}={value!r}; expected a positive {type(default).__name__}"
            )
    return settings


def _check_against_settings(shape: Geometry, settings: Mapping[str, Any], folder: Path) -> None:
    """Refuse weights of another size than `config.json` says, such as some of the shards."""
    pairs = {
        "num_layers": (settings["num_layers"], shape.depth),
        "patch_size": (settings["patch_size"], shape.patch_size),
        "in_channels": (settings["in_channels"], shape.in_channels),
        "out_channels": (settings["out_channels"], 2 * shape.in_channels),
        "num_embeds_ada_norm": (settings["num_embeds_ada_norm"], shape.num_classes),
        "num_attention_heads * attention_head_dim": (
            settings["num_attention_heads"] * settings["attention_head_dim"],
            shape.hidden_size,
        ),
    }
    if odd := [f"{key} {told}, not {found}" for key, (told, found) in pairs.items()
               if told != found]:  # fmt: skip
        raise CheckpointError(
            f"{folder}: config.json and weights disagree: {'; '.join(odd)}; get both again"
        )


def _recorded_heads(file: TensorFile, path: Path) -> int | None:
    """Return the number of heads in a file's metadata, if it has one."""
    text = file.metadata.get("num_heads")
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise CheckpointError(f"{path} has num_heads={text!r} in its metadata; expected a number")
    return int(text)


def _resolve_heads(asked: int | None, recorded: int | None, shape: Geometry, path: Path) -> int:
    """Return the number of heads, or ask for it."""
    if asked is not None and asked < 1:
        raise CheckpointError(f"--num-heads {asked}: a DiT has at least one head")
    if asked is not None and recorded is not None and asked != recorded:
        raise CheckpointError(
            f"{path} records {recorded} heads, --num-heads says {asked}; leave the option out"
        )
    known = preset_num_heads(depth=shape.depth, hidden_size=shape.hidden_size)
    heads = asked or recorded or known
    if heads is None:
        raise CheckpointError(
            f"{path} does not say how many heads its attention has, and no published DiT has "
            f"depth {shape.depth} and width {shape.hidden_size}; pass --num-heads"
        )
    return heads


def _download(hub_id: str) -> Path:
    """Return the local copy of a hub model: its transformer alone, safetensors if it has them."""
    import huggingface_hub

    folder = Path()
    try:
        for patterns in _HUB_PATTERNS:
            fetched = huggingface_hub.snapshot_download(hub_id, allow_patterns=list(patterns))
            folder = Path(fetched)
            if _weight_file(_transformer_folder(folder)):
                break
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{hub_id} is no file here and could not be had from the hub ({reason}); check the "
            f"name and the network, or download it and pass the folder"
        ) from error
    return folder


def _loaded(
    config: DiTConfig, state: dict[str, torch.Tensor], *, source: str, dtype: torch.dtype
) -> LoadedDiT:
    """Put checked tensors into a model, without copying them."""
    with torch.device("meta"):
        model = DiT(config)
    model.load_state_dict(state, assign=True)
    model.eval().requires_grad_(requires_grad=False)
    return LoadedDiT(model=model, source=source, identity=identity_of(model), dtype=dtype)
