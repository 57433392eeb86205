"""What a checkpoint says about itself beside its tensors, and what its user says.

Sources are the options of a training run, safetensors metadata, diffusers' `config.json`, a
pipeline's scheduler and VAE, and the caller's hints. Each becomes *facts*: a field of `DiTConfig`
or `Process` -> its value, and where that stands. Fields beside those: `named_heads`, heads of the
size that a model's name tells; `image_size`, in pixels; `fixed_variance`, where none is learned.

Two facts of one field that differ are an error that names both. What is not followed, such as a
prediction other than the noise, is refused by name.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch import Tensor

from ditas_export.dit.pickles import Inert
from ditas_export.dit.presets import SIZES
from ditas_export.dit.process import BetaSchedule, VaeFactors, Variance
from ditas_export.dit.tensor_files import read_json
from ditas_export.errors import CheckpointError
from ditas_export.options import CheckpointHints


@dataclass(frozen=True, slots=True)
class Fact:
    """The value of a field, and where it stands."""

    value: Any
    where: str  # "args.num_heads", "--num-heads", "scheduler_config.json beta_end"


Facts = Mapping[str, Fact]


RECORD_PARTS = {
    "args", "config", "cfg", "conf", "hparams", "hyper_parameters", "model_args",
    "model_kwargs", "model_config", "options",
}  # fmt: skip
"""Parts of a training checkpoint that say how it was trained."""

NAMESPACES = {"argparse.Namespace", "types.SimpleNamespace"}
"""Objects of a pickle that are read as a dict, and hold nothing else."""

_INNER_PARTS = {
    "model", "params", "network", "net", "dit", "transformer", "diffusion", "scheduler",
    "noise_scheduler", "model_args", "model_kwargs", "model_params", "init_args", "kwargs",
    "transport",
}  # fmt: skip
"""Parts of those that are looked into."""

_DEPTH = 4

_NOISE = {"epsilon", "eps", "e", "noise", "pred_noise", "pred_eps"}
"""Names of a prediction that is followed."""

_SCHEDULES = {
    **{name: name for name in get_args(BetaSchedule)},
    "cosine": "squaredcos_cap_v2",
    "squaredcos": "squaredcos_cap_v2",
}

_NOT_FOLLOWED = {
    "predicts something else than the noise": (
        "predict_xstart predict_x0 predict_v v_prediction path_type flow_matching rectified_flow "
        "use_flow_matching use_flow_sigmas"
    ),
    "was trained with zero-terminal SNR": (
        "rescale_betas_zero_snr zero_snr zero_terminal_snr enforce_zero_terminal_snr"
    ),
    "was trained with betas of its own": "trained_betas",
    "computes something that a DiT does not": (
        "use_rope rope qk_norm use_qknorm use_qk_norm use_swiglu"
    ),
}
"""Why a record is refused, and the entries that say so where they are set."""

_REASONS = {name: reason for reason, names in _NOT_FOLLOWED.items() for name in names.split()}

_FLOW_NAMES = re.compile(r"sit(?![a-z])|.*flow", re.IGNORECASE)
"""Models that are trained by flow matching, and have a DiT's tensors."""

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


def merged(*sources: Facts, where: str, remedy: str = "correct the record") -> dict[str, Fact]:
    """Return the facts of all sources.

    Raises:
        CheckpointError: two of them differ in a field; names both values and where they stand.
    """
    facts: dict[str, Fact] = {}
    for source in sources:
        for field, fact in source.items():
            known = facts.setdefault(field, fact)
            if known.value != fact.value:
                raise CheckpointError(
                    f"{where}: {known.where} gives {field} {_shown(known.value)}, {fact.where} "
                    f"gives {_shown(fact.value)}; {remedy}"
                )
    return facts


def facts_of_training(content: Mapping[Any, Any], *, where: str) -> dict[str, Fact]:
    """Return what the options in a training checkpoint say.

    Args:
        content: the checkpoint, its options a Namespace, a dict or anything like them.
        where: the file, for messages.

    Raises:
        CheckpointError: something that is not followed, no value of its kind, or two that differ.
    """
    beside = {
        name: plain(value)
        for name, value in content.items()
        if name in _READERS and not isinstance(value, Mapping | list | tuple | Tensor)
    }
    facts = facts_of_values(beside, where=where)
    for name in content:
        if name in RECORD_PARTS and isinstance(values := plain(content[name]), Mapping):
            for path, part in _inner(values, (str(name),)):
                found = facts_of_values(part, where=where, path=".".join(path) + ".")
                facts = merged(facts, found, where=where)
    return facts


def facts_of_metadata(metadata: Mapping[str, str], *, where: str) -> dict[str, Fact]:
    """Return what safetensors metadata say: plain keys, the fields' names, values as JSON.

    Raises:
        CheckpointError: see `facts_of_training`.
    """
    values = {name: _json_or_text(text) for name, text in metadata.items() if name in _READERS}
    return facts_of_values(values, where=where, path="metadata ")


def facts_of_scheduler(path: Path) -> dict[str, Fact]:
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
    values = {key: value for key, value in written.items() if key in {*needed, *_REASONS}}
    values["prediction_type"] = written.get("prediction_type", "epsilon")
    facts = facts_of_values(values, where=str(path), path=f"{path.name} ")
    if facts["beta_schedule"].value == "squaredcos_cap_v2":  # has no ends, whatever is written
        facts = {key: fact for key, fact in facts.items() if key not in ("beta_start", "beta_end")}
    return facts


def scheduler_notes(path: Path) -> list[str]:
    """Return one line for each setting of a scheduler that changes pictures and is not followed."""
    written = read_json(path)
    kept = [key for key in ("clip_sample", "thresholding") if written.get(key)]
    return [f"{path.name} has {key}=true, which is not followed: x0 is not clipped" for key in kept]


def facts_of_vae(path: Path) -> dict[str, Fact]:
    """Return the factors in a VAE's `config.json`.

    Raises:
        CheckpointError: no factors that latents survive.
    """
    written = read_json(path)
    scaling = written.get("scaling_factor")
    if scaling is None and written.get("_class_name") != "AutoencoderKL":
        return {}
    factors = VaeFactors(
        scaling_factor=0.18215 if scaling is None else scaling,  # AutoencoderKL's default
        shift_factor=written.get("shift_factor") or 0.0,
    )
    return {"vae": Fact(factors, f"{path.parent.name}/{path.name}")}


def facts_of_hints(hints: CheckpointHints) -> dict[str, Fact]:
    """Return what a caller says, each under the name of its option.

    Raises:
        CheckpointError: an impossible value.
    """
    facts = {}
    if hints.num_heads is not None:
        if hints.num_heads < 1:
            raise CheckpointError(f"--num-heads {hints.num_heads}: a DiT has at least one head")
        facts["num_heads"] = Fact(hints.num_heads, "--num-heads")
    if hints.num_classes is not None:
        if hints.num_classes < 0:
            raise CheckpointError(f"--num-classes {hints.num_classes}; expected 0 or more")
        facts["num_classes"] = Fact(hints.num_classes, "--num-classes")
    if hints.no_null_class:
        facts["null_row"] = Fact(False, "--no-null-class")
    if hints.betas is not None:
        facts |= _facts_of_betas(hints.betas)
    return facts


def _facts_of_betas(text: str) -> dict[str, Fact]:
    """Return the schedule that `--betas NAME[,START,END[,STEPS]]` names."""
    expected = (
        f"--betas {text}; expected NAME[,START,END[,STEPS]], NAME one of "
        f"{', '.join(get_args(BetaSchedule))}, START and END empty for the last"
    )
    name, *rest = (part.strip() for part in text.split(","))
    if name not in get_args(BetaSchedule) or len(rest) not in (0, 2, 3):
        raise CheckpointError(expected)
    try:
        ends = [float(part) for part in rest[:2] if part]
        steps = [int(part) for part in rest[2:]]
    except ValueError:
        raise CheckpointError(expected) from None
    if len(ends) == 1 or (name == "squaredcos_cap_v2" and ends):
        raise CheckpointError(expected)
    if name == "scaled_linear" and not ends:
        raise CheckpointError(f"--betas {text}: scaled_linear has no usual ends; add START,END")
    values: dict[str, str | float] = {"beta_schedule": name}
    if ends:
        values |= {"beta_start": ends[0], "beta_end": ends[1]}
    if steps:
        values["train_timesteps"] = steps[0]
    return {field: Fact(value, "--betas") for field, value in values.items()}


def facts_of_values(values: Mapping[str, Any], *, where: str, path: str = "") -> dict[str, Fact]:
    """Return the facts in a mapping of plain values; names that say nothing are left out.

    Args:
        values: what a record holds under its names.
        where: the file, for messages.
        path: what stands before a name in messages.

    Raises:
        CheckpointError: see `facts_of_training`.
    """
    facts: dict[str, Fact] = {}
    for name, value in values.items():
        if name not in _READERS or value is None:
            continue
        place = f"{path}{name}"
        try:
            found = _READERS[name](name, value)
        except _NotFollowedError as error:
            raise CheckpointError(
                f"{where}: {place}={_shown(value)}: the model {error}, which is not followed (yet)"
            ) from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: {place}={_shown(value)}; {error}") from None
        facts = merged(
            facts, {field: Fact(each, place) for field, each in found.items()}, where=where
        )
    return _with_conventions(facts, values, path)


def _with_conventions(
    facts: dict[str, Fact], values: Mapping[str, Any], path: str
) -> dict[str, Fact]:
    """Return facts with what two code bases mean by their names.

    OpenAI's `linear` has ends in proportion to 1000 / steps; latent diffusion's, which calls them
    `linear_start` and `linear_end`, is linear in the root.
    """
    schedule = facts.get("beta_schedule")
    is_linear = schedule is None or schedule.value == "linear"
    if "linear_start" in values and is_linear:
        return facts | {"beta_schedule": Fact("scaled_linear", f"{path}linear_start")}
    steps = facts.get("train_timesteps")
    if (
        "diffusion_steps" in values
        and steps is not None
        and is_linear
        and "beta_start" not in facts
    ):
        ends = {"beta_start": 0.1 / steps.value, "beta_end": 20 / steps.value}
        facts = facts | {field: Fact(value, steps.where) for field, value in ends.items()}
    return facts


def plain(value: Any, depth: int = 0) -> Any:
    """Return what a pickle's object says as plain values, the object itself where it says nothing.

    Namespaces, dataclasses and OmegaConf's containers become dicts, NumPy's numbers numbers, paths
    text.
    """
    if depth > 2 * _DEPTH:
        return None
    if isinstance(value, Mapping):
        return {name: plain(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, depth + 1) for inner in value]
    if not isinstance(value, Inert):
        return value
    if value.name.endswith("multiarray.scalar") and len(value.args) == 2:
        return _numpy_scalar(*value.args)
    if value.name.startswith("pathlib."):
        return "/".join(map(str, value.args))
    state = value.state if isinstance(value.state, Mapping) else {}
    for inner in ("_content", "_val"):  # OmegaConf
        if inner in state:
            return plain(state[inner], depth + 1)
    if state or value.entries:
        return {name: plain(inner, depth + 1) for name, inner in {**state, **value.entries}.items()}
    return value


def _numpy_scalar(kind: Any, raw: Any) -> Any:
    """Return a NumPy number of a pickle."""
    code = str(kind.args[0]) if isinstance(kind, Inert) and kind.args else ""
    if not re.fullmatch(r"[iufb][1248]", code) or not isinstance(raw, bytes):
        return None
    return np.frombuffer(raw, dtype=np.dtype(f"<{code}"))[0].item()


def _inner(
    values: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield a record's mappings that may say something of the model, and their paths."""
    yield path, values
    for name, inner in values.items():
        if name in _INNER_PARTS and isinstance(inner, Mapping) and len(path) < _DEPTH:
            yield from _inner(inner, (*path, name))


def _json_or_text(text: str) -> Any:
    """Return a metadata value, which is JSON or plain text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _scheduler_defaults(name: str, keys: list[str], path: Path) -> dict[str, Any]:
    """Return what one of diffusers' schedulers takes where nothing is written."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    if lost := [key for key in keys if key not in parameters]:
        raise CheckpointError(f"{path} has no {', '.join(lost)}; expected all of the schedule")
    return {key: parameters[key].default for key in keys}


def _shown(value: object) -> str:
    """Return a value as one short piece of text."""
    if isinstance(value, VaeFactors):
        return str(value)
    text = value.name if isinstance(value, Inert) else repr(value)
    return " ".join(text.split())[:60]


class _NotFollowedError(Exception):
    """A record of something that is not followed; the message goes on after "the model"."""


_Reader = Callable[[str, Any], Mapping[str, Any]]
"""From an entry's name and value to fields; raises ValueError with what was expected."""


def _whole(field: str, *, least: int = 1) -> _Reader:
    def read(_name: str, value: Any) -> Mapping[str, Any]:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"expected a whole number of {least} or more")
        return {field: value}

    return read


def _number(field: str) -> _Reader:
    def read(_name: str, value: Any) -> Mapping[str, Any]:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError("expected a number")
        return {field: float(value)}

    return read


def _flag(field: str) -> _Reader:
    def read(_name: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, bool):
            raise TypeError("expected true or false")
        return {field: value}

    return read


def _side(field: str) -> _Reader:
    """One side of a square, told once or twice."""
    one = _whole(field)

    def read(name: str, value: Any) -> Mapping[str, Any]:
        if isinstance(value, list | tuple) and len(value) == 2:
            if value[0] != value[1]:
                raise _NotFollowedError("has a grid that is not square")
            value = value[0]
        return one(name, value)

    return read


def _label_dropout(_name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("expected a share between 0 and 1")
    return {"null_row": value > 0}


def _schedule(_name: str, value: Any) -> Mapping[str, Any]:
    if value not in _SCHEDULES:
        raise _NotFollowedError(
            f"was trained on another noise schedule than {', '.join(_SCHEDULES)}"
        )
    return {"beta_schedule": _SCHEDULES[value]}


def _steps_if_whole(name: str, value: Any) -> Mapping[str, Any]:
    """`timesteps`, which are those of the schedule, or a list of those to take."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return _whole("train_timesteps", least=2)(name, value) if is_whole else {}


def _prediction(_name: str, value: Any) -> Mapping[str, Any]:
    if str(value).lower() not in _NOISE:
        raise _NotFollowedError("predicts something else than the noise")
    return {}


def _refused(name: str, value: Any) -> Mapping[str, Any]:
    if value:
        raise _NotFollowedError(_REASONS[name])
    return {}


def _variance(_name: str, value: Any) -> Mapping[str, Any]:
    if value not in get_args(Variance):
        raise _NotFollowedError(
            f"has another kind of variance than {', '.join(get_args(Variance))}"
        )
    return {"variance": value}


def _sigma_small(_name: str, value: Any) -> Mapping[str, Any]:
    return {"fixed_variance": "fixed_small" if value else "fixed_large"}


def _model_name(_name: str, value: Any) -> Mapping[str, Any]:
    """The size of a name such as DiT-XL/2; other names say nothing, but for flow models'."""
    if not isinstance(value, str):
        return {}
    if _FLOW_NAMES.match(value):
        raise _NotFollowedError("predicts something else than the noise (flow matching)")
    match = re.fullmatch(r"DiT-(\w+)/(\d+)", value)
    if match is None or match[1] not in SIZES:
        return {}
    size = SIZES[match[1]]
    return {
        "depth": size.depth,
        "hidden_size": size.hidden_size,
        "patch_size": int(match[2]),
        "named_heads": size.num_heads,
    }


def _vae(_name: str, value: Any) -> Mapping[str, Any]:
    """Factors; a name, as DiT's training takes, or an architecture says none."""
    if not isinstance(value, Mapping) or "scaling_factor" not in value:
        return {}
    shift = value.get("shift_factor") or 0.0
    return {"vae": VaeFactors(scaling_factor=value["scaling_factor"], shift_factor=shift)}


_ENTRIES: Mapping[str, _Reader] = {
    "num_heads n_heads heads num_attention_heads": _whole("num_heads"),
    "depth num_layers n_layers": _whole("depth"),
    "hidden_size": _whole("hidden_size"),
    "patch_size": _side("patch_size"),
    "in_channels": _whole("in_channels"),
    "mlp_ratio": _number("mlp_ratio"),
    "input_size latent_size": _side("input_size"),
    "image_size resolution img_size": _side("image_size"),
    "num_classes n_classes nb_classes class_num": _whole("num_classes", least=0),
    "class_dropout_prob class_dropout class_drop_prob label_dropout label_drop_prob cfg_prob "
    "uncond_prob p_uncond": _label_dropout,
    "null_row": _flag("null_row"),
    "learn_sigma": _flag("learn_sigma"),
    "layer_norm_eps": _number("layer_norm_eps"),
    "mlp_norm_eps": _number("mlp_norm_eps"),
    "frequency_shift": _whole("frequency_shift", least=0),
    "beta_schedule noise_schedule schedule_name": _schedule,
    "beta_start linear_start": _number("beta_start"),
    "beta_end linear_end": _number("beta_end"),
    "train_timesteps num_train_timesteps diffusion_steps num_diffusion_timesteps "
    "num_diffusion_steps num_timesteps": _whole("train_timesteps", least=2),
    "timesteps": _steps_if_whole,
    "prediction prediction_type pred_type parameterization objective model_mean_type": _prediction,
    "variance variance_type var_type": _variance,
    "sigma_small": _sigma_small,
    "model model_name model_type arch": _model_name,
    "vae": _vae,
    " ".join(_REASONS): _refused,
}
"""Names under which records say something, and what reads them."""

_READERS: Mapping[str, _Reader] = {
    name: reader for names, reader in _ENTRIES.items() for name in names.split()
}
