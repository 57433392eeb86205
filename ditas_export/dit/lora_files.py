"""LoRAs as they are written: PEFT's folders, and diffusers' files.

PEFT's have `adapter_config.json` beside the tensors. diffusers' names begin with `transformer.`;
they may say alpha, by tensors `….alpha` or in the metadata, or not: then `--lora-alpha` does. The
scale is alpha / r, or alpha / √r of a rank-stabilized one (Kalajdzievski 2023).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ditas_export.dit.lora import Lora, Update
from ditas_export.dit.tensor_files import abbreviated, read_json, read_tensor_file
from ditas_export.errors import CheckpointError
from ditas_export.options import CheckpointHints
from ditas_export.saved_records import shown
from ditas_export.text_files import TextError, parse_json

CONFIG_NAME = "adapter_config.json"

_WEIGHT_NAMES = (
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
)
"""Files of a folder, the one to take first first."""

_FACTOR = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<peft>[AB])|lora\.(?P<diffusers>down|up))\.weight"
)
_SIDES = {"down": "A", "up": "B"}
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_PLAIN_NAME = re.compile(r"[\w.]+")
_DORA = ("lora_magnitude_vector", "dora_scale")
"""Words in the names of a DoRA's own tensors."""

_MOST_ALPHA = 1e6

_PREFIXES = ("base_model.model.", "transformer.")
"""What PEFT and diffusers write before the names of the checkpoint; PEFT around diffusers both."""

_METADATA = "lora_adapter_metadata"
"""Where diffusers writes PEFT's settings in a file, as JSON, `transformer.` before each."""

_FOLLOWED = {
    "alpha_pattern", "init_lora_weights", "lora_alpha", "r", "rank_pattern", "use_rslora", "bias",
    # These change nothing of a merge: the tensors' names say what is meant.
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "target_modules", "task_type",
}  # fmt: skip
"""PEFT's settings that may have a value."""

_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""How the factors began, where that left the model's own weights as they were."""

_ELSEWHERE = "merge it where it was trained (in PEFT: merge_and_unload()), and pass that model"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    """What is said of a LoRA beside its tensors."""

    where: str  # what says it
    ranks: Mapping[str, int]  # by the end of a module's name, "" for all others
    alphas: Mapping[str, float]  # likewise
    is_rank_stabilized: bool = False


_NOTHING_SAID = _Settings(where="", ranks={}, alphas={})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapted:
    """A checkpoint's tensors, a LoRA merged into them if one is asked for."""

    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


def with_lora(tensors: Mapping[str, Tensor], hints: CheckpointHints) -> Adapted:
    """Return a checkpoint's tensors with the LoRA that the hints name, under the same names.

    Raises:
        CheckpointError: see `read_lora` and `Lora.merged`; an alpha of no LoRA.
    """
    if hints.lora is None:
        if hints.lora_alpha is not None:
            raise CheckpointError(f"--lora-alpha {hints.lora_alpha:g} without --lora; leave it out")
        return Adapted(tensors=tensors)
    lora = read_lora(hints.lora, alpha=hints.lora_alpha)
    return Adapted(tensors=lora.merged(tensors), notes=(lora.note,))


def read_lora(path: Path, *, alpha: float | None = None) -> Lora:
    """Read a LoRA.

    Args:
        path: a folder that PEFT or diffusers wrote, or the file of tensors.
        alpha: what nothing in it says.

    Raises:
        CheckpointError: nothing there, a damaged file, something else than a plain LoRA of linears
            (DoRA, trained biases, whole layers), ranks that differ from what is said, an alpha that
            nothing says, or one that is both said and given.
    """
    file_path = _weights(path)
    file = read_tensor_file(file_path)
    where = str(file_path)
    factors, alphas = _sorted_out(file.content, where)
    settings = _settings(file_path, file.metadata)
    updates = {}
    for module in sorted(factors):
        said = _said_alpha(module, alphas, settings, where)
        if said is not None and alpha is not None:
            raise CheckpointError(
                f"--lora-alpha {alpha:g}, but {where} says {said:g} itself; leave the option out"
            )
        updates[module] = _update(module, factors[module], said or alpha, settings, where)
    return Lora(updates=updates, source=str(path))


def _weights(path: Path) -> Path:
    """Return the file of tensors of a LoRA's folder, or the file itself."""
    if not path.is_dir():
        return path
    found = next((path / name for name in _WEIGHT_NAMES if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{path} has none of {', '.join(_WEIGHT_NAMES)}; expected a LoRA that PEFT or "
            f"diffusers wrote, or the path of its file"
        )
    return found


def _sorted_out(
    content: Mapping[str, Any], where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Return factors by module, A and B each, and the alphas that tensors say."""
    factors: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, tensor in content.items():
        if any(word in name for word in _DORA):
            raise CheckpointError(
                f"{where} is a DoRA ({name[:120]}), which is no sum; {_ELSEWHERE}"
            )
        factor, alpha = _FACTOR.fullmatch(name), _ALPHA.fullmatch(name)
        if factor is not None and _is_matrix(tensor):
            side = factor["peft"] or _SIDES[factor["diffusers"]]
            if side in factors.setdefault(_bare(factor["module"]), {}):
                raise CheckpointError(f"{where} has {name[:120]} twice, under two names; keep one")
            factors[_bare(factor["module"])][side] = tensor
        elif alpha is not None and isinstance(tensor, Tensor) and tensor.numel() == 1:
            alphas[_bare(alpha["module"])] = _number(float(tensor), name, where)
        else:
            raise CheckpointError(
                f"{where} has {name[:120]}, expected ….lora_A.weight and ….lora_B.weight, or "
                f"….lora.down.weight and ….lora.up.weight, of linears alone; {_ELSEWHERE}"
            )
    if not factors:
        raise CheckpointError(f"{where} holds no LoRA: it has no tensors; get it again")
    if odd := sorted(alphas.keys() - factors.keys()):
        raise CheckpointError(f"{where} has an alpha of {abbreviated(odd)} alone; get it again")
    return factors, alphas


def _is_matrix(tensor: object) -> bool:
    """Return whether a tensor can be a factor."""
    return isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.is_floating_point()


def _bare(module: str) -> str:
    """Return a module's name without what PEFT and diffusers write before it."""
    for prefix in _PREFIXES:
        module = module.removeprefix(prefix)
    return module


def _settings(path: Path, metadata: Mapping[str, str]) -> _Settings:
    """Return what is said beside the tensors: in `adapter_config.json`, or the file's metadata."""
    config = path.with_name(CONFIG_NAME)
    if config.is_file():
        return _followed(read_json(config), str(config))
    if _METADATA not in metadata:
        return _NOTHING_SAID
    where = f"{path}, metadata {_METADATA}"
    try:
        written = parse_json(metadata[_METADATA])
    except TextError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if not isinstance(written, dict):
        raise CheckpointError(f"{where} is {shown(written)}; expected settings by name")
    prefix = "transformer."
    own = {name.removeprefix(prefix): value for name, value in written.items() if prefix in name}
    return _followed(own, where)


def _followed(written: Mapping[str, Any], where: str) -> _Settings:
    """Return PEFT's settings; refuse those that make something else of the factors."""
    kind, start = written.get("peft_type", "LORA"), written.get("init_lora_weights")
    if kind != "LORA":
        raise CheckpointError(f"{where} has peft_type={shown(kind)}, expected LORA; {_ELSEWHERE}")
    if written.get("use_dora"):
        raise CheckpointError(f"{where} is of a DoRA, which is no sum; {_ELSEWHERE}")
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        raise CheckpointError(
            f"{where} has init_lora_weights={shown(start)}, which changes the weights beneath; "
            f"{_ELSEWHERE}"
        )
    if written.get("bias", "none") != "none":
        raise CheckpointError(f"{where} has bias={shown(written['bias'])}; {_ELSEWHERE}")
    odd = [name for name, value in written.items() if value and name not in _FOLLOWED]
    if odd:
        raise CheckpointError(
            f"{where} has {odd[0][:80]}={shown(written[odd[0]])}, which is not followed; "
            f"{_ELSEWHERE}"
        )
    return _Settings(
        where=where,
        ranks={
            name: _rank(value, name or "r", where)
            for name, value in _by_module(written, "r", "rank_pattern", where).items()
        },
        alphas={
            name: _number(value, name or "lora_alpha", where)
            for name, value in _by_module(written, "lora_alpha", "alpha_pattern", where).items()
        },
        is_rank_stabilized=bool(written.get("use_rslora")),
    )


def _by_module(written: Mapping[str, Any], key: str, pattern: str, where: str) -> dict[str, Any]:
    """Return a setting by the ends of modules' names, under "" that of all others."""
    by_end = {} if written.get(pattern) is None else written[pattern]
    if not isinstance(by_end, dict):
        raise CheckpointError(f"{where} has {pattern}={shown(by_end)}; expected values by module")
    if odd := [end for end in by_end if not _PLAIN_NAME.fullmatch(end)]:
        raise CheckpointError(
            f"{where} has a regular expression in {pattern}, {shown(odd[0])}, which is not "
            f"followed; {_ELSEWHERE}"
        )
    return by_end | ({"": written[key]} if written.get(key) is not None else {})


def _rank(value: object, name: str, where: str) -> int:
    """Return a rank, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{where} has {name}={shown(value)}; expected a rank, 1 or more")
    return value


def _number(value: object, name: str, where: str) -> float:
    """Return an alpha, if it is one."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 < value <= _MOST_ALPHA
    ):
        raise CheckpointError(
            f"{where} has {name}={shown(value)}; expected an alpha, more than 0 and "
            f"{_MOST_ALPHA:g} at most"
        )
    return float(value)


def _of(values: Mapping[str, Any], module: str) -> Any:
    """Return the value for a module: of the first end that its name has, else that of all others.

    As PEFT finds it.
    """
    for end, value in values.items():
        if end and f".{module}".endswith(f".{end}"):
            return value
    return values.get("")


def _said_alpha(
    module: str, alphas: Mapping[str, float], settings: _Settings, where: str
) -> float | None:
    """Return the alpha that a module's tensor or the settings say, None where neither does."""
    of_tensor, of_settings = alphas.get(module), _of(settings.alphas, module)
    if of_tensor is not None and of_settings not in (None, of_tensor):
        raise CheckpointError(
            f"{where} has alpha {of_tensor:g} of {module}, and {settings.where} {of_settings:g}; "
            f"correct one"
        )
    return of_settings if of_tensor is None else of_tensor


def _update(
    module: str, pair: Mapping[str, Tensor], alpha: float | None, settings: _Settings, where: str
) -> Update:
    """Return what is added to a module's weight."""
    if lost := {"A", "B"} - pair.keys():
        raise CheckpointError(f"{where} has no factor {lost.pop()} of {module}; get it again")
    rank, width = len(pair["A"]), pair["B"].shape[1]
    if rank != width or rank < 1:
        raise CheckpointError(
            f"{where} has factors of {module} of ranks {rank} (A) and {width} (B); expected "
            f"one rank"
        )
    if _of(settings.ranks, module) not in (None, rank):
        raise CheckpointError(
            f"{where} has rank {rank} of {module}, but {settings.where} says "
            f"{_of(settings.ranks, module)}; they are of two LoRAs"
        )
    if alpha is None:
        raise CheckpointError(
            f"{where} does not say alpha, without which its scale alpha / {rank} is unknown; put "
            f"{CONFIG_NAME} beside it, or give --lora-alpha ({rank} for a scale of 1)"
        )
    scale = alpha / (math.sqrt(rank) if settings.is_rank_stabilized else rank)
    return Update(down=pair["A"], up=pair["B"], scale=scale)
