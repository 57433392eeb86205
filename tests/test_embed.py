"""`ditas-embed`: what diffusers' pipeline encodes is what the file holds, prompt by prompt."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from ditas_export.cli.embed import app
from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.conditions.prompts import read_prompts, shipped_prompts
from ditas_export.conditions.text_encoder import embed_prompts
from ditas_export.errors import ArtifactError, CheckpointError, RunnerError
from ditas_export.family_model import Input

CHANNELS = 32
STATES, MASK = "encoder_hidden_states", "encoder_attention_mask"
INPUTS = (
    Input(name=STATES, dtype=torch.float32, shape=("tokens", CHANNELS)),
    Input(name=MASK, dtype=torch.int64, shape=("tokens",)),
)
SIZES = (
    Input(name="resolution", dtype=torch.float32, shape=(2,)),
    Input(name="aspect_ratio", dtype=torch.float32, shape=(1,)),
)
PROMPTS = ("a red boat on a lake", "  An OLD bridge, in the fog.", "bread")


def _pipeline(folder: Path, name: str, **transformer: Any) -> Path:
    """Write a pipeline's folder with a T5 of two layers and a tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    vocabulary = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(shipped_prompts()),
        model_writer=vocabulary,
        vocab_size=150,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "spiece.model").write_bytes(vocabulary.getvalue())
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=300, d_model=CHANNELS, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    transformers.T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    classes = {
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": name, "_diffusers_version": "0.32.0", **classes}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(transformer))
    return folder


@pytest.fixture(scope="module")
def sigma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "sigma"
    return _pipeline(folder, "PixArtSigmaPipeline", sample_size=64)


@pytest.fixture(scope="module")
def alpha(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines") / "alpha"
    return _pipeline(folder, "PixArtAlphaPipeline", sample_size=128)


def _oracle(folder: Path) -> Any:
    """Return diffusers' pipeline, put together by hand."""
    import diffusers
    from transformers import T5EncoderModel, T5Tokenizer

    name = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipe = getattr(diffusers, name)
    return pipe(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae=None,
        transformer=None,
        scheduler=None,
    )


def _encoded(folder: Path) -> list[tuple[Tensor, ...]]:
    """Return what the pipeline's own call gives each prompt: states, mask, and those of none."""
    pipe = _oracle(folder)
    with torch.no_grad():
        return [pipe.encode_prompt(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["sigma", "alpha"])
def test_rows_are_what_the_pipeline_encodes(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    made = embed_prompts(folder, PROMPTS)
    expected = _encoded(folder)
    length = max(int(mask.sum()) for _, mask, _, _ in expected)
    assert made.tensors[STATES].shape == (4, length, CHANNELS)
    rows = [(states[0], mask[0]) for states, mask, _, _ in expected]
    nulls = [(states[0], mask[0]) for _, _, states, mask in expected]
    for row, (states, mask) in enumerate([*rows, nulls[0]]):
        tokens = int(mask.sum())
        assert made.tensors[MASK][row].tolist() == [1] * tokens + [0] * (length - tokens)
        assert torch.equal(made.tensors[STATES][row, :tokens], states[:tokens])
        assert not made.tensors[STATES][row, tokens:].any()
    assert made.null == 3
    assert made.prompts == PROMPTS
    assert len({int(row.sum()) for row in made.tensors[MASK]}) == 4


def test_columns_that_no_prompt_reaches_change_nothing(sigma: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16,
        sample_size=8, caption_channels=CHANNELS,
    )  # fmt: skip
    made = embed_prompts(sigma, PROMPTS).inputs(torch.arange(3))
    whole = _encoded(sigma)
    latents, time = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 990])
    with torch.no_grad():
        short = model(latents, timestep=time, return_dict=False, **made)[0]
        long = model(
            latents,
            timestep=time,
            encoder_hidden_states=torch.cat([states for states, _, _, _ in whole]),
            encoder_attention_mask=torch.cat([mask for _, mask, _, _ in whole]),
            return_dict=False,
        )[0]
    # Sums over 300 columns and over fewer round differently.
    assert (short - long).abs().max() < 1e-5 * long.abs().max()


def test_a_model_that_is_asked_for_a_size_gets_its_own(alpha: Path, tmp_path: Path) -> None:
    path = tmp_path / "embeddings.safetensors"
    embed_prompts(alpha, PROMPTS).save(path)
    loaded = PromptEmbeddings.load(path, inputs=(*INPUTS, *SIZES))
    assert torch.equal(loaded.tensors["resolution"], torch.full((4, 2), 1024.0))
    assert torch.equal(loaded.tensors["aspect_ratio"], torch.ones(4, 1))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sample_size": 64}, False),
        ({"sample_size": 128, "use_additional_conditions": False}, False),
        ({"sample_size": 64, "use_additional_conditions": True}, True),
        ({}, True),  # as diffusers' defaults have it
    ],
)
def test_a_size_is_asked_for_as_diffusers_decides_it(
    settings: dict[str, Any], expected: bool, sigma: Path, tmp_path: Path
) -> None:
    from diffusers import PixArtTransformer2DModel

    small = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 16}
    model = PixArtTransformer2DModel(num_layers=1, **small, **settings)
    assert model.use_additional_conditions == expected
    folder = tmp_path / "copy"
    folder.mkdir()
    for each in sigma.iterdir():
        if each.name != "transformer":
            (folder / each.name).symlink_to(each)
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(settings))
    tensors = embed_prompts(folder, PROMPTS[:1]).tensors
    assert ("resolution" in tensors) == ("aspect_ratio" in tensors) == expected


def test_bfloat16_is_near_float32(sigma: Path) -> None:
    half = embed_prompts(sigma, PROMPTS, precision="bf16").tensors[STATES]
    whole = embed_prompts(sigma, PROMPTS).tensors[STATES]
    assert half.dtype == torch.float32
    assert torch.equal(half, half.bfloat16().float())
    error = (half - whole).norm() / whole.norm()
    assert 0 < error < 0.02  # eight bits of mantissa, two layers


def test_a_prompt_that_is_too_long_is_refused_before_any_is_encoded(sigma: Path) -> None:
    told: list[int] = []
    with pytest.raises(RunnerError, match=r"has 3\d\d tokens, expected 300 at most; shorten it"):
        embed_prompts(sigma, ("a", "? " * 150), on_prompt=lambda done, _: told.append(done))
    assert told == []


def test_progress_is_told(sigma: Path) -> None:
    told: list[tuple[int, int]] = []
    embed_prompts(sigma, PROMPTS, on_prompt=lambda done, total: told.append((done, total)))
    assert told == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtSigmaPipeline"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RunnerError, match=r"pip install 'ditas-export\[text\]'"):
        embed_prompts(tmp_path, PROMPTS)


def test_what_is_no_pipeline_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing/here/at all: no such folder"):
        embed_prompts("nothing/here/at all", PROMPTS)
    with pytest.raises(CheckpointError, match=r"no model_index\.json; pass the folder of a whole"):
        embed_prompts(tmp_path, PROMPTS)
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    with pytest.raises(CheckpointError, match=r"describes a 'DiTPipeline', expected PixArtSigma"):
        embed_prompts(tmp_path, PROMPTS)


def test_a_pipeline_without_an_encoder_is_refused(sigma: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for each in sigma.iterdir():
        if each.name != "text_encoder":
            (folder / each.name).symlink_to(each)
    with pytest.raises(CheckpointError, match=r"the tokenizer or the text encoder in .* cannot be"):
        embed_prompts(folder, PROMPTS)


def test_an_encoder_that_is_not_whole_is_refused(sigma: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(sigma, folder)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks encoder\.block\.1\.layer\.0\.SelfAttention\.q"
    ):
        embed_prompts(folder, PROMPTS)


def test_the_command_writes_a_file(sigma: Path, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "embeddings.safetensors"
    prompts.write_text("# mine\n\na red boat\n  bread \n")
    words = [str(sigma), "--prompts", str(prompts), "-o", str(output)]
    for _ in range(2):  # the second replaces the first
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    loaded = PromptEmbeddings.load(output, inputs=INPUTS)
    assert loaded.prompts == ("a red boat", "bread")
    assert f"2 prompts and no prompt, {loaded.tensors[STATES].shape[1]} tokens" in result.stdout
    assert loaded.identity[:12] in result.stdout


def test_the_command_encodes_the_packages_own_prompts(sigma: Path, tmp_path: Path) -> None:
    output = tmp_path / "embeddings.safetensors"
    result = CliRunner().invoke(app, [str(sigma), "-o", str(output), "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.output == ""
    assert PromptEmbeddings.load(output, inputs=INPUTS).prompts == shipped_prompts()


def test_the_command_replaces_no_strangers_file(tmp_path: Path) -> None:
    output = tmp_path / "notes.txt"
    output.write_text("mine")
    result = CliRunner().invoke(app, ["nowhere", "-o", str(output)])
    assert result.exit_code == 2
    assert "is no earlier file of embeddings of ditas-export" in result.output
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--precision", "fp16"], "pick fp32 or bf16"), (["--device", "tpu"], "pick cpu or cuda")],
)
def test_the_command_refuses_what_it_cannot_do(
    words: list[str], message: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["nowhere", "-o", str(tmp_path / "out"), *words])
    assert result.exit_code == 2
    assert message in result.output


def test_prompts_ship_with_the_package() -> None:
    prompts = shipped_prompts()
    assert len(prompts) == len(set(prompts)) == 32
    words = sorted(len(prompt.split()) for prompt in prompts)
    assert words[0] == 1
    assert words[-1] > 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"# none\n\n", "has no prompt; write one on each line"),
        (b"\xff", "it is not UTF-8 text"),
        (b"a" * 5000, "a prompt of 5,000 characters"),
        (b"a\n" * 100_001, "has 100,001 prompts, expected 100,000 at most"),
    ],
    ids=["missing", "empty", "binary", "long", "many"],
)
def test_what_is_no_file_of_prompts_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        read_prompts(path)


def test_windows_lines_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa boat\r\nbröd\r\n".encode())
    assert read_prompts(path) == ("a boat", "bröd")
