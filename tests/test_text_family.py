"""A model that is asked by prompts, end to end: calibrated, exported, run, sampled, compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import random_vae
from quantized_fixture import snr_db, tiny_dit
from safetensors.torch import load_file, save_file
from text_family import MASK, WORDS, TextConfig, TextFamily, TextModel, prompts, text_model
from torch import Tensor

from ditas_export.calibration.calibrate import QuantizationSettings, quantize_model
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import (
    CalibrationSettings,
    CalibrationStates,
    collect_states,
    walk_states,
)
from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.diffusion.diffusion_schedules import make_scheduler
from ditas_export.diffusion.guidance import model_inputs
from ditas_export.diffusion.sampling import image_generator, initial_noise, sample
from ditas_export.engine.build import input_shapes
from ditas_export.engine.options import BatchRange
from ditas_export.errors import (
    ArtifactError,
    CalibrationError,
    ConditionsError,
    OnnxExportError,
    RunnerError,
)
from ditas_export.evaluation.compare import compare
from ditas_export.evaluation.options import CompareOptions
from ditas_export.families import load, registry
from ditas_export.families.base import ModelInputs, ReadCheckpoint
from ditas_export.families.identity import ModelIdentity, identity_of
from ditas_export.families.registry import conditions_of, config_of, family_of, record_of
from ditas_export.generation.job import generate
from ditas_export.generation.options import SampleOptions
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.file_facts import read_config
from ditas_export.options import ExportOptions
from ditas_export.pipeline import export
from ditas_export.runtime.diffusers_adapter import (
    OnnxDiTTransformer2DModel,
    OnnxPixArtTransformer2DModel,
)
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.torch_runner import TorchRunner

CONFIG = TextConfig()
SETTINGS = CalibrationSettings(steps=4, classes=(0, 3, 5))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", [*registry.FAMILIES, TextFamily()])
    monkeypatch.setattr(load, "FOLDERS", {**load.FOLDERS, "TextModel": read_folder})


def read_folder(path: Path, _hints: Any, what: str, *, vae: str | None = None) -> ReadCheckpoint:
    model = TextModel(CONFIG)
    model.load_state_dict(load_file(path / "model.safetensors"))
    model.eval().requires_grad_(requires_grad=False)
    return ReadCheckpoint(model=model, source=what, dtype=torch.float32, vae=vae)


def saved(folder: Path) -> Path:
    """A folder of the model, as `load_model` takes it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "TextModel"}))
    save_file({k: v.contiguous() for k, v in text_model().state_dict().items()},
              folder / "model.safetensors")  # fmt: skip
    return folder


def embeddings_file(folder: Path, **changes: Any) -> Path:
    path = folder / "embeddings.safetensors"
    prompts(**changes).save(path)
    return path


def inputs_of(labels: list[int], seed: int = 0) -> ModelInputs:
    latents = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    asked = prompts()
    return model_inputs(
        latents, 500, torch.tensor(labels), cfg_scale=1.0, config=CONFIG, conditions=asked
    )


def calibrated(asked: PromptEmbeddings) -> tuple[TextModel, CalibrationStates]:
    model = text_model()
    settings = replace(SETTINGS, embeddings=asked.identity)
    return model, collect_states(model, settings, identity=identity_of(model), conditions=asked)


def quantized(asked: PromptEmbeddings) -> QuantizedModel:
    model, states = calibrated(asked)
    settings = QuantizationSettings(rank=4, alpha_grid=(0.4, 0.5), block_size=24)
    return quantize_model(model, states, settings, conditions=asked)


def test_a_record_names_its_family() -> None:
    record = record_of(CONFIG)
    assert record["family"] == "text"
    assert config_of(json.loads(json.dumps(record))) == CONFIG
    identity = identity_of(text_model())
    assert ModelIdentity.from_dict(json.loads(json.dumps(identity.to_dict()))) == identity
    assert "family" not in record_of(tiny_dit().config)


def test_prompts_are_needed() -> None:
    with pytest.raises(ConditionsError, match="asked by prompts; pass --embeddings"):
        sample(TorchRunner(text_model()), classes=[0], steps=2)
    with pytest.raises(ConditionsError, match="asked by classes; leave --embeddings out"):
        conditions_of(tiny_dit().config, Path("embeddings.safetensors"))


def test_labels_choose_prompts_and_the_null_row_guides() -> None:
    """By hand: three steps' worth of the last prompt and of none, blended."""
    asked = prompts()
    seen: list[ModelInputs] = []

    class Watched(TorchRunner):
        def __call__(self, inputs: ModelInputs) -> Tensor:
            seen.append(inputs)
            return super().__call__(inputs)

    sample(Watched(text_model()), classes=[5, 1], conditions=asked, steps=2, cfg_scale=3.0)
    assert list(seen[0]) == ["hidden_states", "timestep", WORDS, MASK]
    rows = [5, 1, asked.count, asked.count]
    assert torch.equal(seen[0][WORDS], asked.tensors[WORDS][rows])
    assert torch.equal(seen[0][MASK], asked.tensors[MASK][rows])
    with pytest.raises(RunnerError, match=r"prompts \[6\] are out of range"):
        sample(TorchRunner(text_model()), classes=[6], conditions=asked, steps=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {WORDS: torch.zeros(2, 7, 47)},
            r"encoder_hidden_states are \(2, 7, 47\); .* \(2, 7, 48\)",
        ),
        ({MASK: torch.ones(2, 6).long()}, r"encoder_attention_mask are \(2, 6\); .* \(2, 7\)"),
        ({MASK: torch.ones(2, 7)}, "torch.float32; the model takes whole numbers"),
        ({MASK: torch.full((2, 7), 2)}, "run from 2 to 2; the model knows 0 to 1"),
        ({WORDS: torch.zeros(2, 7, 48).long()}, "torch.int64; the model takes floats"),
    ],
)
def test_inputs_that_do_not_fit(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        TorchRunner(text_model())(inputs_of([0, 1]).replaced(changes))


def test_padding_counts_in_no_maximum() -> None:
    """The largest |word| of real tokens by hand; what stands in padding changes no maximum."""
    asked = prompts()
    _, states = calibrated(asked)
    rows = [*SETTINGS.classes, asked.count]
    words, mask = asked.tensors[WORDS][rows], asked.tensors[MASK][rows]
    largest = words[mask != 0].abs().amax(dim=0)
    for name in ("blocks.0.to_k", "blocks.1.to_v"):
        for step in range(SETTINGS.steps):
            assert torch.equal(states.input_maxima[name][step], largest)
    dirty = prompts()
    dirty.tensors[WORDS][dirty.tensors[MASK] == 0] = 50.0  # past what cleared it
    model = text_model()
    settings = replace(SETTINGS, embeddings=dirty.identity)
    other = collect_states(model, settings, identity=identity_of(model), conditions=dirty)
    for name, maxima in states.input_maxima.items():
        assert torch.equal(maxima, other.input_maxima[name]), name
    assert torch.equal(states.latents, other.latents)


def test_padding_counts_in_no_moment() -> None:
    """What stands in padding changes no number of the quantized model."""
    clean = quantized(prompts())
    model, states = calibrated(prompts())
    dirty = prompts()
    dirty.tensors[WORDS][dirty.tensors[MASK] == 0] = 100.0
    settings = QuantizationSettings(rank=4, alpha_grid=(0.4, 0.5), block_size=24)
    found = quantize_model(model, states, settings, conditions=dirty)
    for name, linear in clean.linears.items():
        other = found.linears[name]
        assert torch.equal(linear.weight.codes, other.weight.codes), name
        assert torch.equal(linear.smoothing_scale, other.smoothing_scale), name
        assert linear.output_snr_db == other.output_snr_db


def test_states_are_of_their_prompts(tmp_path: Path) -> None:
    asked, others = prompts(), prompts(seed=4)
    model, states = calibrated(asked)
    path, identity = tmp_path / "states.safetensors", identity_of(model)
    states.save(path)
    again = CalibrationStates.load(path, identity=identity, conditions=asked)
    assert again.settings == states.settings
    with pytest.raises(ArtifactError, match=r"sampled with embeddings \w{12}…, now \w{12}…"):
        CalibrationStates.load(path, identity=identity, conditions=others)
    with pytest.raises(CalibrationError, match="sampled with embeddings"):
        walk_states(states, count=1, conditions=others)
    walked = walk_states(states, count=3, conditions=asked)
    assert torch.equal(walked[WORDS][3:], asked.tensors[WORDS][[6, 6, 6]])


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_a_file_takes_any_number_of_tokens(target: Any, tmp_path: Path) -> None:
    folded = fold_smoothing(quantized(prompts()))
    path = tmp_path / "text.onnx"
    export_onnx(folded, path, target=target)
    assert read_config(path) == CONFIG
    graph = onnx.load(path).graph
    dims = {value.name: [each.dim_param or each.dim_value for each in
                         value.type.tensor_type.shape.dim] for value in graph.input}  # fmt: skip
    assert dims[WORDS] == ["N", "tokens", 48]
    assert dims[MASK] == ["N", "tokens"]
    expected = fake_quantized_model(folded, ranges="token", target=target)
    with OnnxRuntimeRunner(path, threads=2, as_is=True) as runner:
        for tokens in (7, 3):
            inputs = inputs_of([0, 2, 5])
            inputs = inputs.replaced({name: inputs[name][:, :tokens] for name in (WORDS, MASK)})
            assert snr_db(expected(**inputs), runner(inputs)) > 45  # rounding ties


def test_the_float_file_computes_the_model(tmp_path: Path) -> None:
    model, path = text_model(), tmp_path / "fp32.onnx"
    export_reference(model, path)
    inputs = inputs_of([0, 2, 5])
    with OnnxRuntimeRunner(path, threads=2) as runner:
        assert snr_db(model(**inputs), runner(inputs)) > 100  # float32


def test_a_file_of_fixed_tokens_is_another_model(tmp_path: Path) -> None:
    path = tmp_path / "fp32.onnx"
    export_reference(text_model(), path)
    model = onnx.load(path)
    model.graph.input[2].type.tensor_type.shape.dim[2].dim_value = 47
    onnx.save(model, path)
    with pytest.raises(OnnxExportError, match=r"rows of \('tokens', 47\)"):
        read_config(path)


def test_engines_are_built_for_a_range_of_tokens() -> None:
    shapes = input_shapes(CONFIG, BatchRange(smallest=1, usual=2, largest=8))
    assert shapes[WORDS] == [[1, 1, 48], [2, 6, 48], [8, 12, 48]]
    assert shapes[MASK] == [[1, 1], [2, 6], [8, 12]]
    assert shapes["timestep"] == [[1], [2], [8]]
    assert family_of(CONFIG).name == "text"


def test_diffusers_pipeline_makes_what_sample_makes(tmp_path: Path) -> None:
    """`PixArtSigmaPipeline` as it is: same noise, same scheduler, every channel of ε guided."""
    pytest.importorskip("transformers", reason="extra [text]")
    from diffusers import PixArtSigmaPipeline

    path, model, asked = tmp_path / "fp32.onnx", text_model(), prompts()
    export_reference(model, path)
    transformer = OnnxPixArtTransformer2DModel(path)
    pipeline = PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=random_vae(),
        transformer=transformer,
        scheduler=make_scheduler("dpm++", 4),
    )
    pipeline.set_progress_bar_config(disable=True)
    fed = {}
    for name, rows in (("", [5, 1]), ("negative_", [asked.count] * 2)):
        fed[f"{name}prompt_embeds"] = asked.tensors[WORDS][rows]
        fed[f"{name}prompt_attention_mask"] = asked.tensors[MASK][rows]
    found = pipeline(
        prompt=None,
        negative_prompt=None,
        **fed,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=initial_noise(CONFIG, [image_generator(0, index) for index in range(2)]),
        output_type="latent",
        use_resolution_binning=False,
        clean_caption=False,
    ).images
    expected = sample(
        TorchRunner(model),
        classes=[5, 1],
        conditions=asked,
        steps=4,
        sampler="dpm++",
        cfg_scale=3.0,
        cfg_channels="all",
    )
    assert snr_db(expected, found) > 60  # float32, carried through the steps
    with pytest.raises(RunnerError, match="the file is fed encoder_attention_mask, which was not"):
        transformer(found, timestep=500, encoder_hidden_states=asked.tensors[WORDS][:2])
    with pytest.raises(RunnerError, match="which no DiTTransformer2DModel is"):
        OnnxDiTTransformer2DModel(path)


def test_from_a_checkpoint_to_pictures(tmp_path: Path) -> None:
    """The three commands' jobs, embeddings and all."""
    model, asked = saved(tmp_path / "model"), embeddings_file(tmp_path)
    options = ExportOptions(
        output=tmp_path / "out.onnx",
        model=str(model),
        embeddings=asked,
        steps=4,
        samples=3,
        rank=2,
        block_size=24,
        save_artifact=tmp_path / "kept.safetensors",
        reference=tmp_path / "fp32.onnx",
    )
    result = export(options)
    assert result.verification.matches
    sha256 = PromptEmbeddings.load(asked, inputs=family_of(CONFIG).inputs(CONFIG)[2:]).identity
    assert result.quantized.settings["calibration"]["embeddings"] == sha256
    assert sha256 in (tmp_path / "out.json").read_text()
    wanted = SampleOptions(
        model=str(tmp_path / "out.onnx"),
        output=tmp_path / "images",
        embeddings=asked,
        classes="1,5",
        steps=2,
        runtime="onnxruntime",
        vae="none",
    )
    assert generate(wanted).images == 2
    kept = CompareOptions(
        reference=tmp_path / "fp32.onnx", model=tmp_path / "out.onnx", embeddings=asked, steps=2
    )
    assert compare(kept).total_db > 10
    others = tmp_path / "others"
    others.mkdir()
    again = replace(
        options, embeddings=embeddings_file(others, seed=9), artifact=options.save_artifact,
        save_artifact=None, reference=None, steps=None, samples=None, rank=None, block_size=None,
    )  # fmt: skip
    with pytest.raises(ArtifactError, match=r"sampled with embeddings .*; pass its own"):
        export(again)
    export(replace(again, embeddings=asked, output=tmp_path / "again.onnx"))
