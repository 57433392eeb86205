"""What a checkpoint says about itself: followed, held against its tensors, or refused by name."""

from __future__ import annotations

import argparse
import enum
import json
import shutil
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import pytest
import torch
from conftest import TINY, random_dit
from reference.published_ddpm import cosine_betas, linear_betas, scaled_linear_betas
from safetensors.torch import save_file
from test_checkpoint import INPUTS, diffusers_model, edit_json, refusal
from torch import Tensor

from ditas_export.dit.model import DiT, DiTConfig, sincos_table
from ditas_export.families.load import BUNDLED_MODEL, load_model
from ditas_export.options import CheckpointHints
from ditas_export.process import DIT_PROCESS, Process, VaeFactors

State = dict[str, Tensor]

SMALL = DiTConfig(
    input_size=8, patch_size=4, hidden_size=384, depth=12, num_heads=6, mlp_ratio=0.25,
    num_classes=1,
)  # fmt: skip
"""Depth and width of DiT-S."""


@pytest.fixture(scope="module")
def state() -> State:
    return dict(random_dit().state_dict())


def written(path: Path, state: Mapping[str, Tensor], **args: Any) -> Path:
    """Write a training checkpoint with options."""
    torch.save({"ema": dict(state), "args": argparse.Namespace(**args)}, path)
    return path


def config_of(path: Path, **hints: Any) -> DiTConfig:
    return load_model(path, CheckpointHints(**hints)).model.config


@pytest.fixture
def train(tmp_path: Path, state: State) -> Callable[..., Path]:
    """Write the tiny model with the options given, its heads among them."""

    def write(**args: Any) -> Path:
        return written(tmp_path / "train.pt", state, **{"num_heads": 4, **args})

    return write


# --- Where records stand ------------------------------------------------------------------------


@dataclass
class Options:
    num_heads: int = 12


class OmegaNode:
    """As OmegaConf's containers pickle themselves."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


@dataclass(slots=True)
class Slotted:
    num_heads: int = 12


class Unnamed(NamedTuple):
    """A pickle has its values alone."""

    num_heads: int = 12


class Entries(dict[str, Any]):
    """A dict of a class of its own."""


class MmDict(dict[str, Any]):
    """As mmengine's containers pickle themselves."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return (MmDict, (dict(self),), None, None, None)


class MmConfig:
    """The same of its files."""

    def __init__(self) -> None:
        self._cfg_dict = MmDict(model=MmDict(num_heads=12))

    def __getstate__(self) -> Any:
        return (self._cfg_dict, "config.py", "text", {})


FORMS: dict[str, dict[str, Any]] = {
    "Namespace": {"args": argparse.Namespace(num_heads=12)},
    "dict": {"args": {"num_heads": 12}},
    "SimpleNamespace": {"args": types.SimpleNamespace(num_heads=12)},
    "dataclass": {"args": Options()},
    "hyper_parameters": {"hyper_parameters": {"model": {"params": {"num_heads": 12}}}},
    "config": {"config": {"network": {"n_heads": 12}, "vae": {"num_heads": 1}}},
    "OmegaConf": {"cfg": OmegaNode(_content={"num_heads": OmegaNode(_val=12)}, _metadata=None)},
    "beside": {"num_heads": 12},
    "model_config": {"config": {"model_config": {"num_heads": 12}}},
    "args in args": {"config": {"model": {"args": {"num_heads": 12}}}},
    "cfg in hyper_parameters": {"hyper_parameters": {"cfg": {"num_heads": 12}}},
    "deep": {"hyper_parameters": {"config": {"model": {"params": {"num_heads": 12}}}}},
    "JSON": {"args": json.dumps({"num_heads": 12})},
    "words": {"args": ["train.py", "--num-heads", "12", "--quiet"]},
    "one word": {"argv": ["--num-heads=12"]},
    "overrides": {"overrides": ["model.num_heads=12", "+data.num_heads=3"]},
    "dashes": {"args": {"num-heads": 12}},
    "dots": {"cfg": {"model.num_heads": 12, "vae.num_heads": 1}},
    "any name": {"opt": argparse.Namespace(num_heads=12)},
    "list": {"settings": [{"name": "x"}, {"num_heads": 12}]},
    "ConfigDict": {"flags": OmegaNode(_fields={"num_heads": 12}, _locked=True)},
    "mmengine": {"cfg": MmConfig()},
    "older mmengine": {"cfg": OmegaNode(_cfg_dict=Entries(num_heads=12))},
    "pydantic": {"cfg": OmegaNode(**{"__dict__": {"num_heads": 12}, "__pydantic_extra__": None})},
    "slots": {"args": Slotted()},
    "float": {"args": {"num_heads": 12.0}},
    "text": {"args": {"num_heads": "12"}},
    "tensor": {"args": {"num_heads": torch.tensor(12)}},
    "array": {"args": {"num_heads": 12, "patch_size": np.array([2, 2])}},
    "agreeing": {"args": {"num_heads": 12}, "settings": {"model": {"n_heads": 12}}},
    "of other things": {
        "args": {"num_heads": 12, "text_encoder": {"num_heads": 1}, "ema": {"num_heads": 1}},
        "optimizer": {"param_groups": [{"num_heads": 1, "betas": [0.9, 0.95]}], "state": {}},
        "opt": {"param_groups": [{"num_heads": 1}], "state": {0: {"num_heads": 1}}},
        "config": {
            "classifier": {"num_classes": 3},
            "data": {"num_classes": 3, "image_size": 7},
            "first_stage_config": {"params": {"num_heads": 1}},
            "stage": {"target": "ldm.models.AutoencoderKL", "params": {"in_channels": 9}},
            "discriminator.num_heads": 1,
            "sampler": {"num_timesteps": 50},
        },
    },
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_records_are_found_where_training_leaves_them(
    tmp_path: Path, state: State, form: dict[str, Any]
) -> None:
    torch.save({"model": state, **form}, tmp_path / "dit.pt")
    assert config_of(tmp_path / "dit.pt").num_heads == 12
    message = refusal(tmp_path / "dit.pt", num_heads=6)
    assert "gives num_heads 12, --num-heads gives 6; leave the option out" in message
    assert config_of(tmp_path / "dit.pt", num_heads=12).num_heads == 12


DISTANT: dict[str, dict[str, Any]] = {
    "training": {"cfg": {"training": {"prediction_type": "v_prediction"}}},
    "loss": {"config": {"loss": {"prediction": "velocity"}}},
    "scheduler": {"config": {"scheduler": {"_target_": "FlowMatchEulerDiscreteScheduler"}}},
    "class": {"config": {"model": {"_target_": "models.sit.SiT"}}},
    "module": {"hparams": {"model": {"class_path": "flow_matching.models.DiT"}}},
    "path": {"train_args": {"transport": {"path-type": "Linear"}}},
}


@pytest.mark.parametrize("form", DISTANT.values(), ids=DISTANT)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_what_is_not_followed_is_refused_wherever_it_stands(
    tmp_path: Path, state: State, form: dict[str, Any], suffix: str
) -> None:
    path = tmp_path / f"dit.{suffix}"
    if suffix == "pt":
        torch.save({"ema": state, **form}, path)
    else:
        save_file(state, path, metadata={name: json.dumps(each) for name, each in form.items()})
    assert "the model predicts something else than the noise" in refusal(path, num_heads=4)


def test_metadata_have_parts_too(tmp_path: Path, state: State) -> None:
    path = tmp_path / "dit.safetensors"
    metadata = {
        "config": json.dumps({"model": {"num_heads": 12}}),
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
    }
    save_file(state, path, metadata=metadata)
    assert config_of(path).num_heads == 12
    assert "metadata config.model.num_heads gives num_heads 12" in refusal(path, num_heads=6)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"args": Unnamed()}, "not used: args"),
        ({"args": {"lr": 1e-4}}, "not used: args"),
        ({"config": "model: {num_heads: 12}"}, "not used: config"),
        ({"settings": {"num_heads": 4}, "epoch": 3}, "not used: epoch"),
        ({"vae": {"decoder.weight": torch.ones(2)}}, "not used: vae"),
    ],
)
def test_parts_that_say_nothing_are_said(
    tmp_path: Path, state: State, form: dict[str, Any], said: str
) -> None:
    torch.save({"ema": state, **form}, tmp_path / "dit.pt")
    assert said in load_model(tmp_path / "dit.pt", num_heads=4).notes


def test_records_of_two_parts_that_differ_are_named(tmp_path: Path, state: State) -> None:
    content = {"ema": state, "args": {"num_heads": 4}, "train_args": ["--num-heads", "6"]}
    torch.save(content, tmp_path / "dit.pt")
    message = "args.num_heads gives num_heads 4, train_args.num_heads gives 6; correct the record"
    assert message in refusal(tmp_path / "dit.pt")


def test_a_record_wins_over_the_published_size_and_the_one_it_names(tmp_path: Path) -> None:
    """The shape of DiT-S with other heads than its."""
    state = DiT(SMALL).state_dict()
    for args in ({}, {"model": "DiT-S/4"}):
        path = written(tmp_path / "dit.pt", state, num_heads=12, **args)
        assert config_of(path).num_heads == 12
    path = written(tmp_path / "dit.pt", state, model="DiT-S/4")
    assert config_of(path).num_heads == 6
    assert "args.model gives num_heads 6, --num-heads gives 12" in refusal(path, num_heads=12)


def test_a_record_that_contradicts_itself_is_named(train: Callable[..., Path]) -> None:
    message = refusal(train(n_heads=12))
    assert "args.num_heads gives num_heads 4, args.n_heads gives 12; correct the record" in message


SHAPED: dict[str, tuple[dict[str, Any], str]] = {
    "depth": ({"depth": 3}, r"depth 3 (args.depth), but 2 by shape"),
    "width": ({"hidden_size": 64}, "hidden_size 64 (args.hidden_size), but 48 by shape"),
    "patch": ({"patch_size": 4}, "patch_size 4 (args.patch_size), but 2 by shape"),
    "channels": ({"in_channels": 3}, "in_channels 3 (args.in_channels), but 4 by shape"),
    "mlp": ({"mlp_ratio": 3}, "mlp_ratio 3.0 (args.mlp_ratio), but 4.0 by shape"),
    "variance": ({"learn_sigma": False}, "learn_sigma False (args.learn_sigma), but True by shape"),
    "name": ({"model": "DiT-XL/2"}, "hidden_size 1152 (args.model), but 48 by shape; depth 28"),
    "classes": ({"num_classes": 1000}, "1000 classes (args.num_classes), but a label table of 11"),
    "dropout": (
        {"num_classes": 10, "class_dropout_prob": 0},
        "10 classes (args.num_classes) and no null row (args.class_dropout_prob), but a label",
    ),
    "input": ({"input_size": 16}, "input_size 16 (args.input_size), but 8 by shape"),
    "image": ({"image_size": 72}, "images of 72 pixels (args.image_size), but pos_embed is for"),
}


@pytest.mark.parametrize(("args", "message"), SHAPED.values(), ids=SHAPED)
def test_shapes_are_not_overruled(
    train: Callable[..., Path], args: dict[str, Any], message: str
) -> None:
    found = refusal(train(**args))
    assert "record and tensors disagree: " in found
    assert message in found


def test_what_training_says_is_loaded(train: Callable[..., Path]) -> None:
    """The options of the published training script, and more."""
    path = train(
        data_path="imagenet", image_size=64, num_classes=10, vae="ema", class_dropout_prob=0.1,
        learn_sigma=True, noise_schedule="cosine", diffusion_steps=4000, depth=2, patch_size=[2, 2],
        predict_xstart=False, prediction_type="eps", model="mine", betas=[0.9, 0.95],
    )  # fmt: skip
    process = Process(beta_schedule="squaredcos_cap_v2", train_timesteps=4000)
    loaded = load_model(path)
    assert loaded.model.config == replace(TINY, process=process)
    assert loaded.notes == ()


def test_metadata_say_every_field_that_tensors_leave_open(tmp_path: Path, state: State) -> None:
    config = replace(
        TINY,
        num_heads=6,
        layer_norm_eps=1e-5,
        mlp_norm_eps=1e-4,
        frequency_shift=1,
        num_classes=11,
        null_row=False,
        process=Process(
            beta_schedule="scaled_linear",
            beta_start=0.001,
            beta_end=0.01,
            train_timesteps=500,
            variance="fixed_small",
            vae=VaeFactors(scaling_factor=0.5, shift_factor=0.1),
        ),
    )
    values = config.to_dict() | config.to_dict()["process"]
    del values["process"]
    metadata = {name: json.dumps(value) for name, value in values.items()} | {"format": "pt"}
    save_file(state, tmp_path / "dit.safetensors", metadata=metadata)
    assert load_model(tmp_path / "dit.safetensors").model.config == config


# --- What is not followed -----------------------------------------------------------------------

REFUSED: dict[str, dict[str, Any]] = {
    "path": {"path_type": "GVP"},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "flow": {"prediction_type": "flow_prediction"},
    "x0": {"predict_xstart": True},
    "LDM": {"parameterization": "x0"},
    "objective": {"objective": "pred_v"},
    "zero SNR": {"rescale_betas_zero_snr": True},
    "betas": {"trained_betas": [0.1, 0.2]},
    "schedule": {"noise_schedule": "sigmoid"},
    "variance": {"variance_type": "learned"},
    "rope": {"use_rope": True},
    "grid": {"input_size": [8, 32]},
    "image": {"image_size": (64, 256)},
    "list": {"prediction": ["v"]},
    "schedules": {"noise_schedule": ["linear"]},
    "scaled steps": {"rescale_timesteps": True, "diffusion_steps": 4000},
}


@pytest.mark.parametrize("args", REFUSED.values(), ids=REFUSED)
def test_what_is_not_followed_is_refused_by_name(
    train: Callable[..., Path], args: dict[str, Any]
) -> None:
    message = refusal(train(**args))
    assert ", which is not followed (yet)" in message
    assert any(f"args.{name}=" in message for name in args)


class ModelMeanType(enum.Enum):
    """As guided-diffusion's."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The same of its variances."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class Named(enum.Enum):
    """One whose values are text."""

    EPSILON = "epsilon"
    V = "v"


def test_members_of_enums_are_read_by_number(train: Callable[..., Path]) -> None:
    for member in (ModelMeanType.EPSILON, Named.EPSILON, "EPSILON"):
        assert config_of(train(model_mean_type=member)).process == DIT_PROCESS
    for odd in (ModelMeanType.START_X, ModelMeanType.PREVIOUS_X, Named.V):
        message = refusal(train(model_mean_type=odd))
        assert "the model predicts something else than the noise" in message
    assert config_of(train(model_var_type=ModelVarType.LEARNED_RANGE)).process == DIT_PROCESS
    message = refusal(train(model_var_type=ModelVarType.LEARNED))
    assert "args.model_var_type=test_records.ModelVarType(1): the model has another kind" in message


def test_steps_of_a_thousand_are_not_rescaled(train: Callable[..., Path]) -> None:
    assert config_of(train(rescale_timesteps=True, diffusion_steps=1000)).process == DIT_PROCESS
    assert config_of(train(rescale_timesteps=False)).process == DIT_PROCESS


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_classes": "many"}, "args.num_classes='many'; expected a whole number of 0 or more"),
        ({"class_dropout_prob": 3}, "args.class_dropout_prob=3; expected a share between 0 and 1"),
        ({"learn_sigma": 1}, "args.learn_sigma=1; expected true or false"),
        ({"beta_start": "x"}, "args.beta_start='x'; expected a number"),
        (
            {"beta_end": 2.0},
            "train.pt: beta_end=2.0; expected a number, more than 0, and 1 at most; correct "
            "args.beta_end",
        ),
        ({"beta_end": float("nan")}, "train.pt: args.beta_end=nan; expected a finite number"),
        ({"beta_end": 10**400}, "; expected a number"),
        ({"num_heads": True}, "args.num_heads=True; expected a whole number of 1 or more"),
        ({"num_heads": 4.5}, "args.num_heads=4.5; expected a whole number of 1 or more"),
        (
            {"num_heads": 5},
            "train.pt: hidden_size=48 is no multiple of num_heads=5 (args.num_heads); correct the "
            "record",
        ),
        (
            {"layer_norm_eps": -1.0},
            "train.pt: layer_norm_eps=-1.0; expected a number, more than 0, and 1 at most; correct "
            "args.layer_norm_eps",
        ),
        (
            {"vae": {"scaling_factor": 0.0}},
            "train.pt: args.vae: scaling_factor=0.0; expected a number, more than 0, and 1e+06 at "
            "most; correct the record",
        ),
        ({"diffusion_steps": 1}, "args.diffusion_steps=1; expected a whole number of 2 or more"),
    ],
)
def test_values_of_no_kind_are_named(
    train: Callable[..., Path], args: dict[str, Any], message: str
) -> None:
    assert message in refusal(train(**args))


def test_names_mean_what_their_code_bases_mean(train: Callable[..., Path]) -> None:
    """OpenAI's linear betas are in proportion to the steps; latent diffusion's in the root."""
    openai = config_of(train(noise_schedule="linear", diffusion_steps=4000)).process
    assert (openai.beta_start, openai.beta_end) == (0.1 / 4000, 20 / 4000)
    latent = config_of(train(linear_start=0.0015, linear_end=0.0195, timesteps=1000)).process
    assert latent == Process(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    assert config_of(train(timesteps=[999, 0])).process == DIT_PROCESS


TABLES: dict[str, tuple[np.ndarray, Process | None]] = {
    "linear": (linear_betas(1e-4, 0.02, 1000), DIT_PROCESS),
    "latent diffusion": (
        scaled_linear_betas(0.0015, 0.0195, 1000),
        Process(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195),
    ),
    "cosine": (
        cosine_betas(4000),
        Process(beta_schedule="squaredcos_cap_v2", train_timesteps=4000),
    ),
    "sigmoid": (1 / (1 + np.exp(-np.linspace(-6, 6, 1000))) * 0.0199 + 1e-4, None),
    "zero SNR": (np.append(linear_betas(1e-4, 0.02, 999), 1.0), None),
}


def products(betas: np.ndarray) -> np.ndarray:
    return np.cumprod(1 - betas)


def wrapped(state: State, table: Any) -> dict[str, Any]:
    """As GaussianDiffusion and latent diffusion's modules keep it."""
    content = {f"model.{name}": tensor for name, tensor in state.items()}
    return {"state_dict": {**content, "betas": torch.from_numpy(table).float()}}


PLACES: dict[str, tuple[str, Callable[[State, np.ndarray], dict[str, Any]]]] = {
    "wrapper": ("betas", wrapped),
    "beside": (
        "betas",
        lambda state, betas: {"model": state, "betas": torch.from_numpy(betas).float()},
    ),
    "dotted": (
        "diffusion.betas",
        lambda state, betas: {"model": state, "diffusion.betas": torch.from_numpy(betas)},
    ),
    "part": (
        "diffusion.betas",
        lambda state, betas: {"model": state, "diffusion": {"betas": torch.from_numpy(betas)}},
    ),
    "NumPy": ("betas", lambda state, betas: {"model": state, "betas": betas}),
    "NumPy, float32": (
        "betas",
        lambda state, betas: {"model": state, "betas": betas.astype(np.float32)},
    ),
    "list": ("betas", lambda state, betas: {"model": state, "betas": betas.tolist()}),
    "products": (
        "alphas_cumprod",
        lambda state, betas: {"model": state, "alphas_cumprod": products(betas)},
    ),
    "float32 products": (
        "alphas_cumprod",
        lambda state, betas: {
            "model": state,
            "alphas_cumprod": torch.from_numpy(1 - betas).float().cumprod(dim=0),
        },
    ),
    "both": (
        "betas",
        lambda state, betas: {"model": state, "betas": betas, "alphas_cumprod": products(betas)},
    ),
}
"""Where a table lies: its name in messages, and the checkpoint."""


@pytest.mark.parametrize(("name", "content"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize(("betas", "expected"), TABLES.values(), ids=TABLES)
def test_a_table_of_the_schedule_is_a_record(
    tmp_path: Path,
    state: State,
    name: str,
    content: Callable[[State, np.ndarray], dict[str, Any]],
    betas: np.ndarray,
    expected: Process | None,
) -> None:
    path = tmp_path / "dit.ckpt"
    torch.save({**content(state, betas), "args": {"num_heads": 4}}, path)
    if expected is not None:
        loaded = load_model(path)
        assert loaded.model.config.process == expected
        assert f"not used: {name}" not in loaded.notes
        message = refusal(path, hints=CheckpointHints(betas="linear,0.001,0.01,50"))
        assert f"{name} gives" in message
        assert "--betas gives" in message
    else:
        assert "a noise schedule that is not followed (yet); expected linear" in refusal(path)


# --- Hints --------------------------------------------------------------------------------------


def test_hints_say_what_nothing_records(tmp_path: Path, state: State) -> None:
    path = tmp_path / "dit.pt"
    torch.save(state, path)
    told = {"num_heads": 4}
    assumed = load_model(path, CheckpointHints(**told))
    assert (assumed.model.config.num_classes, assumed.model.config.null_row) == (10, True)
    assert "the last of the 11 rows of its label table is taken" in " ".join(assumed.notes)
    for hints, classes, null_row in (
        ({"num_classes": 10}, 10, True),
        ({"num_classes": 11}, 11, False),
        ({"no_null_class": True}, 11, False),
        ({"no_null_class": True, "num_classes": 11}, 11, False),
    ):
        loaded = load_model(path, CheckpointHints(**told, **hints))
        assert (loaded.model.config.num_classes, loaded.model.config.null_row) == (
            classes,
            null_row,
        )
    assert config_of(path, **told, betas="linear,0.001,0.01,500").process == Process(
        beta_start=0.001, beta_end=0.01, train_timesteps=500
    )
    cosine = Process(beta_schedule="squaredcos_cap_v2")
    assert config_of(path, **told, betas="squaredcos_cap_v2").process == cosine
    longer = replace(cosine, train_timesteps=4000)
    assert config_of(path, **told, betas="squaredcos_cap_v2,,,4000").process == longer


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"num_classes": 12}, "12 classes (--num-classes), but a label table of 11 rows"),
        ({"num_classes": 10, "no_null_class": True}, "no null row (--no-null-class), but a label"),
        ({"num_classes": -1}, "--num-classes -1; expected 0 or more"),
        ({"betas": "sigmoid"}, "expected NAME[,START,END[,STEPS]], NAME one of linear, scaled"),
        ({"betas": "linear,1"}, "--betas linear,1; expected NAME[,START,END[,STEPS]]"),
        ({"betas": "linear,a,b"}, "--betas linear,a,b; expected NAME[,START,END[,STEPS]]"),
        ({"betas": "linear,nan,0.02"}, "--betas linear,nan,0.02; expected NAME[,START"),
        ({"betas": "squaredcos_cap_v2,0.1,0.2"}, "START and END empty for the last"),
        ({"betas": "scaled_linear"}, "scaled_linear has no usual ends; add START,END"),
        ({"betas": "linear,0.02,0.0001"}, "betas from 0.02 to 0.0001; expected"),
    ],
)
def test_impossible_hints(
    tmp_path: Path, state: State, hints: dict[str, Any], message: str
) -> None:
    torch.save(state, tmp_path / "dit.pt")
    assert message in refusal(tmp_path / "dit.pt", hints=CheckpointHints(num_heads=4, **hints))


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"num_classes": 9}, "args.num_classes gives num_classes 10, --num-classes gives 9"),
        ({"no_null_class": True}, "null_row True, --no-null-class gives False"),
        (
            {"betas": "squaredcos_cap_v2"},
            "beta_schedule 'linear', --betas gives 'squaredcos_cap_v2",
        ),
        ({"betas": "linear,0.1,0.2"}, "beta_start 0.0001, --betas gives 0.1"),
    ],
)
def test_hints_against_a_record_name_both(
    train: Callable[..., Path], hints: dict[str, Any], message: str
) -> None:
    path = train(
        num_classes=10, class_dropout_prob=0.1, beta_schedule="linear", beta_start=1e-4,
        beta_end=0.02, diffusion_steps=1000,
    )  # fmt: skip
    found = refusal(path, hints=CheckpointHints(**hints))
    assert message in found
    assert found.endswith("leave the option out")
    assert config_of(path, num_classes=10, betas="linear,0.0001,0.02,1000") == TINY


def test_the_bundled_model_says_its_classes() -> None:
    assert load_model(BUNDLED_MODEL).notes == ()
    message = refusal(BUNDLED_MODEL, hints=CheckpointHints(no_null_class=True))
    assert (
        "10 classes (the package) and no null row (--no-null-class), but a label table" in message
    )


# --- Classes, variance --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "args", "said"),
    [
        (replace(TINY, num_classes=11, null_row=False), {"num_classes": 11}, "has no null row"),
        (replace(TINY, num_classes=11, null_row=False), {"class_dropout_prob": 0.0}, ""),
        (replace(TINY, num_classes=1), {"num_classes": 1}, ""),
        (replace(TINY, num_classes=1, null_row=False), {"num_classes": 1}, "has no null row"),
        (replace(TINY, num_classes=0), {}, "one row: a model without classes"),
        (replace(TINY, num_classes=0), {"num_classes": 0}, ""),
    ],
    ids=["no null row", "no dropout", "one class", "one class alone", "no class", "none, told"],
)
def test_states_of_the_label_table(
    tmp_path: Path, config: DiTConfig, args: dict[str, Any], said: str
) -> None:
    state = random_dit(config).state_dict()
    loaded = load_model(written(tmp_path / "dit.pt", state, num_heads=4, **args))
    assert loaded.model.config == config
    assert said in " ".join(loaded.notes)
    assert bool(said) == bool(loaded.notes)


def test_a_model_without_label_table_is_one_of_a_row_of_zeros(tmp_path: Path) -> None:
    config = replace(TINY, num_classes=0)
    model = random_dit(config)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight.zero_()
    state = model.state_dict()
    del state["y_embedder.embedding_table.weight"]
    loaded = load_model(written(tmp_path / "dit.pt", state, num_heads=4))
    assert loaded.model.config == config
    assert any("it has no label table: a model without classes" in note for note in loaded.notes)
    latents, timesteps, _ = INPUTS
    labels = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(loaded.model(latents, timesteps, labels), model(latents, timesteps, labels))
    message = refusal(written(tmp_path / "dit.pt", state, num_heads=4, num_classes=10))
    assert "10 classes (args.num_classes), but no label table" in message


@pytest.mark.parametrize(
    ("args", "variance"),
    [
        ({}, "fixed_large"),
        ({"sigma_small": True}, "fixed_small"),
        ({"sigma_small": False}, "fixed_large"),
        ({"variance_type": "fixed_small"}, "fixed_small"),
        ({"variance_type": "fixed_small", "sigma_small": True}, "fixed_small"),
    ],
)
def test_outputs_without_variance(tmp_path: Path, args: dict[str, Any], variance: str) -> None:
    process = replace(DIT_PROCESS, variance=variance)
    config = replace(TINY, learn_sigma=False, process=process)
    state = random_dit(config).state_dict()
    path = written(tmp_path / "dit.pt", state, num_heads=4, num_classes=10, **args)
    assert load_model(path).model.config == config
    path = written(tmp_path / "dit.pt", state, num_heads=4, variance_type="learned_range")
    assert "variance learned_range (args.variance_type), but the output has 4" in refusal(path)


def test_two_names_of_a_fixed_variance_that_differ(tmp_path: Path) -> None:
    state = random_dit(
        replace(TINY, learn_sigma=False, process=replace(DIT_PROCESS, variance="fixed_small"))
    ).state_dict()
    args = {"num_heads": 4, "sigma_small": True, "variance": "fixed_large"}
    message = refusal(written(tmp_path / "dit.pt", state, **args))
    assert "args.variance gives variance 'fixed_large', args.sigma_small gives 'fixed_sm" in message
    assert message.endswith("correct the record")


# --- Positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 16), (16, 1)])
def test_a_table_of_another_grid_is_refused_by_name(
    tmp_path: Path, state: State, grid: tuple[int, int], dtype: torch.dtype
) -> None:
    table = sincos_table(48, *grid)
    for each in (table, torch.cat(table.chunk(2, dim=1)[::-1], dim=1)):
        changed = {**state, "pos_embed": each[None].float().to(dtype)}
        torch.save(changed, tmp_path / "dit.pt")
        message = refusal(tmp_path / "dit.pt", num_heads=4)
        rows, columns = sorted(grid)
        assert f"grid of {rows} x {columns} patches" in message or (
            f"grid of {columns} x {rows} patches" in message
        )
        assert "a grid that is not square is not followed (yet)" in message


def test_a_learned_table_is_taken_for_square_and_said(tmp_path: Path, state: State) -> None:
    for table in (torch.randn(1, 16, 48), sincos_table(48, 4, 4)[None].float() + 0.5):
        torch.save({**state, "pos_embed": table}, tmp_path / "dit.pt")
        loaded = load_model(tmp_path / "dit.pt", num_heads=4)
        assert loaded.model.config.input_size == 8
        assert torch.equal(loaded.model.pos_embed, table)
        said = "its pos_embed is a learned one: taken for a square of 4 x 4 patches"
        assert said in loaded.notes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_a_rounded_table_is_still_the_sin_cos_one(
    tmp_path: Path, state: State, dtype: torch.dtype
) -> None:
    torch.save({**state, "pos_embed": state["pos_embed"].to(dtype)}, tmp_path / "dit.pt")
    loaded = load_model(tmp_path / "dit.pt", CheckpointHints(num_heads=4, num_classes=10))
    assert loaded.notes == ()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.randn(1, 17, 48), "pos_embed has 17 tokens, which make no square"),
        (torch.randn(16, 48), r"pos_embed is (16, 48); expected a table of (1, tokens, width)"),
        (torch.zeros(1, 0, 48), r"pos_embed is (1, 0, 48); expected"),
    ],
)
def test_tables_of_no_square(tmp_path: Path, state: State, table: Tensor, message: str) -> None:
    torch.save({**state, "pos_embed": table}, tmp_path / "dit.pt")
    assert message in refusal(tmp_path / "dit.pt", num_heads=4)


@pytest.mark.parametrize("args", [{"input_size": 8}, {"image_size": 64}, {"latent_size": [8, 8]}])
def test_a_table_that_is_not_there_is_computed(
    tmp_path: Path, state: State, args: dict[str, Any]
) -> None:
    rest = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    loaded = load_model(written(tmp_path / "dit.pt", rest, num_heads=4, **args))
    assert torch.equal(loaded.model.pos_embed, state["pos_embed"])
    assert "it has no pos_embed: the sin-cos table is computed" in loaded.notes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"input_size": 10**6}, "args.input_size gives inputs of 1000000 pixels a side; expected"),
        ({"image_size": 10**8}, "args.image_size gives inputs of 12500000 pixels a side; expected"),
        ({"image_size": 4}, "args.image_size gives inputs of 0 pixels a side; expected 1 to 2048"),
        (
            {"input_size": 7},
            "dit.pt: input_size=7 is no multiple of patch_size=2; correct args.input_size",
        ),
    ],
)
def test_sizes_of_which_no_table_is_computed(
    tmp_path: Path, state: State, args: dict[str, Any], message: str
) -> None:
    rest = {name: tensor for name, tensor in state.items() if name != "pos_embed"}
    assert message in refusal(written(tmp_path / "dit.pt", rest, num_heads=4, **args))


# --- Pipelines ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transformer")
    diffusers_model().save_pretrained(folder)
    return folder


@pytest.fixture
def pipeline(tmp_path: Path, transformer: Path) -> Path:
    """A pipeline's folder with a transformer alone."""
    (tmp_path / "transformer").symlink_to(transformer)
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

FOLLOWED: dict[str, tuple[Any, Process]] = {
    "DDIM": (diffusers.DDIMScheduler(), DIT_PROCESS),
    "DDIM, scaled": (diffusers.DDIMScheduler(**SCALED), Process(**SCALED)),
    "DPM++": (diffusers.DPMSolverMultistepScheduler(**COSINE), Process(**COSINE)),
    "DDPM": (diffusers.DDPMScheduler(), Process(variance="fixed_small")),
    "DDPM, learned": (
        diffusers.DDPMScheduler(variance_type="learned_range", num_train_timesteps=500),
        Process(train_timesteps=500),
    ),
    "DDPM, large": (
        diffusers.DDPMScheduler(variance_type="fixed_large", **COSINE),
        Process(variance="fixed_large", **COSINE),
    ),
}


@pytest.mark.parametrize(("scheduler", "process"), FOLLOWED.values(), ids=FOLLOWED)
def test_a_pipeline_s_scheduler_is_followed(
    pipeline: Path, scheduler: Any, process: Process
) -> None:
    scheduler.save_pretrained(pipeline / "scheduler")
    assert config_of(pipeline).process == process
    assert config_of(pipeline / "transformer").process == process


def test_gaps_are_filled_as_the_class_does(pipeline: Path) -> None:
    (pipeline / "scheduler").mkdir()
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "HeunDiscreteScheduler"}))
    assert config_of(pipeline).process == Process(beta_start=0.00085, beta_end=0.012)
    path.write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    assert config_of(pipeline).process == Process(variance="fixed_small")


SCHEDULERS_REFUSED: dict[str, tuple[Any, str]] = {
    "v": (
        diffusers.DDIMScheduler(prediction_type="v_prediction"),
        "prediction_type='v_prediction'",
    ),
    "x0": (diffusers.DDPMScheduler(prediction_type="sample"), "prediction_type='sample'"),
    "zero SNR": (
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True),
        "rescale_betas_zero_snr=True",
    ),
    "betas": (diffusers.DDPMScheduler(trained_betas=[0.1] * 1000), "trained_betas=[0.1, 0.1"),
    "flow": (
        diffusers.FlowMatchEulerDiscreteScheduler(),
        "describes a FlowMatchEulerDiscreteScheduler, whose process is not followed",
    ),
    "EDM": (diffusers.EDMEulerScheduler(), "describes a EDMEulerScheduler, whose process is not"),
    "sigmoid": (diffusers.DDPMScheduler(beta_schedule="sigmoid"), "beta_schedule='sigmoid'"),
    "learned": (diffusers.DDPMScheduler(variance_type="learned"), "variance_type='learned'"),
    "flow sigmas": (
        diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"
        ),
        "which is not followed",
    ),
}


@pytest.mark.parametrize(
    ("scheduler", "message"), SCHEDULERS_REFUSED.values(), ids=SCHEDULERS_REFUSED
)
def test_a_scheduler_of_another_process_is_refused(
    pipeline: Path, scheduler: Any, message: str
) -> None:
    scheduler.save_pretrained(pipeline / "scheduler")
    found = refusal(pipeline)
    assert message in found
    assert "not followed" in found


def test_clipping_is_said(pipeline: Path) -> None:
    diffusers.DDIMScheduler(clip_sample=True).save_pretrained(pipeline / "scheduler")
    said = "scheduler_config.json has clip_sample=true, which is not followed: x0 is not clipped"
    assert said in load_model(pipeline).notes


def test_options_against_a_pipeline_name_both(pipeline: Path) -> None:
    diffusers.DDIMScheduler().save_pretrained(pipeline / "scheduler")
    message = refusal(pipeline, hints=CheckpointHints(betas="squaredcos_cap_v2"))
    assert "scheduler_config.json beta_schedule gives beta_schedule 'linear', --betas" in message
    message = refusal(pipeline, hints=CheckpointHints(num_classes=9))
    assert "config.json num_embeds_ada_norm gives num_classes 10, --num-classes gives 9" in message
    assert "config.json num_attention_heads gives num_heads 4" in refusal(pipeline, num_heads=2)
    message = refusal(pipeline, hints=CheckpointHints(no_null_class=True))
    assert "10 classes (config.json num_embeds_ada_norm) and no null row (--no-null-cl" in message
    assert message.endswith("leave --no-null-class out")


@pytest.mark.parametrize("out_channels", [4, None])
@pytest.mark.parametrize(
    ("scheduler", "variance"),
    [(None, "fixed_small"), (diffusers.DDPMScheduler(variance_type="fixed_large"), "fixed_large")],
    ids=["no scheduler", "DDPM"],
)
def test_diffusers_without_variance(
    tmp_path: Path, out_channels: int | None, scheduler: Any, variance: str
) -> None:
    model = diffusers_model(out_channels=out_channels)
    model.save_pretrained(tmp_path / "transformer")
    if scheduler is not None:
        scheduler.save_pretrained(tmp_path / "scheduler")
    loaded = load_model(tmp_path).model
    assert (loaded.config.learn_sigma, loaded.config.process.variance) == (False, variance)
    latents, timesteps, labels = INPUTS
    with torch.no_grad():
        expected = model(latents, timestep=timesteps, class_labels=labels).sample
    out = loaded(*INPUTS)
    assert out.shape == (4, 4, 8, 8)
    assert float((out - expected).norm() / expected.norm()) < 1e-6


def test_learned_variance_of_a_scheduler_needs_outputs(tmp_path: Path) -> None:
    diffusers_model(out_channels=4).save_pretrained(tmp_path / "transformer")
    diffusers.DDPMScheduler(variance_type="learned_range").save_pretrained(tmp_path / "scheduler")
    message = refusal(tmp_path)
    assert "variance learned_range (scheduler_config.json variance_type), but the output" in message


@pytest.mark.parametrize(
    ("written", "factors"),
    [
        ({"scaling_factor": 0.13025}, VaeFactors(scaling_factor=0.13025)),
        (
            {"scaling_factor": 0.3611, "shift_factor": 0.1159},
            VaeFactors(scaling_factor=0.3611, shift_factor=0.1159),
        ),
        ({"shift_factor": None}, VaeFactors(scaling_factor=0.18215)),
    ],
)
def test_the_factors_of_a_pipeline_s_vae(
    pipeline: Path, written: dict[str, Any], factors: VaeFactors
) -> None:
    (pipeline / "vae").mkdir()
    content = {"_class_name": "AutoencoderKL", **written}
    (pipeline / "vae" / "config.json").write_text(json.dumps(content))
    loaded = load_model(pipeline)
    assert loaded.model.config.process.vae == factors
    assert loaded.vae == str(pipeline)
    alone = load_model(pipeline / "transformer")
    assert alone.model.config.process.vae == factors
    assert alone.vae == str(pipeline)
    edit_json(pipeline / "vae" / "config.json", scaling_factor="x")
    assert "vae/config.json: scaling_factor='x'; expected a number, more than 0" in refusal(
        pipeline
    )


def test_statistics_of_a_vae_are_said(pipeline: Path) -> None:
    (pipeline / "vae").mkdir()
    content = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5}
    statistics = {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}
    (pipeline / "vae" / "config.json").write_text(json.dumps({**content, **statistics}))
    loaded = load_model(pipeline)
    assert loaded.model.config.process.vae == VaeFactors(scaling_factor=0.5)
    said = "vae/config.json has latents_mean and latents_std: the VAE's decoder applies them"
    assert any(note.startswith(said) for note in loaded.notes)


@pytest.mark.parametrize("link", ["", "linked", "transformer"], ids=["folder", "name", "same name"])
def test_a_transformer_alone_knows_its_pipeline(
    tmp_path: Path, transformer: Path, link: str
) -> None:
    """Without model_index.json, and through a link."""
    pipeline = tmp_path / "pipeline"
    shutil.copytree(transformer, pipeline / "transformer")
    diffusers.DDIMScheduler(**COSINE).save_pretrained(pipeline / "scheduler")
    passed = pipeline / "transformer"
    if link:
        passed = tmp_path / link
        passed.symlink_to(pipeline / "transformer")
    assert config_of(passed).process == Process(**COSINE)
