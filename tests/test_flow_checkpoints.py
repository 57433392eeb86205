"""Checkpoints of SiT and REPA: recognised by what they record, or told by `--family`."""

from __future__ import annotations

import argparse
import importlib.resources
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, random_dit
from flows import State, euler, flow_config, turned
from safetensors.torch import save_file
from test_checkpoint import refusal

from ditas_export.dit.flows import FLOWS
from ditas_export.dit.model import DiT
from ditas_export.families.load import BUNDLED_FLOW, BUNDLED_MODEL, LoadedModel, load_model
from ditas_export.options import CheckpointHints
from ditas_export.process import DIT_PROCESS

SIT_ARGS = {
    "model": "SiT-S/2", "path_type": "Linear", "prediction": "velocity", "loss_weight": None,
    "sample_eps": 1e-3, "train_eps": 1e-5, "vae": "ema", "cfg_scale": 4.0, "num_heads": 4,
}  # fmt: skip
"""What SiT's training script saves of its options; the heads are ours, the size is left out."""

REPA_ARGS = {
    "model": None, "path_type": "linear", "prediction": "v", "weighting": "uniform",
    "enc_type": "dinov2-vit-b", "proj_coeff": 0.5, "encoder_depth": 8, "cfg_prob": 0.1,
    "fused_attn": True, "qk_norm": False, "num_heads": 4,
}  # fmt: skip
"""The same of REPA's."""

PROJECTORS = {f"projectors.0.{layer}.{kind}": torch.ones(3) for layer in (0, 2, 4)
              for kind in ("weight", "bias")}  # fmt: skip

NETWORK = flow_config(TINY)


@pytest.fixture(scope="module")
def state() -> State:
    return dict(random_dit(NETWORK).state_dict())


@pytest.fixture(scope="module")
def wide() -> DiT:
    """A network whose output has twice the channels, as SiT's."""
    return random_dit(TINY, seed=1)


def trained(path: Path, state: Mapping[str, Any], args: Mapping[str, Any]) -> Path:
    """Write what training scripts write."""
    given = argparse.Namespace(**args)
    torch.save({"model": dict(state), "ema": dict(state), "opt": {}, "args": given}, path)
    return path


def load(path: Path, **hints: Any) -> LoadedModel:
    return load_model(path, CheckpointHints(**{"num_heads": 4, **hints}))


# --- Whose it is --------------------------------------------------------------------------------

NO_SIZE = {"model": None}  # of no published one

RECORDED: dict[str, tuple[dict[str, Any], Mapping[str, Any], str]] = {
    "SiT's options": (SIT_ARGS | NO_SIZE, {}, "sit"),
    "REPA's options": (REPA_ARGS, {}, "repa"),
    "REPA's options and projectors": (REPA_ARGS, PROJECTORS, "repa"),
    "projectors": ({}, PROJECTORS, "repa"),
    "projectors of a SiT by name": ({"model_type": "sit"}, PROJECTORS, "repa"),
    "the family": ({"family": "sit"}, {}, "sit"),
}


@pytest.mark.parametrize(("args", "more", "family"), RECORDED.values(), ids=RECORDED)
def test_families_are_recognised(
    tmp_path: Path, state: State, args: dict[str, Any], more: Mapping[str, Any], family: str
) -> None:
    path = trained(tmp_path / "flow.pt", {**state, **more}, args)
    config = load(path).model.config
    assert config == flow_config(TINY, family)
    assert load(path, family=family).model.config == config, "a hint that agrees is no error"
    other = {"sit": "repa", "repa": "sit"}[family]
    for told in (other, "dit"):
        message = refusal(path, hints=CheckpointHints(num_heads=4, family=told))
        assert f"gives family '{family}', --family gives '{told}'; leave the option out" in message


@pytest.mark.parametrize("family", FLOWS)
def test_a_bare_file_is_what_is_told(tmp_path: Path, state: State, family: str) -> None:
    torch.save(state, tmp_path / "bare.pt")
    loaded = load(tmp_path / "bare.pt", family=family)
    assert loaded.model.config == flow_config(TINY, family)
    dit = load(tmp_path / "bare.pt", family="dit")
    assert dit.model.config.process == replace(DIT_PROCESS, variance="fixed_large")
    assert dit.identity == load(tmp_path / "bare.pt").identity
    assert loaded.identity != dit.identity
    assert loaded.identity.tensors_sha256 == dit.identity.tensors_sha256


def test_metadata_say_the_family(tmp_path: Path, state: State) -> None:
    metadata = {"num_heads": "4", "family": "repa"}
    save_file(state, tmp_path / "flow.safetensors", metadata=metadata)
    assert load_model(tmp_path / "flow.safetensors").model.config == flow_config(TINY, "repa")


def test_sizes_have_their_heads(tmp_path: Path) -> None:
    config = replace(
        NETWORK, input_size=8, patch_size=4, hidden_size=384, depth=12, num_heads=6, mlp_ratio=0.25
    )
    args = SIT_ARGS | {"model": "SiT-S/4"}
    del args["num_heads"]
    path = trained(tmp_path / "flow.pt", random_dit(config).state_dict(), args)
    assert load_model(path).model.config == config
    args["model"] = "SiT-B/4"
    message = refusal(trained(path, random_dit(config).state_dict(), args))
    assert "hidden_size 768 (args.model), but 384 by shape" in message


ASKED: dict[str, dict[str, Any]] = {
    "name": {"model_name": "SiT"},
    "a name and more": {"model": "SiT-XL/2@256", "prediction": "velocity"},
    "path": {"path_type": "Linear"},
    "spelled as neither": {"path_type": "linear", "prediction": "velocity"},
    "velocity": {"prediction": "velocity"},
    "v": {"prediction": "v"},
    "rectified": {"rectified_flow": True},
    "a part": {"flow_matching": {"sigma_min": 0.0}},
    "class": {"target": "models.sit.SiT_XL_2"},
    "scheduler": {"target": "diffusers.FlowMatchEulerDiscreteScheduler"},
}


@pytest.mark.parametrize("args", ASKED.values(), ids=ASKED)
def test_signs_that_nothing_tells_are_asked_for(
    tmp_path: Path, state: State, args: dict[str, Any]
) -> None:
    path = trained(tmp_path / "flow.pt", state, args)
    message = refusal(path, hints=CheckpointHints(num_heads=4))
    assert any(f"args.{name}: the model predicts something else" in message for name in args)
    assert "pass --family sit (t = 1 at the data) or --family repa (t = 1 at the noise)" in message
    assert load(path, family="sit").model.config == NETWORK
    message = refusal(path, hints=CheckpointHints(num_heads=4, family="dit"))
    assert "--family gives family 'dit', but args." in message
    assert message.endswith("gives a flow; leave the option out")


CONTRADICTIONS: dict[str, tuple[dict[str, Any], Mapping[str, Any], dict[str, Any], str]] = {
    "path": (
        SIT_ARGS | {"path_type": "GVP"}, {}, {},
        "args.path_type='GVP': the model was trained on another path from noise to data than a "
        "straight one, which is not followed (yet)",
    ),
    "path and hint": (
        REPA_ARGS | {"path_type": "cosine"}, {}, {"family": "repa"},
        "args.path_type='cosine': the model was trained on another path",
    ),
    "score": (
        SIT_ARGS | {"prediction": "score"}, {}, {},
        "args.prediction='score': the model predicts something else than the noise, which is not",
    ),
    "noise": (
        SIT_ARGS | NO_SIZE | {"prediction": "noise"}, {}, {"family": "sit"},
        "--family gives family 'sit', but args.prediction gives one that predicts noise; leave the "
        "option out",
    ),
    "SiT's options and projectors": (
        SIT_ARGS | NO_SIZE, PROJECTORS, {},
        "args.path_type gives family 'sit', its projectors.* (REPA's) gives 'repa'; correct the",
    ),
    "betas": (
        {"beta_start": 1e-4}, {}, {"family": "sit"},
        "--family gives family 'sit', but args.beta_start gives beta_start, which no flow has",
    ),
    "betas and record": (
        SIT_ARGS | NO_SIZE, {}, {"betas": "linear"},
        "args.path_type gives family 'sit', but --betas gives beta_schedule, which no flow has; "
        "leave the option out",
    ),
    "steps": (
        REPA_ARGS | {"num_timesteps": 1000}, {}, {},
        "but args.num_timesteps gives train_timesteps, which no flow has; correct the record",
    ),
    "rescaled": (
        REPA_ARGS | {"rescale_timesteps": True}, {}, {},
        "but args.rescale_timesteps gives rescale_timesteps, which no flow has",
    ),
    "another family": (
        {"family": "flux"}, {}, {},
        "args.family='flux': the model is of another family than dit, sit, repa, which is not",
    ),
    "hint": ({}, {}, {"family": "flux"}, "the family 'flux' is not known here: expected dit"),
    "qk_norm": (REPA_ARGS | {"qk_norm": True}, {}, {}, "args.qk_norm=True: the model computes"),
    "norms": (
        {}, {f"blocks.{index}.attn.{which}_norm.weight": torch.ones(12)
             for index in range(2) for which in "qk"}, {"family": "repa"},
        "its attention normalizes queries and keys (qk_norm: blocks.0.attn.q_norm.weight, blocks.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("args", "more", "hints", "message"), CONTRADICTIONS.values(), ids=CONTRADICTIONS
)
def test_contradictions_are_named(
    tmp_path: Path,
    state: State,
    args: dict[str, Any],
    more: Mapping[str, Any],
    hints: dict[str, Any],
    message: str,
) -> None:
    path = trained(tmp_path / "flow.pt", {**state, **more}, args)
    found = refusal(path, hints=CheckpointHints(**{"num_heads": 4, **hints}))
    assert message in found
    assert "\n" not in found


def test_the_bundled_dit_is_no_flow() -> None:
    message = refusal(BUNDLED_MODEL, hints=CheckpointHints(family="sit"))
    assert "the package gives family 'dit', --family gives 'sit'; leave the option out" in message


def test_the_bundled_flow_is_a_sit() -> None:
    loaded = load_model(BUNDLED_FLOW)
    assert loaded.source == "digits-sit (bundled)"
    assert loaded.notes == ()
    assert loaded.model.config == flow_config(load_model(BUNDLED_MODEL).model.config)
    folder = importlib.resources.files("ditas_export.dit") / "bundled"
    assert len((folder / f"{BUNDLED_FLOW}.safetensors").read_bytes()) < 7 * 2**20
    card = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert loaded.identity.tensors_sha256 in card
    message = refusal(BUNDLED_FLOW, hints=CheckpointHints(family="repa"))
    assert "metadata config.family gives family 'sit', --family gives 'repa'; leave" in message


# --- What is kept of its tensors ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_half_that_is_no_velocity_is_left_out(
    tmp_path: Path, wide: DiT, dtype: torch.dtype
) -> None:
    """The network that runs puts out what SiT's forward keeps: the first half of the channels."""
    state = {name: tensor.to(dtype) for name, tensor in wide.state_dict().items()}
    loaded = load(trained(tmp_path / "sit.pt", state, SIT_ARGS | NO_SIZE))
    assert loaded.model.config == NETWORK
    assert "left out the 4 channels of its output that are no velocity" in loaded.notes
    full = DiT(TINY)
    full.load_state_dict(state)
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    given = (x, torch.tensor([0.0, 0.3, 1.0]), torch.tensor([1, 5, 10]))
    with torch.no_grad():
        expected, _ = full(*given).chunk(2, dim=1)
        assert torch.equal(loaded.model(*given), expected)


def test_output_of_another_width_is_named(tmp_path: Path, wide: DiT) -> None:
    state = dict(wide.state_dict())
    state["final_layer.linear.weight"] = state["final_layer.linear.weight"][:-3]
    message = refusal(
        trained(tmp_path / "sit.pt", state, SIT_ARGS | NO_SIZE), hints=CheckpointHints(num_heads=4)
    )
    assert "1 misshapen (final_layer.linear.weight (29, 48) instead of (32, 48))" in message


def test_projectors_are_left_out_and_said(tmp_path: Path, state: State) -> None:
    path = trained(tmp_path / "repa.pt", {**state, **PROJECTORS}, REPA_ARGS)
    loaded = load(path)
    assert "left out REPA's projectors.* (6 tensors), of training alone" in loaded.notes
    bare = load(trained(path, state, REPA_ARGS))
    assert loaded.identity == bare.identity


# --- Two conventions of one flow ----------------------------------------------------------------


def test_a_flow_turned_is_its_twin_of_the_other_family(tmp_path: Path) -> None:
    """v'(x, t) = -v(x, 1 - t) of the bundled flow, and the same digits."""
    sit = load_model(BUNDLED_FLOW).model
    state, size = dict(sit.state_dict()), {"num_heads": sit.config.num_heads, "num_classes": 10}
    path = trained(tmp_path / "sit.pt", state, SIT_ARGS | NO_SIZE | size)
    assert load_model(path).identity == load_model(BUNDLED_FLOW).identity
    repa_state = {**turned(state), **PROJECTORS}
    repa = load_model(trained(tmp_path / "repa.pt", repa_state, REPA_ARGS | size)).model
    assert repa.config == flow_config(sit.config, "repa")
    noise = torch.randn(10, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    times, labels = torch.linspace(0, 1, 10), torch.tensor([*range(9), 10])
    with torch.no_grad():
        torch.testing.assert_close(
            repa(noise, 1 - times, labels), -sit(noise, times, labels), atol=1e-5, rtol=0
        )
    labels = torch.arange(10)
    torch.testing.assert_close(
        euler(repa, noise, labels, steps=10, scale=1.5),
        euler(sit, noise, labels, steps=10, scale=1.5),
        atol=1e-4,
        rtol=0,
    )
    for name, tensor in turned(turned(state)).items():
        torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=0)
