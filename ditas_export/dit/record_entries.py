"""The names under which records say something of a model, and what reads each.

A reader turns an entry into values of fields of `DiTConfig` and `Process`, and of six more:
`named_heads`, heads of the size that a model's name tells; `image_size`, in pixels;
`fixed_variance`, where none is learned; `rescale_timesteps`, whether the network is fed steps of
1000; `flow`, where it was trained by flow matching; `family`, whose flow or diffusion it is. It
raises TypeError or ValueError with what was expected, and `NotFollowedError` for what this package
does not follow.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import Tensor

from ditas_export.dit.pickle_machine import Inert
from ditas_export.dit.presets import SIZES
from ditas_export.dit.record_parts import CLASS_ENTRIES
from ditas_export.options import FamilyChoice
from ditas_export.process import BetaSchedule, VaeFactors, Variance

_PREDICTIONS = {
    **dict.fromkeys(("epsilon", "eps", "e", "noise", "pred_noise", "pred_eps"), "epsilon"),
    **dict.fromkeys(("velocity", "v"), "velocity"),
}
"""Names of predictions that are followed; a velocity is one where the family is a flow's."""

_MEMBERS: Mapping[str, Mapping[Any, str]] = {
    "ModelMeanType": {1: "previous_x", 2: "start_x", 3: "epsilon"},
    "ModelVarType": {1: "learned", 2: "fixed_small", 3: "fixed_large", 4: "learned_range"},
}
"""guided-diffusion's enums, by class and number."""

_SCHEDULES = {
    **{name: name for name in get_args(BetaSchedule)},
    "cosine": "squaredcos_cap_v2",
    "squaredcos": "squaredcos_cap_v2",
}

_NOT_FOLLOWED = {
    "predicts something else than the noise": (
        "predict_xstart predict_x0 predict_v v_prediction use_flow_sigmas"
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

NOT_FOLLOWED_ENTRIES = {
    name: reason for reason, names in _NOT_FOLLOWED.items() for name in names.split()
}

FLOW_ENTRIES = ("flow_matching", "rectified_flow", "use_flow_matching")
"""Entries that say so where they are set."""

_FLOW_NAMES = re.compile(r"sit(?![a-z])|.*flow", re.IGNORECASE)
"""Models that are trained by flow matching, and have a DiT's tensors."""

_FLOW_MODULES = re.compile(r"flow_?match|rectified_?flow", re.IGNORECASE)
"""Modules of such."""


class NotFollowedError(Exception):
    """A record of something that is not followed; the message goes on after "the model"."""


_Reader = Callable[[str, Any], Mapping[str, Any]]
"""From an entry's name and value to fields; raises ValueError with what was expected."""


_TOO_LARGE = 2**63
"""Whole numbers that no field has, and no float may hold."""


def _as_number(value: Any) -> int | float | None:
    """Return a number, a whole one as an int, written as text or not; None for all else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if abs(value) < _TOO_LARGE or isinstance(value, float) else None


def _whole(field: str, *, least: int = 1) -> _Reader:
    def read(_name: str, value: Any) -> Mapping[str, Any]:
        value = _as_number(value)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"expected a whole number of {least} or more")
        return {field: value}

    return read


def _number(field: str) -> _Reader:
    def read(_name: str, value: Any) -> Mapping[str, Any]:
        value = _as_number(value)
        if not isinstance(value, int | float):
            raise TypeError("expected a number")
        if not math.isfinite(value):
            raise ValueError("expected a finite number")
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
        if isinstance(value, str) and re.fullmatch(r"\d+x\d+", value):
            value = value.split("x")
        if isinstance(value, list | tuple) and len(value) == 2:
            if value[0] != value[1]:
                raise NotFollowedError("has a grid that is not square")
            value = value[0]
        return one(name, value)

    return read


def _label_dropout(_name: str, value: Any) -> Mapping[str, Any]:
    share = int(value) if isinstance(value, bool) else _as_number(value)
    if share is None or not 0 <= share <= 1:
        raise ValueError("expected a share between 0 and 1")
    return {"null_row": share > 0}


def _schedule(_name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, str) or value not in _SCHEDULES:
        raise NotFollowedError(
            f"was trained on another noise schedule than {', '.join(_SCHEDULES)}"
        )
    return {"beta_schedule": _SCHEDULES[value]}


def _steps_if_whole(name: str, value: Any) -> Mapping[str, Any]:
    """`timesteps`, which are those of the schedule, or a list of those to take."""
    is_whole = isinstance(_as_number(value), int)
    return _whole("train_timesteps", least=2)(name, value) if is_whole else {}


def _member(value: Any) -> Any:
    """Return the name of a member of guided-diffusion's enums, which a pickle numbers."""
    if isinstance(value, Inert) and len(value.args) == 1:
        members = _MEMBERS.get(value.name.rpartition(".")[2], {})
        return members.get(value.args[0], value)
    return value.lower() if isinstance(value, str) else value


def _prediction(_name: str, value: Any) -> Mapping[str, Any]:
    if (name := str(_member(value))) not in _PREDICTIONS:
        raise NotFollowedError("predicts something else than the noise")
    return {"prediction": _PREDICTIONS[name]}


def _objective(name: str, value: Any) -> Mapping[str, Any]:
    """What is predicted, or what a search of hyperparameters does with a number."""
    return {} if value in ("minimize", "maximize", "min", "max") else _prediction(name, value)


def _is_set(value: Any) -> bool:
    """Return whether an entry says yes: anything but zeros and nothing."""
    return bool(value.numel() if isinstance(value, Tensor) else value)


def _refused(name: str, value: Any) -> Mapping[str, Any]:
    if _is_set(value):
        raise NotFollowedError(NOT_FOLLOWED_ENTRIES[name])
    return {}


def _flow(_name: str, value: Any) -> Mapping[str, Any]:
    return {"flow": True} if _is_set(value) else {}


def _path_type(_name: str, value: Any) -> Mapping[str, Any]:
    """The path of a flow, as SiT ("Linear") and REPA ("linear") call it."""
    if not _is_set(value):
        return {}
    if not isinstance(value, str) or value.lower() != "linear":
        raise NotFollowedError("was trained on another path from noise to data than a straight one")
    return {"flow": True}


def _family(_name: str, value: Any) -> Mapping[str, Any]:
    if value not in get_args(FamilyChoice):
        raise NotFollowedError(f"is of another family than {', '.join(get_args(FamilyChoice))}")
    return {"family": value}


def _variance(_name: str, value: Any) -> Mapping[str, Any]:
    if (value := _member(value)) not in get_args(Variance):
        raise NotFollowedError(f"has another kind of variance than {', '.join(get_args(Variance))}")
    return {"variance": value}


def _sigma_small(_name: str, value: Any) -> Mapping[str, Any]:
    return {"fixed_variance": "fixed_small" if value else "fixed_large"}


def _model_name(_name: str, value: Any) -> Mapping[str, Any]:
    """The size of a name such as DiT-XL/2, and whether it is a flow's; other names say nothing."""
    if not isinstance(value, str):
        return {}
    flow = _flow(_name, _FLOW_NAMES.match(value))
    match = re.fullmatch(r"[DS]iT-(\w+)/(\d+)", value)
    if match is None or match[1] not in SIZES:
        return flow
    size = SIZES[match[1]]
    return {
        **flow,
        "depth": size.depth,
        "hidden_size": size.hidden_size,
        "patch_size": int(match[2]),
        "named_heads": size.num_heads,
    }


def _class_name(_name: str, value: Any) -> Mapping[str, Any]:
    """The class that a part configures; it says something where it is one of flow matching."""
    path = value if isinstance(value, str) else ""
    return _flow(_name, _FLOW_NAMES.match(path.rpartition(".")[2]) or _FLOW_MODULES.search(path))


def _vae(_name: str, value: Any) -> Mapping[str, Any]:
    """Factors; a name, as DiT's training takes, or an architecture says none."""
    if not isinstance(value, Mapping) or value.get("scaling_factor") is None:
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
    "prediction prediction_type pred_type parameterization model_mean_type": _prediction,
    "objective": _objective,
    "path_type": _path_type,
    "family": _family,
    "variance variance_type var_type model_var_type": _variance,
    "sigma_small": _sigma_small,
    "rescale_timesteps": _flag("rescale_timesteps"),
    "model model_name model_type arch": _model_name,
    "vae": _vae,
    " ".join(CLASS_ENTRIES): _class_name,
    " ".join(FLOW_ENTRIES): _flow,
    " ".join(NOT_FOLLOWED_ENTRIES): _refused,
}
"""Names under which records say something, and what reads them."""

READERS: Mapping[str, _Reader] = {
    name: reader for names, reader in _ENTRIES.items() for name in names.split()
}
