"""Embeddings files: what is written is read, and what no model takes is refused."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ditas_export.conditions import embeddings
from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.errors import ArtifactError, RunnerError
from ditas_export.family_model import Conditions, Input

Tensors = dict[str, Tensor]

STATES, MASK, SIZE = "encoder_hidden_states", "encoder_attention_mask", "resolution"


def _inputs(channels: int) -> tuple[Input, ...]:
    return (
        Input(name=STATES, dtype=torch.float32, shape=("tokens", channels)),
        Input(name=MASK, dtype=torch.int64, shape=("tokens",)),
        Input(name=SIZE, dtype=torch.float32, shape=(2,)),
    )


def _tensors(prompts: int, tokens: int, channels: int, *, seed: int = 0) -> Tensors:
    """Return a file's tensors: random states, sequences of all lengths, sizes."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (prompts + 1,), generator=random)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    states = torch.randn(prompts + 1, tokens, channels, generator=random)
    rows = {
        STATES: states * mask[..., None],
        MASK: mask,
        SIZE: torch.rand(prompts + 1, 2, generator=random) * 1024,
    }
    return {
        **{name: tensor[:prompts].clone() for name, tensor in rows.items()},
        **{f"null.{name}": tensor[prompts:].clone() for name, tensor in rows.items()},
    }


def _load(path: Path, tensors: Tensors, channels: int = 4) -> PromptEmbeddings:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return PromptEmbeddings.load(path, inputs=_inputs(channels))


@settings(deadline=None, max_examples=25)
@given(
    prompts=st.integers(1, 4),
    tokens=st.integers(1, 5),
    channels=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    texts=st.lists(st.text(max_size=9), min_size=4, max_size=4),
    has_null=st.booleans(),
)
def test_what_is_saved_is_loaded_bit_for_bit(
    prompts: int, tokens: int, channels: int, seed: int, texts: list[str], has_null: bool
) -> None:
    tensors = _tensors(prompts, tokens, channels, seed=seed)
    stacked = {
        name: torch.cat([tensors[name], tensors[f"null.{name}"]]) if has_null else tensors[name]
        for name in (STATES, MASK, SIZE)
    }
    made = PromptEmbeddings(tensors=stacked, has_null=has_null, prompts=tuple(texts[:prompts]))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, "one.safetensors"), Path(folder, "two.safetensors")]
        for path in paths:
            made.save(path)
        loaded = PromptEmbeddings.load(paths[0], inputs=_inputs(channels))
        assert paths[0].read_bytes() == paths[1].read_bytes()
    assert loaded.prompts == made.prompts
    assert loaded.identity == made.identity
    assert loaded.count == prompts
    assert loaded.null == (prompts if has_null else None)
    for name, tensor in stacked.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


@given(labels=st.lists(st.integers(0, 3), max_size=6))
@settings(deadline=None)
def test_labels_name_prompts_and_after_them_no_prompt(labels: list[int]) -> None:
    tensors = _tensors(3, 5, 4)
    with tempfile.TemporaryDirectory() as folder:
        found = _load(Path(folder, "file"), tensors).inputs(torch.tensor(labels).long())
    assert list(found) == [STATES, MASK, SIZE]
    for name, rows in found.items():
        assert len(rows) == len(labels)
        for row, label in zip(rows, labels, strict=True):
            expected = tensors[name][label] if label < 3 else tensors[f"null.{name}"][0]
            assert torch.equal(row, expected)


@pytest.mark.parametrize("label", [-1, 4])
def test_a_label_without_a_row_is_refused(label: int, tmp_path: Path) -> None:
    loaded = _load(tmp_path / "file", _tensors(3, 5, 4))
    with pytest.raises(RunnerError, match="rows 0 to 3; ask for these"):
        loaded.inputs(torch.tensor([0, label]))


def test_without_null_rows_nothing_can_be_guided(tmp_path: Path) -> None:
    rows = {name: t for name, t in _tensors(3, 5, 4).items() if not name.startswith("null.")}
    loaded: Conditions = _load(tmp_path / "file", rows)
    assert (loaded.what, loaded.lack) == ("prompt", "row of no prompt")
    assert loaded.source == str(tmp_path / "file")
    assert loaded.null is None
    with pytest.raises(RunnerError, match="rows 0 to 2"):
        loaded.inputs(torch.tensor([3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_the_same_numbers(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = _tensors(3, 5, 4)
    halves = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    floats = {name: t.float() if t.is_floating_point() else t for name, t in halves.items()}
    half, whole = _load(tmp_path / "half", halves), _load(tmp_path / "whole", floats)
    assert half.identity == whole.identity
    assert half.tensors[STATES].dtype == torch.float32
    assert torch.equal(half.tensors[STATES], whole.tensors[STATES])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
def test_a_mask_of_any_type_is_fed_as_the_model_takes_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors = _tensors(3, 5, 4)
    typed = {name: t.to(dtype) if name.endswith(MASK) else t for name, t in tensors.items()}
    loaded = _load(tmp_path / "typed", typed)
    assert loaded.tensors[MASK].dtype == torch.int64
    assert loaded.identity == _load(tmp_path / "plain", tensors).identity


@pytest.mark.parametrize("name", [STATES, MASK, SIZE, f"null.{STATES}"])
def test_the_identity_is_of_every_value(name: str, tmp_path: Path) -> None:
    tensors = _tensors(3, 5, 4)
    before = _load(tmp_path / "before", tensors).identity
    changed = tensors[name].flatten().clone()
    changed[0] = 1 - changed[0] if name == MASK else torch.nextafter(changed[0], changed[0] + 1)
    if name == MASK:
        changed[1] = 1
    after = _load(tmp_path / "after", {**tensors, name: changed.reshape(tensors[name].shape)})
    assert after.identity != before


@pytest.mark.parametrize("garbage", [1.0, 1e30, torch.inf, torch.nan])
def test_what_stands_in_padding_changes_no_bit(garbage: float, tmp_path: Path) -> None:
    tensors = _tensors(3, 5, 4)
    filled = {
        name: t.masked_fill((tensors[name.replace(STATES, MASK)] == 0)[..., None], garbage)
        if name.endswith(STATES)
        else t
        for name, t in tensors.items()
    }
    assert not torch.equal(filled[STATES], tensors[STATES])
    plain, loaded = _load(tmp_path / "plain", tensors), _load(tmp_path / "filled", filled)
    assert loaded.identity == plain.identity
    for name, tensor in plain.inputs(torch.arange(4)).items():
        assert torch.equal(loaded.inputs(torch.arange(4))[name], tensor)


def _without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def _with(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: change(tensors.get(name, torch.ones(3, 5)))}


def _set(*place: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[place] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without(MASK), "expected encoder_attention_mask, encoder_hidden_states, resolution, and"),
        (_without(f"null.{SIZE}"), "expected encoder_attention_mask, encoder_hidden_states"),
        (
            _with("y", lambda t: t),
            "its tensors are encoder_attention_mask, .* and 1 more; expected",
        ),
        (_with(STATES, lambda t: t[..., :3]), "is (3, 5, 3), expected (3, tokens, 4)"),
        (_with(STATES, lambda t: t[:2]), "is (2, 5, 4), expected (prompts, tokens, 4)"),
        (_with(STATES, lambda t: t[:, 0]), "is (3, 4), expected (3, tokens, 4)"),
        (_with(STATES, lambda t: t[0, 0, 0]), "is (), expected"),
        (_with(MASK, lambda t: t[:, :4]), "is (3, 4), expected (3, tokens); tokens=5 elsewhere"),
        (
            _with(f"null.{STATES}", lambda t: t[:, :4]),
            "expected (1, tokens, 4); tokens=5 elsewhere",
        ),
        (_with(f"null.{SIZE}", lambda t: t.repeat(2, 1)), "is (2, 2), expected (1, 2)"),
        (_with(STATES, lambda t: t.double()), "is float64, expected one of float32, float16"),
        (_with(f"null.{SIZE}", lambda t: t.int()), "null.resolution is int32, expected one of"),
        (_with(STATES, _set(1, 2, 0, value=torch.nan)), "of prompt 1 has NaN or infinity"),
        (_with(f"null.{STATES}", _set(0, 0, 0, value=torch.inf)), "null.encoder_hidden_states has"),
        (_with(MASK, _set(0, 0, value=2)), "encoder_attention_mask has 2; expected 1 for a token"),
        (_with(MASK, _set(2, value=0)), "encoder_attention_mask of prompt 2 is all padding"),
        (_with(f"null.{MASK}", _set(0, value=0)), "null.encoder_attention_mask is all padding"),
        (_with(MASK, lambda t: t.float() / 2), "encoder_attention_mask has 0.5; expected 1 for"),
    ],
)
def test_what_does_not_fit_is_refused(
    change: Callable[[Tensors], Tensors], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    with pytest.raises(ArtifactError) as refused:
        _load(path, change(_tensors(3, 5, 4)))
    text = str(refused.value)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), text), text
    assert text.startswith(f"{path}: ")
    assert text.endswith("make it again, by ditas-embed")
    assert "\n" not in text


def test_no_rows_are_refused(tmp_path: Path) -> None:
    empty = {name: t[: 0 if t.shape[0] > 1 else 1] for name, t in _tensors(3, 5, 4).items()}
    with pytest.raises(ArtifactError, match=r"is \(0, 5, 4\), expected \(0, tokens, 4\)"):
        _load(tmp_path / "file", empty)


def test_more_than_memory_is_to_hold_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embeddings, "MOST_BYTES", 100)
    with pytest.raises(ArtifactError, match="use fewer prompts"):
        _load(tmp_path / "file", _tensors(3, 5, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"", "it is empty"), (b"{}", "JSON text"), (b"\x80\x02", "a pickle")],
    ids=["missing", "empty", "json", "pickle"],
)
def test_what_is_no_such_file_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"no readable file of embeddings: .*{message}"):
        PromptEmbeddings.load(path, inputs=_inputs(4))


def test_damage_in_a_file_of_ours_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    _load(path, _tensors(3, 5, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="is damaged"):
        PromptEmbeddings.load(path, inputs=_inputs(4))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(["a", "b"], "2 texts of 3 prompts"), ("abc", "prompts='abc'"), ([1, 2, 3], "list of texts")],
)
def test_texts_of_other_prompts_are_refused(prompts: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    metadata = {embeddings.EMBEDDINGS_FORMAT: json.dumps({"prompts": prompts})}
    save_file(_tensors(3, 5, 4), path, metadata=metadata)
    with pytest.raises(ArtifactError, match=re.escape(message)):
        PromptEmbeddings.load(path, inputs=_inputs(4))


def test_rows_of_other_numbers_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"tensors of \[2, 3\] rows"):
        PromptEmbeddings(tensors={STATES: torch.ones(3, 1), SIZE: torch.ones(2, 2)}, has_null=False)
    with pytest.raises(ArtifactError, match="one a prompt"):
        PromptEmbeddings(tensors={STATES: torch.ones(1, 1)}, has_null=True)
    with pytest.raises(ArtifactError, match="one a prompt"):
        PromptEmbeddings(tensors={}, has_null=False)
