"""What training wraps around weights: averages, prefixes, marks in names, objects beside them."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, random_dit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_checkpoint import RunsCode, diffusers_model, edit_json, refusal
from torch import Tensor, nn

from ditas_export.dit.model import DiT
from ditas_export.families.load import LoadedModel, load_model

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def average() -> State:
    return dict(random_dit(seed=1).state_dict())


@pytest.fixture(scope="module")
def raw() -> State:
    return dict(random_dit(seed=2).state_dict())


def prefixed(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in state.items()}


def loaded_from(path: Path, content: object, **options: Any) -> LoadedModel:
    torch.save(content, path, **options)
    return load_model(path, num_heads=TINY.num_heads)


def assert_is(loaded: LoadedModel, state: State) -> None:
    ours = loaded.model.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(ours[name], state[name]) for name in state)


# --- Prefixes and marks -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["", "model", "ema", "state_dict"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net.", "a.b.c."]
)
def test_a_common_prefix_is_stripped_and_said(
    tmp_path: Path, average: State, prefix: str, part: str
) -> None:
    wrapped = prefixed(average, prefix)
    loaded = loaded_from(tmp_path / "dit.pt", {part: wrapped} if part else wrapped)
    assert_is(loaded, average)
    assert any(note.startswith("stripped ") for note in loaded.notes)
    assert any(f"part {part!r}" in loaded.source for _ in [0] if part) == bool(part)


def test_marks_inside_names_are_stripped(tmp_path: Path, average: State) -> None:
    """torch.compile of every block by itself, and checkpointing, as real modules name them."""
    marks = {
        "blocks.0.": "blocks.0._orig_mod.",
        "blocks.1.": "blocks.1._checkpoint_wrapped_module.",
    }
    wrapped = {}
    for name, tensor in average.items():
        for plain, marked in marks.items():
            name = name.replace(plain, marked)
        wrapped[f"module.{name}"] = tensor
    loaded = loaded_from(tmp_path / "dit.pt", wrapped)
    assert_is(loaded, average)
    assert "stripped the marks of torch.compile and the like from names" in loaded.notes


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    parts=st.lists(st.sampled_from(["model", "state_dict", "x", "weights"]), max_size=3),
    prefix=st.lists(st.sampled_from(["module", "_orig_mod", "net", "core"]), max_size=3),
    beside=st.dictionaries(st.sampled_from(["epoch", "opt", "note"]), st.integers(), max_size=3),
)
def test_whatever_is_wrapped_around_is_taken_off(
    tmp_path: Path, average: State, parts: list[str], prefix: list[str], beside: dict[str, int]
) -> None:
    content: Any = prefixed(average, "".join(f"{word}." for word in prefix))
    for part in parts:
        content = {part: content}
    assert_is(loaded_from(tmp_path / "dit.pt", {**content, **beside}), average)


def test_what_is_left_must_be_complete(tmp_path: Path, average: State) -> None:
    cut = prefixed(average, "module.")
    del cut["module.final_layer.linear.bias"]
    torch.save(cut, tmp_path / "cut.pt")
    assert "1 missing (final_layer.linear.bias)" in refusal(tmp_path / "cut.pt", num_heads=4)
    more = prefixed({**average, "projector.weight": torch.ones(2)}, "module.")
    torch.save(more, tmp_path / "more.pt")
    assert "1 unexpected (projector.weight)" in refusal(tmp_path / "more.pt", num_heads=4)


def test_safetensors_have_wrappings_too(tmp_path: Path, average: State, raw: State) -> None:
    tensors = prefixed(average, "ema.") | prefixed(raw, "model.")
    save_file(tensors, tmp_path / "dit.sft")
    loaded = load_model(tmp_path / "dit.sft", num_heads=4)
    assert_is(loaded, average)
    assert "stripped 'ema.' from every name" in loaded.notes


# --- Averages -----------------------------------------------------------------------------------


def lightning(average: State, raw: State) -> dict[str, Any]:
    """A module with its average beside it, a loss, and what Lightning adds."""
    state = prefixed(raw, "model.") | prefixed(average, "ema_model.")
    state["loss.vgg.weight"] = torch.ones(3)
    return {"epoch": 3, "state_dict": state, "optimizer_states": [{}], "hyper_parameters": {}}


def ema_pytorch(average: State, raw: State) -> dict[str, Any]:
    state: dict[str, Any] = prefixed(average, "ema_model.") | prefixed(raw, "online_model.")
    state |= {"initted": torch.tensor(True), "step": torch.tensor(100)}
    return {"model": raw, "ema": state, "opt": {"state": {}}}


def listed(average: State, raw: State, *, positions: bool = False) -> dict[str, Any]:
    """A list of parameters, as in torch_ema and diffusers' EMAModel."""
    names = [name for name in average if positions or name != "pos_embed"]
    shadow = [average[name] for name in names]
    return {"model": raw, "ema": {"decay": 0.999, "num_updates": 9, "shadow_params": shadow}}


def without_names(average: State, raw: State) -> dict[str, Any]:
    """The same alone: the order of a DiT's parameters is all there is."""
    del raw
    return {"shadow_params": list(average.values()), "decay": 0.999}


def latent_diffusion(average: State, raw: State) -> dict[str, Any]:
    """Averages as buffers, whose names cannot hold dots; fixed parameters are not averaged."""
    state = prefixed(raw, "model.diffusion_model.")
    for name, tensor in average.items():
        if name != "pos_embed":
            state["model_ema.diffusion_model" + name.replace(".", "")] = tensor
    return {"state_dict": state | {"model_ema.decay": torch.tensor(0.99)}}


AVERAGES: dict[str, Callable[[State, State], dict[str, Any]]] = {
    "DiT": lambda average, raw: {"model": raw, "ema": average, "opt": {}},
    "raw beside": lambda average, raw: {**raw, "ema": average, "epoch": torch.tensor(3)},
    "timm": lambda average, raw: {"state_dict": raw, "state_dict_ema": average},
    "model_ema": lambda average, raw: {"model": raw, "model_ema": prefixed(average, "module.")},
    "BasicSR": lambda average, raw: {"params": raw, "params_ema": average},
    "shadow": lambda average, raw: {"net": raw, "ema": {"shadow": average, "decay": 0.9}},
    "modelEMA": lambda average, raw: {"modelEMA": average, "model": raw},
    "ema_0.9999": lambda average, raw: {"model": raw, "ema_0.9999": average},
    "non_ema": lambda average, raw: {"non_ema": raw, "ema": average},
    "no_ema": lambda average, raw: {"model_no_ema": raw, "ema": average},
    "without_ema": lambda average, raw: {"model_without_ema": raw, "ema": average},
    "EMAModel": lambda average, raw: {"model": raw, "EMAModel": average},
    "ema-pytorch": ema_pytorch,
    "lightning": lightning,
    "latent diffusion": latent_diffusion,
    "list": listed,
    "whole list": lambda average, raw: listed(average, raw, positions=True),
    "list alone": without_names,
    "optimizer by name": lambda average, raw: {
        "optimizer": {"exp_avg": raw}, "ema": average, "model": raw
    },
}  # fmt: skip


@pytest.mark.parametrize("wrap", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
def test_averages_win(
    tmp_path: Path, average: State, raw: State, wrap: Callable[..., Any], is_zip: bool
) -> None:
    loaded = loaded_from(
        tmp_path / "train.ckpt", wrap(average, raw), _use_new_zipfile_serialization=is_zip
    )
    assert_is(loaded, average)
    if wrap is not without_names:
        assert any(note.startswith("took the averaged weights") for note in loaded.notes)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_list_alone_is_named_at_any_depth_and_without_classes(
    tmp_path: Path, average: State, depth: int
) -> None:
    state = {name: tensor for name, tensor in average.items() if not name.startswith("blocks.")}
    for index in range(depth):
        for name, tensor in average.items():
            if name.startswith("blocks.0."):
                state[name.replace("blocks.0.", f"blocks.{index}.")] = tensor + index
    order = [*DiT(load_dit_config(depth)).state_dict()]
    shadow = [state[name] for name in order if "y_embedder" not in name]
    loaded = loaded_from(tmp_path / "dit.pt", {"shadow_params": shadow})
    ours = loaded.model.state_dict()
    assert loaded.model.config.depth == depth
    assert all(torch.equal(ours[name], state[name]) for name in order if "y_emb" not in name)


def load_dit_config(depth: int) -> Any:
    from dataclasses import replace

    return replace(TINY, depth=depth)


class EmaObject:
    """An average that was pickled as an object."""

    def __init__(self, state: State) -> None:
        self.shadow = state


UNREAD = {
    "object": lambda average: EmaObject(average),
    "short list": lambda average: {"shadow_params": list(average.values())[:-1]},
    "other order": lambda average: {"shadow_params": list(average.values())[::-1]},
    "numbered": lambda average: {str(i): each for i, each in enumerate(average.values())},
}


@pytest.mark.parametrize("wrap", UNREAD.values(), ids=UNREAD)
def test_averages_that_cannot_be_told_apart_are_no_reason_to_take_raw_weights(
    tmp_path: Path, average: State, raw: State, wrap: Callable[[State], Any]
) -> None:
    torch.save({"model": raw, "ema": wrap(average)}, tmp_path / "dit.pt")
    message = refusal(tmp_path / "dit.pt", num_heads=4)
    assert "ema" in message
    assert "write the averaged model's state_dict()" in message


def test_an_average_that_is_none_is_ignored(tmp_path: Path, raw: State) -> None:
    for nothing in (None, 0.9999, {}, {"decay": 0.9, "num_updates": 3}):
        assert_is(loaded_from(tmp_path / "dit.pt", {"model": raw, "ema": nothing}), raw)


@pytest.mark.parametrize("name", ["model_no_ema", "model_without_ema", "modelNoEMA"])
def test_weights_without_average_are_raw_ones(
    tmp_path: Path, average: State, raw: State, name: str
) -> None:
    loaded = loaded_from(tmp_path / "dit.pt", {"model": raw, name: average})
    assert_is(loaded, raw)
    assert f"took the raw weights, model; not used: {name}" in loaded.notes


def test_a_partial_average_is_no_smaller_model(tmp_path: Path, average: State, raw: State) -> None:
    """Without its last block an average has all that a DiT of one block less has."""
    part = {name: tensor for name, tensor in average.items() if not name.startswith("blocks.1.")}
    torch.save({"model": raw, "ema": part}, tmp_path / "dit.pt")
    message = refusal(tmp_path / "dit.pt", num_heads=4)
    assert "the averaged weights, ema, lack 10 tensors of model (blocks.1.attn.qkv" in message
    assert loaded_from(tmp_path / "dit.pt", part).model.config.depth == 1
    part = {name: tensor for name, tensor in average.items() if "y_embedder" not in name}
    torch.save({"model": raw, "ema": part}, tmp_path / "dit.pt")
    assert "lack 1 tensors of model (y_embedder" in refusal(tmp_path / "dit.pt", num_heads=4)


def test_the_usual_part_is_taken_and_equals_are_refused(
    tmp_path: Path, average: State, raw: State
) -> None:
    loaded = loaded_from(tmp_path / "dit.pt", {"teacher": average, "model": raw})
    assert_is(loaded, raw)
    assert "took the raw weights, model; not used: teacher" in loaded.notes
    loaded = loaded_from(tmp_path / "dit.pt", {**raw, **prefixed(average, "teacher.")})
    assert_is(loaded, raw)
    torch.save({"teacher": average, "student": raw}, tmp_path / "two.pt")
    message = refusal(tmp_path / "two.pt", num_heads=4)
    assert "holds several models: teacher, student; write the one that is meant" in message


# --- Objects and odd tensors --------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_beside_sound_tensors_are_left_out_and_said(
    tmp_path: Path, average: State, protocol: int
) -> None:
    """What real training scripts leave in their checkpoints."""
    content = {
        "model": OrderedDict(average),
        "train_steps": np.int64(400_000),
        "loss": np.ones(3),
        "args": argparse.Namespace(results_dir=Path("results"), num_heads=np.int64(4)),
        "seen": {1, 2},
        "code": RunsCode(tmp_path / "ran"),
    }
    torch.save(content, tmp_path / "train.pth.tar", pickle_protocol=protocol)
    loaded = load_model(tmp_path / "train.pth.tar")
    assert_is(loaded, average)
    assert loaded.model.config.num_heads == 4
    said = " ".join(loaded.notes)
    assert "of its pickle, not run and left out: " in said
    assert not (tmp_path / "ran").exists()


def test_tensors_that_only_code_makes_are_refused(tmp_path: Path, average: State) -> None:
    odd: dict[str, Any] = {
        "sparse": average["blocks.0.attn.qkv.weight"].to_sparse(),
        "numpy": average["blocks.0.attn.qkv.weight"].numpy(),
    }
    for value in odd.values():
        torch.save({**average, "blocks.0.attn.qkv.weight": value}, tmp_path / "dit.pt")
        message = refusal(tmp_path / "dit.pt", num_heads=4)
        assert "blocks.0.attn.qkv.weight is made by code (" in message
        assert "which was not run" in message


def test_a_whole_module_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "dit.pt")
    message = refusal(tmp_path / "dit.pt")
    assert (
        "holds a torch.nn.modules.linear.Linear, expected a state dict: write the model" in message
    )


@pytest.mark.parametrize("kind", ["pt", "legacy", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_become_float32(
    tmp_path: Path, average: State, dtype: torch.dtype, kind: str
) -> None:
    cast = {
        name: tensor if name == "pos_embed" else tensor.to(dtype)
        for name, tensor in average.items()
    }
    if kind == "safetensors":
        save_file(cast, tmp_path / "dit")
    else:
        torch.save(cast, tmp_path / "dit", _use_new_zipfile_serialization=kind == "pt")
    loaded = load_model(tmp_path / "dit", num_heads=4)
    assert_is(loaded, {name: tensor.float() for name, tensor in cast.items()})
    assert loaded.dtype == dtype


def test_a_number_that_float32_cannot_hold_is_no_finite_one(tmp_path: Path, average: State) -> None:
    large = {name: tensor.double() for name, tensor in average.items()}
    large["final_layer.linear.bias"] = large["final_layer.linear.bias"] + 1e300
    torch.save(large, tmp_path / "dit.pt")
    message = refusal(tmp_path / "dit.pt", num_heads=4)
    assert "1 with NaN or infinity (final_layer.linear.bias)" in message


def test_a_tensor_of_more_elements_than_are_stored_is_refused(tmp_path: Path) -> None:
    """A few bytes must not become gigabytes."""
    torch.save({"x_embedder.proj.weight": torch.ones(1).expand(10**8)}, tmp_path / "dit.pt")
    assert "no whole PyTorch checkpoint" in refusal(tmp_path / "dit.pt", num_heads=4)


LORA = {
    "PEFT": (
        "base_model.model.",
        {"blocks.0.attn.qkv.lora_A.default.weight", "blocks.0.attn.qkv.base_layer.weight"},
    ),
    "diffusers": ("", {"transformer.blocks.0.attn.qkv.lora.up.weight"}),
    "kohya": ("", {"lora_unet_blocks_0_attn_qkv.lora_down.weight"}),
}


@pytest.mark.parametrize("alone", [True, False], ids=["adapter", "beside the model"])
@pytest.mark.parametrize(("prefix", "names"), LORA.values(), ids=LORA)
def test_adapters_are_refused_with_the_formula(
    tmp_path: Path, average: State, prefix: str, names: set[str], alone: bool
) -> None:
    state = {} if alone else prefixed(average, prefix)
    torch.save({**state, **{f"{prefix}{name}": torch.ones(2, 2) for name in names}}, tmp_path / "a")
    message = refusal(tmp_path / "a", num_heads=4)
    assert "holds adapters (LoRA or its kind" in message
    assert "W + (alpha/r) B A" in message


def test_an_adapter_folder_is_refused_with_the_formula(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "W + (alpha/r) B A" in refusal(tmp_path)


# --- What files are -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit.pth.tar", "dit", "dit.PT", "dit.sft"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_content_counts_and_no_suffix(tmp_path: Path, average: State, kind: str, name: str) -> None:
    if kind == "safetensors":
        save_file(average, tmp_path / name)
    else:
        torch.save(average, tmp_path / name, _use_new_zipfile_serialization=kind == "zip")
    assert_is(load_model(tmp_path / name, num_heads=4), average)


def packed(state: State) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def archived(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("dit.pt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 2700000000\n"
OTHERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda _: POINTER, "is a git-LFS pointer to a file of 2,700,000,000 bytes, not"),
    "page": (lambda _: b"\n<!DOCTYPE html>\n<html>Sign in</html>", "is a web page (HTML or XML)"),
    "error": (lambda _: b"<?xml version='1.0'?><Error/>", "is a web page (HTML or XML)"),
    "empty": (lambda _: b"", "is empty; get it again"),
    "gzip": (
        gzip.compress,
        "is a gzip archive; expected safetensors or what torch.save writes: un",
    ),
    "tar": (archived, "is a tar archive; expected"),
    "gguf": (lambda _: b"GGUF\x03\0\0\0", "is a GGUF file"),
    "cut zip": (
        lambda content: content[:200],
        "no whole PyTorch checkpoint: damaged, or cut short",
    ),
    "cut a little": (lambda content: content[:-1], "damaged, or cut short, as an interrupted down"),
    "cut legacy": (lambda _: b"\x80\x02\x8a\nl\xfc\x9c", "no whole PyTorch checkpoint"),
    "text": (lambda _: b"404: Not Found", "is no checkpoint: expected a safetensors file"),
}


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
@pytest.mark.parametrize(("make", "message"), OTHERS.values(), ids=OTHERS)
def test_other_files_are_named_for_what_they_are(
    tmp_path: Path, average: State, make: Callable[[bytes], bytes], message: str, name: str
) -> None:
    content = make(packed(average))
    (tmp_path / name).write_bytes(content)
    found = refusal(tmp_path / name, num_heads=4)
    by_its_name = "no safetensors file, or was damaged"
    assert message in found or (name.endswith("safetensors") and by_its_name in found)
    if content[:1] not in (b"4", b"\x80"):
        assert message in found


def test_other_archives_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.ones(2))
    assert "is a zip archive, but not one of torch.save" in refusal(tmp_path / "a.npz")
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "a.pt"))
    assert "is a TorchScript archive, which is a program" in refusal(tmp_path / "a.pt")


# --- Folders of diffusers -----------------------------------------------------------------------


def in_folder(folder: Path, seed: int, **options: Any) -> Any:
    model = diffusers_model(seed)
    model.save_pretrained(folder, **options)
    return model


def qkv_of(model: Any) -> Tensor:
    weight: Tensor = model.transformer_blocks[0].attn1.to_q.weight
    return weight.float()


def first_query(loaded: LoadedModel) -> Tensor:
    return loaded.model.state_dict()["blocks.0.attn.qkv.weight"][:48]


VARIANTS: dict[str, tuple[list[str | None], str]] = {
    "fp16 alone": (["fp16"], "fp16"),
    "bf16 alone": (["bf16"], "bf16"),
    "plain over fp16": ([None, "fp16"], ""),
    "ema over plain": ([None, "ema"], "ema"),
    "plain over non_ema": ([None, "non_ema"], ""),
    "ema over non_ema": (["non_ema", "ema"], "ema"),
    "non_ema alone": (["non_ema"], "non_ema"),
}


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
@pytest.mark.parametrize(("variants", "wins"), VARIANTS.values(), ids=VARIANTS)
def test_the_best_variant_is_taken_and_said(
    tmp_path: Path, variants: list[str | None], wins: str, shards: bool
) -> None:
    sizes = {"max_shard_size": "60KB"} if shards else {}
    models = {
        variant or "": in_folder(tmp_path, seed, variant=variant, **sizes)
        for seed, variant in enumerate(variants)
    }
    loaded = load_model(tmp_path)
    assert torch.equal(first_query(loaded), qkv_of(models[wins]))
    assert any(note.startswith("took diffusion_") for note in loaded.notes) == (len(models) > 1)


def test_the_averaged_folder_wins(tmp_path: Path) -> None:
    in_folder(tmp_path / "transformer", 0)
    average = in_folder(tmp_path / "transformer_ema", 1)
    loaded = load_model(tmp_path)
    assert torch.equal(first_query(loaded), qkv_of(average))
    assert "took the averaged weights, transformer_ema/ (transformer/ is not used)" in loaded.notes
    shutil.rmtree(tmp_path / "transformer_ema")
    assert not torch.equal(first_query(load_model(tmp_path)), qkv_of(average))


def test_an_averaged_folder_without_weights_is_passed_over(tmp_path: Path) -> None:
    raw = in_folder(tmp_path / "transformer", 0)
    in_folder(tmp_path / "transformer_ema", 1)
    (tmp_path / "transformer_ema" / "diffusion_pytorch_model.safetensors").unlink()
    loaded = load_model(tmp_path)
    assert torch.equal(first_query(loaded), qkv_of(raw))
    said = "took the raw weights, transformer/: transformer_ema/ has no whole model"
    assert said in loaded.notes


def test_wrapped_names_in_a_folder(tmp_path: Path) -> None:
    model = in_folder(tmp_path, 0, safe_serialization=False)
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(prefixed(model.state_dict(), "module."), path)
    assert torch.equal(first_query(load_model(tmp_path)), qkv_of(model))


def test_embedders_of_every_block_are_no_damage(tmp_path: Path) -> None:
    model = diffusers_model(num_layers=3)
    with torch.no_grad():
        for block in model.transformer_blocks:
            for parameter in block.norm1.emb.parameters():
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    model.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert "the time and label embedders of all 3 blocks differ, as after fine-tuning" in message
    assert "unlike" not in message


def test_a_copy_with_nan_is_not_unlike_the_others_too(tmp_path: Path) -> None:
    for block in (0, 1):
        model = diffusers_model(num_layers=3)
        with torch.no_grad():
            model.transformer_blocks[block].norm1.emb.timestep_embedder.linear_1.bias[3] = np.nan
        model.save_pretrained(tmp_path)
        message = refusal(tmp_path)
        assert "1 with NaN or infinity (" in message
        assert "unlike" not in message


def test_old_defaults_of_out_channels(tmp_path: Path) -> None:
    """A config without the entry means as many channels as go in."""
    diffusers_model().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", out_channels=None)
    assert "learn_sigma False (config.json out_channels), but True by shape" in refusal(tmp_path)


def test_shards_outside_the_folder_are_not_followed(tmp_path: Path, average: State) -> None:
    folder = tmp_path / "in"
    model = in_folder(folder, 0)
    os.replace(folder / "diffusion_pytorch_model.safetensors", tmp_path / "w.safetensors")
    index = {"weight_map": dict.fromkeys(model.state_dict(), "../w.safetensors")}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "cannot read" in refusal(folder)
    index["weight_map"] = {"a": 5}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "lists '5' as a shard; expected file names" in refusal(folder)
