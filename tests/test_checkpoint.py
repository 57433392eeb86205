"""Loading: every kind of source to the same model, every kind of damage to one clear line."""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, random_dit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditas_export.artifact_files import sha256_of_tensors
from ditas_export.dit.model import DiT, DiTConfig, position_embedding
from ditas_export.dit.tensor_files import TensorFile, read_tensor_file
from ditas_export.errors import CheckpointError
from ditas_export.families.identity import ModelIdentity
from ditas_export.families.load import BUNDLED_MODEL, LoadedModel, load_model

State = dict[str, Tensor]

HEADS = TINY.num_heads
"""The tiny model is of no published size: its heads must be told or recorded."""

BUNDLED = Path(__file__).parents[1] / "ditas_export" / "dit" / "bundled" / "digits.safetensors"


@pytest.fixture(scope="module")
def state() -> State:
    return dict(random_dit().state_dict())


def assert_holds(loaded: LoadedModel, state: State, config: DiTConfig = TINY) -> None:
    """Every tensor bit for bit, in a float32 model that is ready to run."""
    assert loaded.model.config == config
    assert not loaded.model.training
    ours = loaded.model.state_dict()
    assert ours.keys() == state.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, state[name].float()), name
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.identity == ModelIdentity(tensors_sha256=sha256_of_tensors(ours), config=config)


def refusal(source: str | Path, **options: Any) -> str:
    """Return the message, which is one line."""
    with pytest.raises(CheckpointError) as caught:
        load_model(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Files with the published names -------------------------------------------------------------


def test_bare_pickle(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "dit.pt")
    loaded = load_model(tmp_path / "dit.pt", num_heads=HEADS)
    assert_holds(loaded, state)
    assert loaded.source == str(tmp_path / "dit.pt")
    assert loaded.dtype == torch.float32


def test_legacy_pickle(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "dit.pt", _use_new_zipfile_serialization=False)
    assert_holds(load_model(tmp_path / "dit.pt", num_heads=HEADS), state)


@pytest.mark.parametrize("parts", [("ema", "model"), ("model",), ("ema",)], ids="+".join)
def test_training_checkpoint_prefers_the_average(
    tmp_path: Path, state: State, parts: tuple[str, ...]
) -> None:
    other = {name: tensor + 1 for name, tensor in state.items()}
    weights = {part: state if part == parts[0] else other for part in parts}
    options = argparse.Namespace(epochs=1400, num_heads=HEADS)
    torch.save({**weights, "opt": {"step": 3}, "args": options}, tmp_path / "train.pt")
    loaded = load_model(tmp_path / "train.pt")
    assert_holds(loaded, state)
    assert loaded.source.endswith(f"train.pt, part '{parts[0]}'")
    assert "not used: opt" in loaded.notes
    chosen = "took the averaged weights, ema; not used: model"
    assert (chosen in loaded.notes) == (len(parts) > 1)


def test_safetensors_with_and_without_recorded_heads(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "plain.safetensors")
    save_file(state, tmp_path / "told.safetensors", metadata={"num_heads": str(HEADS)})
    assert_holds(load_model(tmp_path / "plain.safetensors", num_heads=HEADS), state)
    assert_holds(load_model(str(tmp_path / "told.safetensors")), state)
    assert_holds(load_model(tmp_path / "told.safetensors", num_heads=HEADS), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_float32(tmp_path: Path, state: State, dtype: torch.dtype) -> None:
    cast = {name: tensor.to(dtype) for name, tensor in state.items()}
    save_file(cast, tmp_path / "dit.safetensors")
    loaded = load_model(tmp_path / "dit.safetensors", num_heads=HEADS)
    assert_holds(loaded, cast)
    assert loaded.dtype == dtype


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": 16, "patch_size": 4},
        {"in_channels": 1, "depth": 1, "num_classes": 1},
        {"hidden_size": 52, "mlp_ratio": 131 / 52},
    ],
    ids=["patch", "channels", "ratio"],
)
def test_the_shape_is_read_off_the_tensors(tmp_path: Path, change: dict[str, Any]) -> None:
    config = replace(TINY, **change)
    model = random_dit(config)
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    assert_holds(load_model(tmp_path / "dit.pt", num_heads=HEADS), model.state_dict(), config)


def test_a_published_size_knows_its_heads(tmp_path: Path) -> None:
    """Depth and width of DiT-S: few classes and a coarse patch keep the file small."""
    config = DiTConfig(
        input_size=8, patch_size=4, hidden_size=384, depth=12, num_heads=6, mlp_ratio=0.25,
        num_classes=1,
    )  # fmt: skip
    torch.save(DiT(config).state_dict(), tmp_path / "dit.pt")
    assert load_model(tmp_path / "dit.pt").model.config == config
    assert load_model(tmp_path / "dit.pt", num_heads=12).model.config.num_heads == 12


def test_float32_tensors_are_not_copied(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of gigabytes fits beside its mapped file only once."""
    read: State = {}

    def read_and_keep(path: Path) -> TensorFile:
        file = read_tensor_file(path)
        read.update(file.content)
        return file

    monkeypatch.setattr("ditas_export.dit.checkpoint.read_tensor_file", read_and_keep)
    torch.save(state, tmp_path / "dit.pt")
    model = load_model(tmp_path / "dit.pt", num_heads=HEADS).model
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == read[name].data_ptr(), name


# --- Diffusers folders --------------------------------------------------------------------------


def diffusers_model(seed: int = 0, **changes: Any) -> Any:
    """Return a random `DiTTransformer2DModel` whose embedder copies agree, as trained ones do."""
    from diffusers import DiTTransformer2DModel

    options = {
        "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 4, "out_channels": 8,
        "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    model = DiTTransformer2DModel(**{**options, **changes}).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(first)
    return model


INPUTS = (
    torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    torch.tensor([0, 1, 500, 999]),
    torch.tensor([0, 3, 9, 10]),
)


def assert_matches_diffusers(folder: Path, model: Any) -> None:
    """Our forward is diffusers' own."""
    latents, timesteps, labels = INPUTS
    with torch.no_grad():
        expected = model(latents, timestep=timesteps, class_labels=labels).sample
    out = load_model(folder).model(*INPUTS)
    # The same operations in the same order but for q, k and v in one product: float32 rounding.
    assert float((out - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("place", ["", "transformer"], ids=["folder", "pipeline"])
def test_diffusers_folder(tmp_path: Path, place: str, safe: bool) -> None:
    model = diffusers_model()
    model.save_pretrained(tmp_path / place, safe_serialization=safe)
    assert_matches_diffusers(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.source == f"{tmp_path} (diffusers)"
    assert loaded.model.config.num_heads == 4


def test_diffusers_shards(tmp_path: Path) -> None:
    model = diffusers_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    assert_matches_diffusers(tmp_path, model)
    next(tmp_path.glob("*-00002-of-*.safetensors")).unlink()
    assert re.search("cannot read .*-00002-of-.*: No such file", refusal(tmp_path))


def test_diffusers_settings_count(tmp_path: Path) -> None:
    """Activations this small make norm_eps visible; other heads and patches too."""
    model = diffusers_model(
        num_attention_heads=2, attention_head_dim=24, patch_size=4, num_layers=3, norm_eps=1e-3
    )
    model.save_pretrained(tmp_path)
    assert_matches_diffusers(tmp_path, model)
    assert load_model(tmp_path).model.config.mlp_norm_eps == 1e-3


def test_diffusers_half_precision(tmp_path: Path) -> None:
    diffusers_model().half().save_pretrained(tmp_path, variant="fp16")
    loaded = load_model(tmp_path)
    assert loaded.dtype == torch.float16
    assert loaded.model.pos_embed.dtype == torch.float32
    assert torch.equal(loaded.model.pos_embed[0], position_embedding(48, 4))


def test_diffusers_time_features_are_not_the_published_ones(tmp_path: Path) -> None:
    """Frequencies over 127 instead of 128: the reason for `frequency_shift`."""
    model = diffusers_model()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path).model
    published = DiT(replace(loaded.config, frequency_shift=0))
    published.load_state_dict(loaded.state_dict())
    with torch.no_grad():
        out, expected = published(*INPUTS), loaded(*INPUTS)
    assert float((out - expected).norm() / expected.norm()) > 0.01


def test_old_folders_name_the_class_differently(tmp_path: Path) -> None:
    model = diffusers_model()
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", _class_name="Transformer2DModel", norm_eps=None)
    assert_matches_diffusers(tmp_path, model)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys; None removes one."""
    content = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"_class_name": "UNet2DModel"}, "describes a UNet2DModel, expected DiTTransformer"),
    "norm": ({"norm_type": "ada_norm"}, "has norm_type='ada_norm'; a DiT has 'ada_norm_zero'"),
    "activation": ({"activation_fn": "geglu"}, "has activation_fn='geglu'"),
    "bias": ({"attention_bias": False}, "has attention_bias=False; a DiT has True"),
    "affine": ({"norm_elementwise_affine": True}, "has norm_elementwise_affine=True"),
    "heads": ({"num_attention_heads": "4"}, "has num_attention_heads='4'; expected a positive int"),
    "size": ({"sample_size": 0}, "has sample_size=0; expected a positive int"),
    "depth": ({"num_layers": 3}, r"disagree: depth 3 \(config.json num_layers\), but 2 by shape"),
    "width": ({"attention_head_dim": 6}, r"24 \(config.json num_attention_heads \* attention_head"),
    "variance": ({"out_channels": 4}, r"learn_sigma False \(config.json out_channels\), but True"),
    "outputs": ({"out_channels": 5}, "has out_channels=5; a DiT of in_channels=4 has 4, or 8"),
    "classes": ({"num_embeds_ada_norm": 9}, r"9 classes .*, but a label table of 11 rows"),
    "grid": ({"sample_size": [8, 4]}, r"sample_size=\[8, 4\]: a grid that is not square"),
    "scaled": ({"interpolation_scale": 2}, "interpolation_scale=2; a DiT's positions are not"),
    "latent": ({"sample_size": 9}, "input_size=9 is no multiple of patch_size=2"),
}


@pytest.mark.parametrize(("change", "message"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_config_that_is_no_dit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    diffusers_model().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **change)
    assert re.search(message, refusal(tmp_path))


def test_embedder_copies_that_differ_are_refused(tmp_path: Path) -> None:
    model = diffusers_model()
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias[3] += 1e-3
    model.save_pretrained(tmp_path)
    message = refusal(tmp_path)
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    assert f"1 unlike block 0's copy ({name})" in message


def test_half_a_diffusers_folder_is_refused(tmp_path: Path) -> None:
    diffusers_model().save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "headless")
    (tmp_path / "headless" / "config.json").unlink()
    assert "is a folder without config.json" in refusal(tmp_path / "headless")
    shutil.copytree(tmp_path / "whole", tmp_path / "empty")
    (tmp_path / "empty" / "diffusion_pytorch_model.safetensors").unlink()
    assert "has a config.json but none of diffusion_pytorch_model" in refusal(tmp_path / "empty")
    message = refusal(tmp_path / "whole" / "diffusion_pytorch_model.safetensors")
    assert "has diffusers' tensor names; pass its folder" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no readable JSON file"), ("[1]", "holds a list, expected a JSON object")],
)
def test_broken_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert message in refusal(tmp_path)


def test_an_index_without_shards_is_refused(tmp_path: Path) -> None:
    diffusers_model().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert "lists no shards: it has no 'weight_map'" in refusal(tmp_path)


# --- The hub ------------------------------------------------------------------------------------


def fake_hub(monkeypatch: pytest.MonkeyPatch, repository: Path, cache: Path) -> list[list[str]]:
    """Serve a folder as a hub model; return the patterns that get asked for."""
    asked = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        from fnmatch import fnmatch

        assert repo_id == "someone/DiT-tiny"
        asked.append(allow_patterns)
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("place", ["", "transformer"], ids=["model", "pipeline"])
@pytest.mark.parametrize(("safe", "downloads"), [(True, 1), (False, 2)], ids=["safe", "bin"])
def test_hub_id_fetches_the_transformer_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, safe: bool, downloads: int
) -> None:
    model, repository = diffusers_model(), tmp_path / "repository"
    model.save_pretrained(repository / place, safe_serialization=safe)
    (repository / "vae").mkdir()
    (repository / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"large")
    (repository / "vae" / "config.json").write_text("{}")
    asked = fake_hub(monkeypatch, repository, tmp_path / "cache")
    loaded = load_model("someone/DiT-tiny")
    assert loaded.source == "someone/DiT-tiny (diffusers)"
    assert len(asked) == downloads
    assert not list((tmp_path / "cache" / "vae").glob("*.safetensors"))


def test_an_average_on_the_hub_is_fetched_in_the_older_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    diffusers_model().save_pretrained(repository / "transformer")
    diffusers_model(seed=1).save_pretrained(
        repository / "transformer_ema", safe_serialization=False
    )
    asked = fake_hub(monkeypatch, repository, tmp_path / "cache")
    said = "took the averaged weights, transformer_ema/ (transformer/ is not used)"
    assert said in load_model("someone/DiT-tiny").notes
    assert len(asked) == 2


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repo_id: str, **_: Any) -> str:
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = refusal("facebook/DiT-XL-2-256")
    assert "could not be had from the hub (Name or service not known); check the name" in message


# --- The bundled model --------------------------------------------------------------------------


@pytest.mark.skipif(not BUNDLED.is_file(), reason="the bundled model is not in this checkout")
def test_bundled_model() -> None:
    loaded = load_model(BUNDLED_MODEL)
    config = loaded.model.config
    assert (config.hidden_size, config.num_heads, config.num_classes) == (192, 6, 10)
    assert (config.input_size, config.in_channels, config.patch_size) == (16, 1, 2)
    assert loaded.dtype == torch.float16
    assert loaded.source == "digits (bundled)"
    assert BUNDLED.stat().st_size < 8e6
    card = (BUNDLED.parent / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert loaded.identity.tensors_sha256 in card


# --- Refusals -----------------------------------------------------------------------------------


def test_nothing_there() -> None:
    message = refusal("/no/such/file.pt")
    assert message.startswith("/no/such/file.pt: no such file or folder; expected `digits`")
    assert "no such file or folder" in refusal(Path("no/such"))  # a Path is never a hub id


def test_other_kinds_of_files(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    assert "is no checkpoint: expected a safetensors file" in refusal(tmp_path / "model.onnx")
    assert "is a folder without config.json" in refusal(tmp_path)
    for content, message in [([1, 2], "holds a list"), (torch.ones(2), "holds a Tensor")]:
        torch.save(content, tmp_path / "other.pt")
        assert f"{message}, expected a state dict" in refusal(tmp_path / "other.pt")
    torch.save({"weights": {"a": 1}, "step": 3}, tmp_path / "other.pt")
    assert "is no state dict: weights, step hold no tensor" in refusal(tmp_path / "other.pt")
    torch.save({}, tmp_path / "other.pt")
    assert "found 0 tensors such as none" in refusal(tmp_path / "other.pt")


def test_a_different_model(tmp_path: Path) -> None:
    save_file({f"layer{i}.weight": torch.ones(2) for i in range(5)}, tmp_path / "m.safetensors")
    message = refusal(tmp_path / "m.safetensors")
    assert "is no DiT: it has no 4-D x_embedder.proj.weight, 2-D blocks.0.mlp.fc1" in message
    assert "found 5 tensors such as layer0.weight, layer1.weight, layer2.weight and 2" in message


class RunsCode:
    """A pickle that would make a file when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_pickled_code_is_never_run(tmp_path: Path, state: State, form: str, protocol: int) -> None:
    """Sound tensors load, and what was left out is said."""
    content, path = {**state, "extra": RunsCode(tmp_path / "ran")}, tmp_path / "evil.pt"
    is_zip = form == "zip"
    torch.save(content, path, _use_new_zipfile_serialization=is_zip, pickle_protocol=protocol)
    loaded = load_model(path, num_heads=HEADS)
    assert_holds(loaded, state)
    assert not (tmp_path / "ran").exists()
    assert any(note.endswith("not run and left out: posix.mkdir") for note in loaded.notes)
    assert "not used: extra" in loaded.notes


def test_a_pickle_of_code_alone_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(RunsCode(tmp_path / "ran"), protocol=2))
    assert re.search(r"asks to run code \(\w+\.mkdir\); it was not run", refusal(path))
    torch.save(RunsCode(tmp_path / "ran"), path)
    assert re.search(r"holds a \w+\.mkdir, expected a state dict", refusal(path))
    assert not (tmp_path / "ran").exists()


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(part=st.floats(0, 0.999), kind=st.sampled_from(["zip", "legacy", "safetensors"]))
def test_truncated_files(tmp_path: Path, state: State, part: float, kind: str) -> None:
    path = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    message = refusal(path, num_heads=HEADS)
    words = "no safetensors file, or was|no whole PyTorch checkpoint|is empty|is no checkpoint"
    assert re.search(words, message)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1), legacy=st.booleans())
def test_scrambled_pickles_fail_as_one_line_or_load_finite(
    tmp_path: Path, state: State, seed: int, legacy: bool
) -> None:
    """Whatever bytes a file holds, nothing but `CheckpointError` comes out."""
    path = tmp_path / "dit.pt"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(min(len(content), 20_000), (20,), generator=generator).tolist():
        content[place] ^= 1 + place % 255
    path.write_bytes(content)
    try:
        loaded = load_model(path, num_heads=HEADS)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
    else:
        assert all(parameter.isfinite().all() for parameter in loaded.model.parameters())


def _without(state: State) -> None:
    for name in [name for name in state if name.startswith("blocks.1.attn")]:
        del state[name]


def _extra(state: State) -> None:
    state["blocks.0.attn.q_norm.weight"] = torch.ones(12)


def _misshapen(state: State) -> None:
    state["blocks.1.attn.proj.weight"] = torch.ones(48, 47)


def _not_finite(state: State) -> None:
    state["final_layer.linear.bias"][3] = float("nan")
    state["blocks.0.mlp.fc2.weight"][1, 1] = float("inf")


def _integers(state: State) -> None:
    state["t_embedder.mlp.0.bias"] = torch.ones(48, dtype=torch.int32)


def _no_positions(state: State) -> None:
    del state["pos_embed"]


FAULTS: dict[str, tuple[Callable[[State], None], str]] = {
    "missing": (
        _without,
        "4 missing (blocks.1.attn.qkv.weight, blocks.1.attn.qkv.bias, blocks.1.attn.proj.weight "
        "and 1 more)",
    ),
    "unexpected": (_extra, "1 unexpected (blocks.0.attn.q_norm.weight)"),
    "misshapen": (
        _misshapen,
        "1 misshapen (blocks.1.attn.proj.weight (48, 47) instead of (48, 48))",
    ),
    "not finite": (
        _not_finite,
        "2 with NaN or infinity (blocks.0.mlp.fc2.weight, final_layer.linear.bias)",
    ),
    "integers": (_integers, "1 not of a float type (t_embedder.mlp.0.bias int32)"),
    "positions": (_no_positions, "has no pos_embed, and nothing says how large its latents are"),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_faulty_tensors_are_named(
    tmp_path: Path, state: State, damage: Callable[[State], None], message: str
) -> None:
    damaged = copy.deepcopy(state)
    damage(damaged)
    torch.save(damaged, tmp_path / "dit.pt")
    assert message in refusal(tmp_path / "dit.pt", num_heads=HEADS)


def test_all_faults_come_in_one_error(tmp_path: Path, state: State) -> None:
    damaged = copy.deepcopy(state)
    for damage in (_without, _extra, _not_finite):
        damage(damaged)
    torch.save(damaged, tmp_path / "dit.pt")
    message = refusal(tmp_path / "dit.pt", num_heads=HEADS)
    assert "4 missing (" in message
    assert "1 unexpected (" in message
    assert "2 with NaN or infinity (" in message
    assert "Expected the 32 tensors" in message


def test_unknown_heads_are_asked_for(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "dit.pt")
    message = refusal(tmp_path / "dit.pt")
    assert "no published DiT has depth 2 and width 48; pass --num-heads" in message


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (0, "--num-heads 0: a DiT has at least one head"),
        (5, "hidden_size=48 is no multiple of num_heads=5"),
    ],
)
def test_impossible_heads(tmp_path: Path, state: State, heads: int, message: str) -> None:
    torch.save(state, tmp_path / "dit.pt")
    assert message in refusal(tmp_path / "dit.pt", num_heads=heads)


def test_recorded_heads_are_not_overruled(tmp_path: Path, state: State) -> None:
    path = tmp_path / "dit.safetensors"
    save_file(state, path, metadata={"num_heads": "4"})
    message = "metadata num_heads gives num_heads 4, --num-heads gives 6; leave the option out"
    assert message in refusal(path, num_heads=6)
    save_file(load_file(path), path, metadata={"num_heads": "four"})
    assert "metadata num_heads='four'; expected a whole number of 1 or more" in refusal(path)
