"""Hostile inputs of every loader by kind, and the sound neighbours that must load."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_bases as bases
import onnx
import torch
from hostile_bases import DROP, replaced
from safetensors.torch import save_file

from ditas_export.artifact_files import save_tensors
from ditas_export.calibration.quantized_model import ARTIFACT_FORMAT
from ditas_export.calibration.states import STATES_FORMAT

DEEP = "[" * 100_000
DIGITS = "9" * 5000

Make = Callable[[Path], list[str]]
"""Writes the input into a folder, and returns the command that is to read it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One input."""

    loader: str
    kind: str
    name: str
    make: Make
    is_sound: bool = False
    needs_limits: bool = False  # tests memory or time: for the script alone

    def __str__(self) -> str:
        """Return all names."""
        return f"{self.loader}: {self.kind}: {self.name}"


def sample_of(path: Path, *words: str) -> list[str]:
    """Return the command that samples one image of a model."""
    return [
        "sample", str(path), "-o", str(path.parent / "images"), "--classes", "1", "--steps", "2",
        "--cfg-scale", "1", "--vae", "none", "--quiet", *words,
    ]  # fmt: skip


def all_cases() -> list[Case]:
    """Return every case."""
    makers = (
        _safetensors, _pickles, _folders, _indices, _onnx, _artifacts, _states, _plans, _recipes,
        _profiles, _options, _lists, _loras,
    )  # fmt: skip
    return [case for maker in makers for case in maker()]


# Checkpoints -------------------------------------------------------------------------------------

WEIGHT, BIAS, TABLE = "blocks.0.mlp.fc1.weight", "blocks.1.attn.qkv.bias", "pos_embed"
LABELS, PATCH = "y_embedder.embedding_table.weight", "x_embedder.proj.weight"


def _with(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {**state, name: change(state[name])}


def _valued(name: str, value: float) -> Callable[[dict[str, Any]], Any]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        changed.view(-1)[3] = value
        return changed

    return _with(name, change)


STATE_CHANGES: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("names", "one tensor missing", lambda s: {n: t for n, t in s.items() if n != BIAS}),
    ("names", "one more", lambda s: {**s, "blocks.0.more": torch.zeros(3)}),
    ("names", "half a block", lambda s: {n: t for n, t in s.items() if "s.1.a" not in n}),
    ("names", "a gap between blocks", lambda s: {n.replace("blocks.1", "blocks.7"): t
                                                 for n, t in s.items()}),
    ("names", "control characters", lambda s: {**s, "blocks.0.\x1b[31m\nx": torch.zeros(3)}),
    ("names", "100 000 characters", lambda s: {**s, "blocks.0." + "x" * 100_000: torch.zeros(3)}),
    ("names", "2000 blocks", lambda s: {**s, **{f"blocks.{i}.{j}": torch.zeros(1)
                                                for i in range(2, 2000) for j in range(4)}}),
    ("names", "no blocks at all", lambda s: {n: t for n, t in s.items() if "blocks" not in n}),
    ("shapes", "a bias one short", _with(BIAS, lambda t: t[:-1].clone())),
    ("shapes", "a weight turned", _with(WEIGHT, lambda t: t.T.contiguous())),
    ("shapes", "a flat patch weight", _with(PATCH, lambda t: t.flatten().clone())),
    ("shapes", "an empty label table", _with(LABELS, lambda t: t[:0].clone())),
    ("shapes", "an empty weight", _with(WEIGHT, lambda t: t[:0].clone())),
    ("shapes", "positions of no square", _with(TABLE, lambda t: t[:, :-1].clone())),
    ("shapes", "a scalar", _with(BIAS, lambda t: torch.tensor(1.0))),
    ("shapes", "one dimension more", _with(WEIGHT, lambda t: t[None].clone())),
    ("element types", "whole numbers", _with(WEIGHT, lambda t: t.int())),
    ("element types", "truth values", _with(BIAS, lambda t: t > 0)),
    ("element types", "bytes", _with(TABLE, lambda t: t.to(torch.uint8))),
    ("element types", "64-bit whole numbers", _with(PATCH, lambda t: t.long())),
    ("values", "NaN", _valued(WEIGHT, float("nan"))),
    ("values", "infinity", _valued(BIAS, float("inf"))),
    ("values", "minus infinity in positions", _valued(TABLE, -float("inf"))),
    ("values", "1e300 in float64", _with(WEIGHT, lambda t: t.double() * 1e300)),
    ("values", "-1e39 in float64", _with(LABELS, lambda t: torch.full_like(t, -1e39,
                                                                         dtype=torch.float64))),
]  # fmt: skip

SOUND_STATES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("float32", lambda s: s),
    ("float16", lambda s: {n: t.half() for n, t in s.items()}),
    ("bfloat16", lambda s: {n: t.bfloat16() for n, t in s.items()}),
    ("float64", lambda s: {n: t.double() for n, t in s.items()}),
    ("a prefix", lambda s: {f"module.{n}": t for n, t in s.items()}),
    ("one weight in float8", _with(WEIGHT, lambda t: t.to(torch.float8_e4m3fn))),
    ("names in another order", lambda s: dict(reversed(s.items()))),
]


def _written(change: Callable[[dict[str, Any]], Any], **metadata: str) -> Make:
    def make(folder: Path) -> list[str]:
        path = folder / "model.safetensors"
        save_file(change(bases.state_dict()), path, metadata={"num_heads": "4"} | metadata)
        return sample_of(path)

    return make


def _raw(raw: bytes | Callable[[bytes], bytes], name: str = "model.safetensors") -> Make:
    def make(folder: Path) -> list[str]:
        path = folder / name
        whole = bases.checkpoint(folder).read_bytes()
        path.write_bytes(raw if isinstance(raw, bytes) else raw(whole))
        return sample_of(path)

    return make


def _header(text: str, *, length: int | None = None) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


IMPOSTORS = {
    "empty": b"",
    "zeros": bytes(4096),
    "a web page": b"<!DOCTYPE html><html><body>log in</body></html>",
    "a git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\nsize 12345\n",
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "random bytes": bytes(range(7, 250)) * 4,
    "JSON": b'{"error": "not found"}',
    "nested JSON": DEEP.encode(),
}


def _safetensors() -> Iterator[Case]:
    loader = "safetensors"
    for kind, name, change in STATE_CHANGES:
        yield Case(loader=loader, kind=kind, name=name, make=_written(change))
    for name, change in SOUND_STATES:
        make = _written(change)
        yield Case(loader=loader, kind="sound", name=name, make=make, is_sound=True)
    for heads in ("0", "-1", "5", "²", "1e9", DIGITS, "true", "", "[4]"):
        make = _written(lambda s: s, num_heads=heads)
        yield Case(loader=loader, kind="records", name=f"heads {heads[:9]!r}", make=make)
    for field, value in (("num_classes", "11000000"), ("num_classes", "-1"), ("input_size", "0"),
                         ("layer_norm_eps", "nan"), ("beta_end", "2"), ("depth", "3"),
                         ("family", "flux"), ("family", '["sit"]'), ("path_type", "GVP"),
                         ("path_type", "[1]"), ("prediction", "velocity")):  # fmt: skip
        make = _written(lambda s: s, **{field: value})
        yield Case(loader=loader, kind="records", name=f"{field} {value}", make=make)
    for name, raw in IMPOSTORS.items():
        yield Case(loader=loader, kind="other files", name=name, make=_raw(raw))
    headers = {
        "longer than the file": _header("{}", length=10**6),
        "of 2^63 bytes": _header("{}", length=2**63),
        "of no JSON": _header("{nothing"),
        "a list": _header("[]"),
        "nested": _header('{"a":' * 50_000),
        "a tensor past the end": _header(
            '{"a":{"dtype":"F32","shape":[1000000000],"data_offsets":[0,4000000000]}}'),
        "a negative offset": _header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}'),
        "a size that overflows": _header(
            '{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
        "an unknown type": _header('{"a":{"dtype":"F33","shape":[0],"data_offsets":[0,0]}}'),
    }  # fmt: skip
    for name, raw in headers.items():
        yield Case(loader=loader, kind="headers", name=name, make=_raw(raw))
    for share in (0.001, 0.01, 0.5, 0.999):
        make = _raw(lambda whole, share=share: whole[: int(len(whole) * share)])
        yield Case(loader=loader, kind="cut short", name=f"{share:.1%}", make=make)
    many = lambda s: {**s, **{f"blocks.0.{i}": torch.zeros(0) for i in range(250_000)}}  # noqa: E731
    yield Case(loader=loader, kind="sizes", name="250 000 empty tensors", make=_written(many),
               needs_limits=True)  # fmt: skip


class _Calls:
    """A pickle that asks for a call."""

    def __init__(self, what: Callable[..., Any], *args: Any) -> None:
        self.what, self.args = what, args

    def __reduce__(self) -> Any:
        return self.what, self.args


def _saved(content: Callable[[dict[str, Any], Path], Any], **options: Any) -> Make:
    def make(folder: Path) -> list[str]:
        path = folder / "model.pt"
        torch.save(content(bases.state_dict(), folder), path, **options)
        return sample_of(path, "--num-heads", "4")

    return make


def _nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(depth):
        inner = {"model": inner}
    return inner


def _pickles() -> Iterator[Case]:
    loader = "torch.save"
    for kind, name, change in STATE_CHANGES:
        make = _saved(lambda s, _, change=change: change(s))
        yield Case(loader=loader, kind=kind, name=name, make=make)
    for name, change in SOUND_STATES:
        make = _saved(lambda s, _, change=change: change(s))
        yield Case(loader=loader, kind="sound", name=name, make=make, is_sound=True)
    sound: dict[str, Any] = {
        "an average": lambda s, _: {"ema": s, "model": {n: t + 1 for n, t in s.items()}},
        "an optimizer beside": lambda s, _: {"model": s, "opt": {"state": {0: torch.ones(3)}}},
        "a call that is left out": lambda s, f: {"model": s, "args": _Calls(
            os.system, f"touch {f / 'ran'}")},
    }  # fmt: skip
    for name, content in sound.items():
        yield Case(loader=loader, kind="sound", name=name, make=_saved(content), is_sound=True)
    old = _saved(lambda s, _: s, _use_new_zipfile_serialization=False)
    yield Case(loader=loader, kind="sound", name="the older stream", make=old, is_sound=True)
    odd: dict[tuple[str, str], Any] = {
        ("code", "instead of weights"): lambda s, f: _Calls(os.system, f"touch {f / 'ran'}"),
        ("code", "in the place of a tensor"): lambda s, f: {**s, WEIGHT: _Calls(
            torch.ones, 384, 96)},
        ("code", "eval"): lambda s, f: _Calls(eval, f"open({str(f / 'ran')!r}, 'w')"),
        ("code", "a nested call"): lambda s, f: [_Calls(os.mkdir, str(f / "ran"))],
        ("strides", "a row for all rows"): lambda s, _: {
            **s, WEIGHT: s[WEIGHT][:1].clone().expand(384, 96)},
        ("strides", "10^8 rows of one"): lambda s, _: {
            **s, LABELS: torch.zeros(1, 96).expand(10**8, 96)},
        ("strides", "one number for all"): lambda s, _: {
            n: torch.zeros(1).expand(t.shape) for n, t in s.items()},
        ("strides", "positions of 10^9"): lambda s, _: {
            **s, TABLE: torch.zeros(1, 1, 96).expand(1, 10**9, 96)},
        ("strides", "a bias of stride 0"): lambda s, _: {
            **s, BIAS: torch.zeros(1).expand(288)},
        ("odd tensors", "sparse"): lambda s, _: {**s, WEIGHT: s[WEIGHT].to_sparse()},
        ("odd tensors", "meta"): lambda s, _: {**s, WEIGHT: s[WEIGHT].to("meta")},
        ("odd tensors", "quantized"): lambda s, _: {**s, WEIGHT: torch.quantize_per_tensor(
            s[WEIGHT], 0.1, 0, torch.qint8)},
        ("odd tensors", "complex"): lambda s, _: {**s, WEIGHT: s[WEIGHT].to(torch.complex64)},
        ("odd tensors", "compressed rows"): lambda s, _: {**s, WEIGHT: s[WEIGHT].to_sparse_csr()},
        ("contents", "a list"): lambda s, _: list(s.values()),
        ("contents", "a number"): lambda s, _: 5,
        ("contents", "nothing"): lambda s, _: None,
        ("contents", "an empty dict"): lambda s, _: {},
        ("contents", "a tensor"): lambda s, _: s[WEIGHT],
        ("contents", "numbers by name"): lambda s, _: dict.fromkeys(s, 1.0),
        ("nesting", "50 parts"): lambda s, _: _nested(50),
        ("nesting", "400 parts"): lambda s, _: _nested(400),
        ("nesting", "lists in lists"): lambda s, _: {"model": json.loads("[" * 300 + "]" * 300)},
        ("records", "JSON nested"): lambda s, _: {**s, BIAS: DEEP},
        ("records", "heads of 400 digits"): lambda s, _: {
            "model": s, "args": {"num_heads": 10**400}},
        ("records", "a path that is a tensor"): lambda s, _: {
            "model": s, "args": {"path_type": torch.ones(()), "prediction": torch.ones(())}},
        ("records", "projectors of a DiT"): lambda s, _: {
            **s, "projectors.0.0.weight": s[WEIGHT], "args": {"family": "dit"}},
    }  # fmt: skip
    for (kind, name), content in odd.items():
        yield Case(loader=loader, kind=kind, name=name, make=_saved(content))

    def itself(folder: Path) -> list[str]:
        content: dict[str, Any] = {}
        content["model"] = content
        path = folder / "model.pt"
        torch.save(content, path)
        return sample_of(path)

    yield Case(loader=loader, kind="nesting", name="itself", make=itself)
    zips: dict[str, Callable[[bytes], bytes]] = {
        "half": lambda raw: raw[: len(raw) // 2],
        "without its end": lambda raw: raw[:-30],
        "a plain pickle": lambda raw: pickle.dumps({"a": 1}),
        "a pickle that runs": lambda raw: pickle.dumps(_Calls(os.system, "true")),
        "a zip of nothing": lambda raw: b"PK\x05\x06" + bytes(18),
        "zeros inside": lambda raw: raw[:100] + bytes(400) + raw[500:],
    }
    for name, change in zips.items():

        def make(folder: Path, change: Callable[[bytes], bytes] = change) -> list[str]:
            path = folder / "model.pt"
            torch.save(bases.state_dict(), path)
            path.write_bytes(change(path.read_bytes()))
            return sample_of(path)

        yield Case(loader=loader, kind="cut short", name=name, make=make)


# Folders -----------------------------------------------------------------------------------------

FOLDER_VALUES: list[tuple[str, str, Any]] = [
    *(("transformer/config.json", "sample_size", v) for v in (0, -1, "8", 10**9, [8, 9], True)),
    *(("transformer/config.json", "patch_size", v) for v in (0, -2, 3, 2.0)),
    *(("transformer/config.json", "num_layers", v) for v in (0, 10**7, True, "2")),
    *(("transformer/config.json", "num_attention_heads", v) for v in (0, 5, 10**30)),
    *(("transformer/config.json", "norm_eps", v) for v in (-1.0, "x", 0.0)),
    *(("transformer/config.json", "_class_name", v) for v in ("UNet2DModel", 5, None, ["x"])),
    *(("transformer/config.json", "num_embeds_ada_norm", v) for v in (0, 9, 10**12)),
    ("transformer/config.json", "out_channels", 5),
    ("transformer/config.json", "norm_type", "layer_norm"),
    *(("scheduler/scheduler_config.json", "beta_end", v) for v in ("x", 2.0, -1.0)),
    *(("scheduler/scheduler_config.json", "num_train_timesteps", v) for v in (0, 1.5, 10**9)),
    ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
    ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler"),
    *(("vae/config.json", "scaling_factor", v) for v in (0, -1.0, "x", 10**400)),
]  # fmt: skip

JSON_TEXTS = {
    "nested": DEEP.encode(),
    "nested names": b'{"a":' * 100_000,
    "Latin-1": '{"ü": 1}'.encode("latin-1"),
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "a list": b"[1, 2]",
    "text": b"hello",
    "empty": b"",
    "5000 digits": b'{"sample_size": ' + DIGITS.encode() + b"}",
}


def _folder(change: Callable[[Path], None]) -> Make:
    def make(folder: Path) -> list[str]:
        path = bases.pipeline(folder)
        change(path)
        return sample_of(path)

    return make


def _edit(name: str, key: str, value: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps({**content, key: value}))

    return change


def _folders() -> Iterator[Case]:
    loader = "diffusers folder"
    for file, key, value in FOLDER_VALUES:
        name = f"{key} {str(value)[:12]}"
        yield Case(loader=loader, kind="values", name=name, make=_folder(_edit(file, key, value)))
    for file in ("transformer/config.json", "scheduler/scheduler_config.json"):
        for name, raw in JSON_TEXTS.items():
            make = _folder(lambda p, f=file, r=raw: (p / f).write_bytes(r) and None)
            yield Case(loader=loader, kind="texts", name=f"{file} {name}", make=make)
    sound: dict[str, Callable[[Path], None]] = {
        "as it is": lambda p: None,
        "a byte order mark": lambda p: (p / "transformer/config.json").write_bytes(
            b"\xef\xbb\xbf" + json.dumps(bases.CONFIG).encode()) and None,
        "an unknown entry": _edit("transformer/config.json", "_more", [1, 2]),
        "a square size": _edit("transformer/config.json", "sample_size", [8, 8]),
        "no VAE": lambda p: (p / "vae/config.json").unlink(),
    }  # fmt: skip
    for name, change in sound.items():
        yield Case(loader=loader, kind="sound", name=name, make=_folder(change), is_sound=True)


INDEX_TEXTS: dict[str, bytes] = {
    "no map": b"{}",
    "an empty map": b'{"weight_map": {}}',
    "a list": b'{"weight_map": ["a"]}',
    "a number": b'{"weight_map": 5}',
    "null": b'{"weight_map": null}',
    "a number as a shard": b'{"weight_map": {"a": 5}}',
    "null as a shard": b'{"weight_map": {"a": null}}',
    "a folder above": b'{"weight_map": {"a": "../../secret.safetensors"}}',
    "an absolute name": b'{"weight_map": {"a": "/etc/passwd"}}',
    "itself": b'{"weight_map": {"a": "model.safetensors.index.json"}}',
    "an empty name": b'{"weight_map": {"a": ""}}',
    "a NUL": b'{"weight_map": {"a": "x\\u0000y"}}',
    "300 characters": b'{"weight_map": {"a": "' + b"x" * 300 + b'"}}',
    "a missing shard": b'{"weight_map": {"a": "no.safetensors"}}',
    "nested": b'{"weight_map": ' + DEEP.encode(),
    "no JSON": b'{"weight_map": ',
    "UTF-16": '{"weight_map": {}}'.encode("utf-16-le"),
    "a shard that is a list": b'{"weight_map": {"a": ["b"]}}',
}


def _indices() -> Iterator[Case]:
    loader = "index file"

    def written(raw: bytes | None) -> Make:
        def make(folder: Path) -> list[str]:
            state, path = bases.state_dict(), folder / "model.safetensors.index.json"
            names = {name: f"{index % 2}.safetensors" for index, name in enumerate(state)}
            for shard in ("0.safetensors", "1.safetensors"):
                part = {name: state[name] for name, file in names.items() if file == shard}
                save_file(part, folder / shard)
            path.write_bytes(json.dumps({"weight_map": names}).encode() if raw is None else raw)
            return sample_of(path, "--num-heads", "4")

        return make

    for name, raw in INDEX_TEXTS.items():
        yield Case(loader=loader, kind="index", name=name, make=written(raw))
    yield Case(loader=loader, kind="sound", name="two shards", make=written(None), is_sound=True)


# Exported files ----------------------------------------------------------------------------------

CONFIG_VALUES: list[tuple[str, Any]] = [
    *(("num_classes", v) for v in (9, 11, 0, -1, 1.5, "10", None, True, 10**30)),
    *(("depth", v) for v in (0, 1, 3, -1, 10**7, "2")),
    *(("patch_size", v) for v in (0, -2, 1, 4)),
    *(("num_heads", v) for v in (0, -4, 5)),
    *(("input_size", v) for v in (0, 16, 10**9)),
    *(("in_channels", v) for v in (0, 4)),
    *(("hidden_size", v) for v in (0, 48, 10**6)),
    ("mlp_ratio", 0), ("mlp_ratio", float("nan")), ("layer_norm_eps", -1), ("null_row", 1),
    ("learn_sigma", False), ("process", None), ("process", {"beta_start": 2}), ("more", 1),
]  # fmt: skip


def _metadata(key: str, value: str | None) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        kept = {e.key: e.value for e in model.metadata_props if e.key != f"ditas_export.{key}"}
        kept |= {} if value is None else {f"ditas_export.{key}": value}
        onnx.helper.set_model_props(model, kept)

    return change


def _config(field: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        found = {e.key: e.value for e in model.metadata_props}
        config = json.loads(found["ditas_export.config"]) | {field: value}
        _metadata("config", json.dumps(config))(model)
        _metadata("identity", None)(model)

    return change


def _form(field: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        found = {e.key: e.value for e in model.metadata_props}
        form = json.loads(found["ditas_export.form"]) | {field: value}
        _metadata("form", json.dumps(form))(model)

    return change


def _renamed(old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        graph = model.graph
        for value in (*graph.input, *graph.output, *graph.initializer):
            value.name = new if value.name == old else value.name
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == old else name for name in names]

    return change


def _retyped(index: int, kind: int) -> Callable[[onnx.ModelProto], None]:
    return lambda m: setattr(m.graph.input[index].type.tensor_type, "elem_type", kind)


def _external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for name, told in ({"location": "x.data", "offset": "0"} | {key: value}).items():
            tensor.external_data.add(key=name, value=told)

    return change


def _one_more_dimension(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 1


GRAPH_CHANGES: list[tuple[str, str, Callable[[onnx.ModelProto], Any]]] = [
    ("interface", "an input renamed", _renamed("latents", "x")),
    ("interface", "labels renamed", _renamed("class_labels", "y")),
    ("interface", "the output renamed", _renamed("model_output", "z")),
    ("interface", "no output", lambda m: m.graph.output.pop()),
    ("interface", "one more output", lambda m: m.graph.output.add(name="pos_embed")),
    ("interface", "one input fewer", lambda m: m.graph.input.pop(1)),
    ("interface", "steps of 32 bits", _retyped(1, onnx.TensorProto.INT32)),
    ("interface", "latents of 64 bits", _retyped(0, onnx.TensorProto.DOUBLE)),
    ("interface", "latents of no type", _retyped(0, 0)),
    ("interface", "latents of a type that is none", _retyped(0, 99)),
    ("interface", "one dimension more", _one_more_dimension),
    ("tables", "the label table renamed", _renamed(LABELS, "labels")),
    ("tables", "positions renamed", _renamed("pos_embed", "p")),
    ("external data", "a folder above", _external("location", "../x.data")),
    ("external data", "an absolute name", _external("location", "/etc/passwd")),
    ("external data", "an offset of letters", _external("offset", "abc")),
    ("external data", "a negative offset", _external("offset", "-4")),
    ("external data", "no such file", _external("length", "4")),
    ("external data", "5000 digits", _external("offset", DIGITS)),
    ("records", "no configuration", _metadata("config", None)),
    ("records", "an empty configuration", _metadata("config", "")),
    ("records", "a configuration nested", _metadata("config", DEEP)),
    ("records", "a list", _metadata("config", "[]")),
    ("records", "an identity of another", _metadata("identity", '{"tensors_sha256": "' + "0" * 64
                                                    + '", "fingerprint": "0"}')),
    ("records", "an identity nested", _metadata("identity", DEEP)),
    ("records", "an identity of numbers", _metadata("identity", '{"tensors_sha256": 5}')),
    ("form", "null", _metadata("form", "null")),
    ("form", "a list", _metadata("form", "[]")),
    ("form", "a number", _metadata("form", "5")),
    ("form", "nested", _metadata("form", DEEP)),
    ("form", "none", _metadata("form", None)),
    ("form", "an empty one", _metadata("form", "{}")),
    ("form", "bits of text", _form("weight_bits", "4")),
    ("form", "3 bits", _form("weight_bits", 3)),
    ("form", "an unknown target", _form("target", "npu")),
    ("form", "an unknown name", _form("more", 1)),
    ("form", "a float type of none", _form("float_type", "fp8")),
]  # fmt: skip


def _model(change: Callable[[onnx.ModelProto], Any], command: str) -> Make:
    def make(folder: Path) -> list[str]:
        model, path = bases.onnx_model(), folder / "model.onnx"
        change(model)
        path.write_bytes(model.SerializeToString())
        return _onnx_command(command, path)

    return make


def _onnx_command(command: str, path: Path) -> list[str]:
    if command == "build":
        return ["build", str(path), "--dry-run"]
    if command == "compare":
        words = ["--steps", "2", "--images", "1", "--no-linears", "--quiet"]
        return ["compare", str(bases.reference()), str(path), *words]
    return sample_of(path, "--runtime", "onnxruntime")


def _onnx() -> Iterator[Case]:
    for command in ("sample", "build", "compare"):
        loader = f"ONNX, ditas-{command}"
        for field, value in CONFIG_VALUES[:: 1 if command == "sample" else 3]:
            make = _model(_config(field, value), command)
            name = f"{field} {str(value)[:12]}"
            yield Case(loader=loader, kind="configuration", name=name, make=make)
        for kind, name, change in GRAPH_CHANGES:
            if command == "compare" and kind == "form":
                continue  # it reads the float type alone
            yield Case(loader=loader, kind=kind, name=name, make=_model(change, command))
        make = _model(lambda m: None, command)
        yield Case(loader=loader, kind="sound", name="as it is", make=make, is_sound=True)
        more = _model(_metadata("note", "of another tool"), command)
        yield Case(loader=loader, kind="sound", name="more metadata", make=more, is_sound=True)
    for name, raw in IMPOSTORS.items():

        def make_raw(folder: Path, raw: bytes = raw) -> list[str]:
            path = folder / "model.onnx"
            path.write_bytes(raw)
            return _onnx_command("sample", path)

        yield Case(loader="ONNX, ditas-sample", kind="other files", name=name, make=make_raw)


# Quantized models and states ---------------------------------------------------------------------

ARTIFACT_VALUES: list[tuple[str, Any]] = [
    ("identity/config/num_heads", 0), ("identity/config/depth", 10**7),
    ("identity/config/depth", 3), ("identity/config/mlp_ratio", 2), ("identity/config", None),
    ("identity/config/hidden_size", "96"), ("identity/tensors_sha256", 5), ("identity", DROP),
    ("identity", []), ("linears", DROP), ("linears", {}), ("linears", []),
    ("linears/blocks.0.attn.qkv", DROP), ("linears/blocks.0.attn.qkv", 5),
    ("linears/blocks.0.attn.qkv/bits", 3), ("linears/blocks.0.attn.qkv/bits", "4"),
    ("linears/blocks.0.attn.qkv/bits", 8), ("linears/blocks.0.attn.qkv/rank", -1),
    ("linears/blocks.0.attn.qkv/rank", 10**9), ("linears/blocks.0.attn.qkv/rank", 0),
    ("linears/blocks.0.attn.qkv/shape", [10**9, 10**9]),
    ("linears/blocks.0.attn.qkv/shape", [288]), ("linears/blocks.0.attn.qkv/shape", "x"),
    ("linears/blocks.0.attn.qkv/alpha", "x"), ("linears/blocks.0.attn.qkv/alpha", [1]),
    ("linears/blocks.0.attn.qkv/output_snr_db", None),
    ("linears/blocks.0.attn.qkv/output_snr_db", "many"),
    ("activation_bits", 4), ("activation_bits", "8"), ("activation_bits", DROP),
    ("adaln_bits", 4), ("adaln_bits", 3), ("adaln_bits", None),
    ("settings", DROP), ("settings", 5), ("settings/ranges", "x"), ("settings/ranges", ["token"]),
    ("settings/ranges", DROP), ("settings/calibration", 5),
    ("settings/calibration", {"steps": "4"}), ("settings/calibration", {"classes": [99]}),
    ("settings/alpha_grid", "x"), ("provenance", DROP), ("provenance", 5), ("more", 1),
]  # fmt: skip

STATES_VALUES: list[tuple[str, Any]] = [
    ("settings", DROP), ("settings", 5), ("settings/steps", "4"), ("settings/steps", 5),
    ("settings/steps", 10**9), ("settings/steps", True), ("settings/steps", 1),
    ("settings/classes", [99, 1]), ("settings/classes", []), ("settings/classes", 5),
    ("settings/classes", [1, 2, 3]), ("settings/classes", [-1, 1]),
    ("settings/classes", [1, "2"]), ("settings/classes", None),
    ("settings/cfg_scale", "x"), ("settings/cfg_scale", -1), ("settings/cfg_scale", 0.5),
    ("settings/cfg_scale", 10**400), ("settings/seed", -1), ("settings/seed", 2**64),
    ("settings/precision", "fp8"), ("settings/more", 1), ("identity", DROP), ("identity", 5),
    ("identity/config/depth", 10**7), ("identity/config/num_heads", 0), ("more", 1),
]  # fmt: skip


def _change(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda tensors: {**tensors, name: change(tensors[name]).contiguous()}


QKV = "blocks.0.attn.qkv"
ARTIFACT_TENSORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("shapes", "a bias one short"): _change(f"{QKV}.bias", lambda t: t[:-1]),
    ("shapes", "codes one short"): _change(f"{QKV}.codes", lambda t: t[:-1]),
    ("shapes", "a float parameter one short"): _change("float.pos_embed", lambda t: t[:, :-1]),
    ("shapes", "no ranges"): _change(f"{QKV}.step_ranges", lambda t: t[:0]),
    ("shapes", "multipliers that do not divide"): _change(
        f"{QKV}.multipliers", lambda t: torch.ones(288, 5, dtype=torch.int8)),
    ("shapes", "no multipliers"): _change(f"{QKV}.multipliers", lambda t: t[:, :0]),
    ("names", "a bias missing"): lambda s: {n: t for n, t in s.items() if n != f"{QKV}.bias"},
    ("names", "one more"): lambda s: {**s, "more": torch.zeros(3)},
    ("values", "NaN ranges"): _change(f"{QKV}.step_ranges", lambda t: t * float("nan")),
    ("values", "negative ranges"): _change(f"{QKV}.step_ranges", lambda t: -t),
    ("values", "a negative smoothing scale"): _change(f"{QKV}.smoothing_scale", lambda t: -t),
    ("values", "a smoothing scale of 0"): _change(f"{QKV}.smoothing_scale", torch.zeros_like),
    ("values", "an infinite row scale"): _change(f"{QKV}.row_scale", lambda t: t * float("inf")),
    ("values", "a divisor of 0"): _change(f"{QKV}.low_rank.divisor", torch.zeros_like),
    ("values", "an even divisor"): _change(f"{QKV}.low_rank.divisor", lambda t: t + 1),
    ("values", "multipliers of 0"): _change(f"{QKV}.multipliers", torch.zeros_like),
    ("values", "NaN parameters"): _change("float.pos_embed", lambda t: t * float("nan")),
    ("element types", "codes of 16 bits"): _change(f"{QKV}.codes", lambda t: t.short()),
    ("element types", "a half bias"): _change(f"{QKV}.bias", lambda t: t.half()),
    ("element types", "divisors of 64 bits"): _change(f"{QKV}.low_rank.divisor",
                                                      lambda t: t.long()),
}  # fmt: skip

STATES_TENSORS: dict[tuple[str, str], Callable[..., Any]] = {
    ("names", "no latents"): lambda s: {n: t for n, t in s.items() if n != "latents"},
    ("names", "no steps"): lambda s: {n: t for n, t in s.items() if n != "timesteps"},
    ("names", "a maximum missing"): lambda s: {n: t for n, t in s.items() if QKV not in n},
    ("names", "one more"): lambda s: {**s, "more": torch.zeros(3)},
    ("shapes", "steps one short"): _change("timesteps", lambda t: t[:-1]),
    ("shapes", "latents one short"): _change("latents", lambda t: t[:-1]),
    ("shapes", "latents of another side"): _change("latents", lambda t: t[..., :-1]),
    ("shapes", "a maximum of another width"): _change(f"maxima.{QKV}", lambda t: t[:, :-1]),
    ("values", "NaN latents"): _change("latents", lambda t: t * float("nan")),
    ("values", "infinite maxima"): _change(f"maxima.{QKV}", lambda t: t * float("inf")),
    ("values", "negative maxima"): _change(f"maxima.{QKV}", lambda t: -t),
    ("values", "steps that rise"): _change("timesteps", lambda t: t.flip(0)),
    ("values", "steps beyond the schedule"): _change("timesteps", lambda t: t + 10**6),
    ("values", "negative steps"): _change("timesteps", lambda t: t - 1000),
    ("element types", "float steps"): _change("timesteps", lambda t: t.float()),
    ("element types", "half latents"): _change("latents", lambda t: t.half()),
}


def _kept(
    base: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    file_format: str,
    place: str | None = None,
    value: Any = None,
    change: Callable[..., Any] = lambda tensors: tensors,
) -> Make:
    def make(folder: Path) -> list[str]:
        (tensors, header), path = base(), folder / "kept.safetensors"
        header = header if place is None else replaced(header, place, value)
        save_tensors(path, change(tensors), file_format=file_format, header=header)
        if file_format != STATES_FORMAT:
            return sample_of(path)
        model = bases.checkpoint(folder)
        words = ["--calibration", str(path), "--method", "linear", "--quiet"]
        return ["export", str(folder / "out.onnx"), "--model", str(model), *words]

    return make


def _kept_cases(
    loader: str,
    base: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    file_format: str,
    values: list[tuple[str, Any]],
    tensors: dict[tuple[str, str], Callable[..., Any]],
) -> Iterator[Case]:
    for place, value in values:
        name = f"{place} {'left out' if value is DROP else str(value)[:12]}"
        make = _kept(base, file_format, place, value)
        yield Case(loader=loader, kind="header", name=name, make=make)
    for (kind, name), change in tensors.items():
        make = _kept(base, file_format, change=change)
        yield Case(loader=loader, kind=kind, name=name, make=make)
    make, is_long = _kept(base, file_format), file_format == STATES_FORMAT
    yield Case(loader=loader, kind="sound", name="as it is", make=make, is_sound=True,
               needs_limits=is_long)  # fmt: skip


def _artifacts() -> Iterator[Case]:
    yield from _kept_cases(
        "quantized model", bases.artifact, ARTIFACT_FORMAT, ARTIFACT_VALUES, ARTIFACT_TENSORS
    )


def _states() -> Iterator[Case]:
    yield from _kept_cases(
        "calibration states", bases.states, STATES_FORMAT, STATES_VALUES, STATES_TENSORS
    )


# Plans -------------------------------------------------------------------------------------------

PLAN_VALUES: list[tuple[str, Any]] = [
    ("format", DROP), ("format", 5), ("product", "x"), ("product", ["tensorrt"]),
    ("version", "x"), ("version", 10), ("version", "1." + DIGITS), ("plan_sha256", 5),
    ("plan_sha256", DROP), ("plan_bytes", "6"), ("plan_bytes", -1), ("onnx_name", None),
    ("config", DROP), ("config/num_heads", 0), ("config/depth", 10**7), ("config", 5),
    ("form", None), ("form/float_type", "fp8"), ("options", 5), ("options/batch", None),
    ("options/batch/largest", 0), ("options/batch/usual", "2"), ("options/opt_level", 9),
    ("options/compute_capabilities", "8.9"), ("options/timing_cache", 5), ("gpu", 5),
    ("gpu/name", None), ("gpu/more", 1), ("layers", 5), ("replaces", 5), ("more", 1),
]  # fmt: skip


def _plans() -> Iterator[Case]:
    loader = "plan"

    def written(change: Callable[[dict[str, Any]], Any] | bytes) -> Make:
        def make(folder: Path) -> list[str]:
            path, known = bases.plan(folder)
            raw = change if isinstance(change, bytes) else json.dumps(change(known)).encode()
            path.with_name("out.plan.json").write_bytes(raw)
            return ["plan", str(path)]

        return make

    for place, value in PLAN_VALUES:
        make = written(lambda known, p=place, v=value: replaced(known, p, v))
        name = f"{place} {'left out' if value is DROP else str(value)[:12]}"
        yield Case(loader=loader, kind="metadata", name=name, make=make)
    for name, raw in JSON_TEXTS.items():
        yield Case(loader=loader, kind="texts", name=name, make=written(raw))
    make = written(lambda known: known)
    yield Case(loader=loader, kind="sound", name="as it is", make=make, is_sound=True)


# Options -----------------------------------------------------------------------------------------

RECIPES: dict[str, list[str | bytes]] = {
    "values": [
        "samples: many", "samples: 0", "samples: -1", "samples: 1.5", "samples: true", "w: [4]",
        "w: {a: 1}", "a: .inf", "cfg-scale: .nan", "cfg-scale: [1]", "cfg-scale: x", "seed: -1",
        "seed: 18446744073709551616", "seed: true", "rank: ²", "rank: -1", "rank: 1.5",
        "alpha-grid: 5", "alpha-grid: [a]", "alpha-grid: [.nan]", "alpha-grid: []",
        "save-artifact: 5", "save-artifact: [a]", "save-artifact: true", "method: 5",
        "method: [lin]", "steps: 1", "steps: 9223372036854775808", "fast: maybe", "fast: 1",
        "device: 5", "target: [portable]", "walk-tokens: 0", "min-db: .inf", "adaln: 4.0",
        "block-size: 0", "classes: {1: 2}", "classes: true", "classes: [[1], 2]",
        "num-heads: 0", f"seed: {DIGITS}", "betas: {a: 1}", "layout: null\nranges: 5",
    ],
    "YAML": [
        "", "5", "- a", "samples", "a: b: c", "samples: 1\nsamples: 2", "samples: !!python/tuple 5",
        "samples: !!int x", "seed: !!timestamp 5", "x: 1", "5: 6", "[a]: 1", "samples: *a",
        "samples: &a [*a]", "classes: 2024-01-01", "seed: !!binary AAAA", "w: !!float ''",
        "cfg_scale: 1\ncfg-scale: 2", "seed: \x00", "? {a: 1}\n: 2", "fast: !!bool x",
    ],
    "nesting": [f"classes: {DEEP}", "classes: " + "{a: " * 5000, "a: &a [1]\nclasses: [*a, *a]"],
    "texts": [
        "samples: 1".encode("utf-16"), "# ü\nsamples: 1".encode("latin-1"), b"\xff\xfe\x00",
        b"samples: 1" + b"\n#" * 600_000, b"\x89PNG\r\n\x1a\n" + bytes(50),
    ],
}  # fmt: skip

SOUND_RECIPES = [
    "classes: [1, 2]", "classes: 5", "classes: 3,7", "cfg-scale: 1e1", "cfg-scale: 2",
    "alpha-grid: 0.5", "alpha-grid: [0, 0.5, 1]", "alpha-grid: 0,0.5", "rank: auto", "rank: '8'",
    "rank: 8", "method: null", "seed: null\nmodel: null", "samples: 2\nfast: true", "# none\na: 8",
    "steps: '4'",
]  # fmt: skip

PROFILES: dict[str, list[str]] = {
    "values": [
        "opt-level: .inf", "opt-level: 9", "opt-level: high", "opt-level: true", "opt-level: 2.5",
        "workspace: -1", "workspace: .nan", "workspace: true", "workspace: [1]", "backend: 5",
        "backend: npu", "batch: 1", "batch: 3,2,1", "batch: [1, 2]", "batch: [a, b, c]",
        "batch: 0,1,2", "batch: ².,2,3", f"batch: 1,2,{DIGITS}", "layout: fp16", "refit: maybe",
        "timing-cache: 5", "compute-capability: x", "compute-capability: 89",
        "compute-capability: [8.9, x]", "as-is: 1", "version-compatible: 'yes'",
    ],
    "YAML": ["", "5", "x: 1", "batch: *b", "batch: 1,2,3\nbatch: 1,2,8", "batch: !!int x"],
}  # fmt: skip

SOUND_PROFILES = [
    "batch: 1,2,8", "batch: [1, 2, 8]", "workspace: 1e1", "workspace: 8", "opt-level: '3'",
    "layout: int8", "compute-capability: 8.9\nbackend: rtx", "refit: null",
    "compute-capability: [8.9, 12.0]\nbackend: rtx",
]  # fmt: skip


def _text_case(folder: Path, text: str | bytes) -> Path:
    path = folder / "options.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def _recipes() -> Iterator[Case]:
    def written(text: str | bytes) -> Make:
        def make(folder: Path) -> list[str]:
            path = _text_case(folder, text)
            return ["recipe", str(path)]

        return make

    for kind, texts in RECIPES.items():
        for text in texts:
            name = repr(text[:24])
            yield Case(loader="recipe", kind=kind, name=name, make=written(text))
    for text in SOUND_RECIPES:
        yield Case(loader="recipe", kind="sound", name=text, make=written(text), is_sound=True)
    for name in ("x" * 300, "a/../../b", "no\x00name", "../calib/digits", ".", "/dev/null"):
        make: Make = lambda folder, name=name: ["recipe", name]  # noqa: E731
        yield Case(loader="recipe", kind="paths", name=name[:20], make=make)


def _profiles() -> Iterator[Case]:
    def written(text: str) -> Make:
        def make(folder: Path) -> list[str]:
            path = folder / "model.onnx"
            path.write_bytes(bases.onnx_model().SerializeToString())
            return ["build", str(path), "--dry-run", "--profile", str(_text_case(folder, text))]

        return make

    for kind, texts in PROFILES.items():
        for text in texts:
            yield Case(loader="profile", kind=kind, name=text[:24], make=written(text))
    for text in SOUND_PROFILES:
        yield Case(loader="profile", kind="sound", name=text, make=written(text), is_sound=True)


OPTIONS: dict[str, list[list[str]]] = {
    "export": [
        ["--seed", "18446744073709551616"], ["--seed", "-1"], ["--seed", DIGITS], ["--seed", "1.5"],
        ["--rank", "²"], ["--rank", DIGITS], ["--rank", "-1"], ["--rank", "١"],
        ["--samples", "0"], ["--samples", "1000000000"], ["--samples", "99999999999999"],
        ["--samples", "-5"], ["--steps", "0"], ["--steps", "1"], ["--steps", "100000000"],
        ["--cfg-scale", "nan"], ["--cfg-scale", "inf"], ["--cfg-scale", "-1"],
        ["--min-db", "nan"], ["--min-db", "inf"], ["--alpha-grid", "nan"], ["--alpha-grid", ""],
        ["--alpha-grid", "2"], ["--alpha-grid", "1,,x"], ["--walk-tokens", "0"],
        ["--walk-tokens", "99999999999999999999"], ["--num-heads", "0"], ["--num-heads", "-4"],
        ["--num-classes", "-1"], ["--num-classes", "99999999999"], ["--block-size", "7"],
        ["--w", "3"], ["--a", "4"], ["--adaln", "5"], ["--classes", "²"], ["--classes", DIGITS],
        ["--classes", "0-99999999999"], ["--betas", "linear,nan,1"], ["--device", "cuda:x"],
        ["--betas", "linear,²"], ["--betas", f"linear,0.1,0.2,{DIGITS}"], ["--family", "flux"],
        ["--family", ""], ["--family", "sit", "--betas", "linear"], ["--lora-alpha", "2"],
        ["--lora-alpha", "nan"], ["--lora-alpha", "0"], ["--lora", "/dev/null"], ["--lora", ""],
    ],
    "sample": [
        ["--threads", "2147483648"], ["--threads", "0"], ["--threads", "-1"],
        ["--images", "1000000000"], ["--images", "0"], ["--batch", "0"],
        ["--batch", "1000000000"], ["--seed", "-1"], ["--seed", "18446744073709551616"],
        ["--classes", "99"], ["--classes", "٣"], ["--classes", "-"], ["--steps", "0"],
        ["--steps", "1000000"], ["--cfg-scale", "nan"], ["--cfg-channels", "4"],
        ["--sampler", "x"], ["--sampler", "euler"], ["--device", "tpu"], ["--num-heads", "5"],
        ["--family", "DiT"],
        ["--shift", "nan"], ["--shift", "3"], ["--guidance-interval", "0.5"],
        ["--guidance-interval", "1,0"], ["--guidance-interval", "nan,1"],
        ["--guidance-interval", "0,²"], ["--guidance-interval", ""],
    ],
    "compare": [
        ["--images", "0"], ["--images", "1000000000"], ["--steps", "0"], ["--seed", "-1"],
        ["--linear-db", "nan"], ["--threshold-db", "inf"], ["--classes", DIGITS],
    ],
}  # fmt: skip


def _options() -> Iterator[Case]:
    for command, each in OPTIONS.items():
        for words in each:

            def make(folder: Path, command: str = command, words: list[str] = words) -> list[str]:
                if command == "compare":
                    pair = [str(bases.reference()), str(bases.reference())]
                    return ["compare", *pair, "--no-linears", "--quiet", *words]
                model = str(bases.checkpoint(folder))
                if command == "sample":
                    return ["sample", model, "-o", str(folder / "images"), "--quiet", *words]
                return ["export", str(folder / "out.onnx"), "--model", model, "--quiet", *words]

            name = " ".join(words)[:30]
            yield Case(loader=f"options of {command}", kind="numbers", name=name, make=make)


LISTS = [b"", b"a b", b"1 2 3", b"-1 2", b"1 \xff", "1 ²".encode(), DIGITS.encode(), b"99999 1",
         "1 2".encode("utf-16"), bytes(100)]  # fmt: skip


def _lists() -> Iterator[Case]:
    def written(raw: bytes) -> Make:
        def make(folder: Path) -> list[str]:
            (folder / "wanted.txt").write_bytes(raw)
            model = bases.checkpoint(folder)
            words = ["--list", str(folder / "wanted.txt"), "--steps", "2", "--quiet"]
            return ["sample", str(model), "-o", str(folder / "images"), *words]

        return make

    for raw in LISTS:
        yield Case(loader="list of images", kind="lists", name=repr(raw[:12]), make=written(raw))
    sound = written(b"1 5\n# more\n2, 7\n")
    yield Case(loader="list of images", kind="sound", name="two", make=sound, is_sound=True)


# LoRAs -------------------------------------------------------------------------------------------

LORA_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
ADAPTED = "base_model.model.blocks.0.attn.qkv.lora_{}.weight"


def _lora_tensors(**changes: Any) -> dict[str, torch.Tensor]:
    width = bases.TINY.hidden_size
    factors = {"A": torch.ones(2, width), "B": torch.ones(3 * width, 2)}
    return {ADAPTED.format(side): each for side, each in (factors | changes).items()}


LORA_CONFIGS: dict[str, list[str]] = {
    "json": ["", "{", "[]", "null", DEEP, f'{{"r": {DIGITS}}}', '{"r": 1e999}', "\ufeff\0"],
    "values": [
        json.dumps(LORA_CONFIG | change)
        for change in (
            {"r": -1}, {"r": True}, {"r": "2"}, {"lora_alpha": None}, {"lora_alpha": [4]},
            {"lora_alpha": float("nan")}, {"lora_alpha": 1e300}, {"use_dora": 1},
            {"rank_pattern": []}, {"rank_pattern": {"(x+x+)+y": 2}}, {"alpha_pattern": {"": 4}},
            {"alpha_pattern": {"qkv": {}}}, {"peft_type": {}}, {"init_lora_weights": [[]]},
            {"bias": ["all"]}, {"\x1b[31m": 1}, {"layer_replication": [[0, 1]]},
        )
    ],
}  # fmt: skip


def _loras() -> Iterator[Case]:
    def written(config: str, tensors: dict[str, torch.Tensor]) -> Make:
        def make(folder: Path) -> list[str]:
            (folder / "lora").mkdir()
            (folder / "lora" / "adapter_config.json").write_text(config)
            save_file(tensors, folder / "lora" / "adapter_model.safetensors")
            return sample_of(bases.checkpoint(folder), "--lora", str(folder / "lora"))

        return make

    sound = json.dumps(LORA_CONFIG)
    for kind, texts in LORA_CONFIGS.items():
        for text in texts:
            make = written(text, _lora_tensors())
            yield Case(loader="lora", kind=kind, name=text[:40], make=make)
    for name, change in {
        "NaN": {"B": torch.full((3 * bases.TINY.hidden_size, 2), torch.nan)},
        "a huge product": {"A": torch.ones(2, 10**6), "B": torch.ones(10**6, 2)},
        "no rank": {"A": torch.ones(0, bases.TINY.hidden_size)},
        "whole numbers": {"A": torch.ones(2, bases.TINY.hidden_size).long()},
        "another linear": {"A": torch.ones(2, 5)},
    }.items():
        make = written(sound, _lora_tensors(**change))
        yield Case(loader="lora", kind="tensors", name=name, make=make)
    for name, config in {"plain": LORA_CONFIG, "empty": {}}.items():
        text = json.dumps(config | {"lora_alpha": 4})
        make = written(text, _lora_tensors())
        yield Case(loader="lora", kind="sound", name=name, make=make, is_sound=True)
