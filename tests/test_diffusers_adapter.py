"""The file inside diffusers' own `DiTPipeline`, against the float transformer inside the same."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import random_vae
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from quantized_fixture import exported_reference, quantized_tiny_dit, snr_db
from torch import Tensor

from ditas_export.calibration.fold import FoldedModel, fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.diffusion.diffusion_schedules import make_scheduler
from ditas_export.diffusion.sampling import image_generator, sample
from ditas_export.dit.model import DiT
from ditas_export.errors import OnnxExportError, RunnerError
from ditas_export.families.load import load_model
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.onnx_export.manifest import MANIFEST_FORMAT
from ditas_export.runtime.diffusers_adapter import OnnxDiTTransformer2DModel
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.torch_runner import TorchRunner

CLASSES = [3, 999]
STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapter")


@pytest.fixture(scope="module")
def transformer(folder: Path) -> Any:
    """diffusers' own DiT: 4 channels, 1000 classes, no layer zero, embedder copies alike."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.02 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            if ".norm1.linear" in name or "proj_out_1" in name:  # the modulation, as in `randomize`
                std *= 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    model.save_pretrained(folder / "transformer")
    return model


@pytest.fixture(scope="module")
def dit(transformer: Any, folder: Path) -> DiT:
    return load_model(folder / "transformer").model


@pytest.fixture(scope="module")
def float_file(dit: DiT, folder: Path) -> Path:
    export_reference(dit, folder / "fp32.onnx")
    return folder / "fp32.onnx"


@pytest.fixture(scope="module")
def folded(dit: DiT) -> FoldedModel:
    """The same model in W4A8 by plain rounding."""
    return fold_smoothing(quantized_tiny_dit(dit, rank=0))


def pixels(transformer: Any, scheduler: Any = None, **options: Any) -> Tensor:
    """What the real pipeline makes with a transformer: (N, 3, 32, 32), before any rounding."""
    pipeline = DiTPipeline(
        transformer=transformer, vae=random_vae(), scheduler=scheduler or DDIMScheduler()
    )
    return run(pipeline, **options)


def run(pipeline: Any, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    torch.manual_seed(0)  # DDPM draws from the global generator
    arguments = {"class_labels": CLASSES, "num_inference_steps": STEPS, "output_type": "pt"}
    made: Tensor = pipeline(**{**arguments, **options}).images
    return made


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler],
    ids=lambda s: s.__name__,
)
def test_the_float_file_makes_the_pictures_of_the_float_model(
    transformer: Any, float_file: Path, scheduler: Any, guidance_scale: float
) -> None:
    adapter = OnnxDiTTransformer2DModel(float_file)
    expected = pixels(transformer, scheduler(), guidance_scale=guidance_scale)
    found = pixels(adapter, scheduler(), guidance_scale=guidance_scale)
    assert found.shape == (2, 3, 32, 32)
    # float32 sums in another order, carried through the steps.
    assert relative_error(found, expected) < 1e-4
    noise = pixels(adapter, scheduler(), guidance_scale=guidance_scale, class_labels=[7, 8])
    assert relative_error(noise, expected) > 1e-2, "the labels count"


def test_the_w4a8_file_makes_nearly_the_same_pictures(
    transformer: Any, folded: FoldedModel, tmp_path: Path
) -> None:
    export_onnx(folded, tmp_path / "w4a8.onnx")
    found = pixels(OnnxDiTTransformer2DModel(tmp_path / "w4a8.onnx"), guidance_scale=1.5)
    fake_quantized = TorchRunner(fake_quantized_model(folded, ranges="token"))
    same = pixels(OnnxDiTTransformer2DModel(runner=fake_quantized), guidance_scale=1.5)
    expected = pixels(transformer, guidance_scale=1.5)
    mean = expected.mean()  # grey, which every picture shares
    # Rounding ties, which a random model amplifies from step to step; 38.7 dB when written.
    assert snr_db(same - mean, found - mean) > 30
    # What plain rounding costs a random model: 11.7 dB; pictures of other classes are at 6 dB.
    assert snr_db(expected - mean, found - mean) > 10


def test_the_pipeline_samples_what_sample_samples(dit: DiT, float_file: Path) -> None:
    """Same noise, same scheduler, every channel of ε guided: the difference is in those alone."""
    generators = [image_generator(0, index) for index in range(len(CLASSES))]
    found = pixels(
        OnnxDiTTransformer2DModel(float_file),
        make_scheduler("ddim", STEPS),
        guidance_scale=3.0,
        generator=generators,
    )
    latents = sample(
        TorchRunner(dit),
        classes=CLASSES,
        steps=STEPS,
        sampler="ddim",
        cfg_scale=3.0,
        cfg_channels="all",
    )
    vae = random_vae()
    images = vae.decode(latents / vae.config.scaling_factor).sample
    assert relative_error(found, (images / 2 + 0.5).clamp(0, 1)) < 1e-4


def test_any_runner_takes_the_place_of_the_file(dit: DiT, float_file: Path) -> None:
    with OnnxRuntimeRunner(float_file) as runner:
        from_runner = pixels(OnnxDiTTransformer2DModel(runner=runner))
    assert torch.equal(from_runner, pixels(OnnxDiTTransformer2DModel(str(float_file))))
    in_torch = pixels(OnnxDiTTransformer2DModel(runner=TorchRunner(dit)))
    assert relative_error(in_torch, from_runner) < 1e-4


def test_a_saved_pipeline_takes_it_as_its_transformer(
    transformer: Any, float_file: Path, tmp_path: Path
) -> None:
    whole = DiTPipeline(transformer=transformer, vae=random_vae(), scheduler=DDIMScheduler())
    whole.save_pretrained(tmp_path)
    adapter = OnnxDiTTransformer2DModel(float_file)
    pipeline = DiTPipeline.from_pretrained(tmp_path, transformer=adapter, low_cpu_mem_usage=False)
    assert pipeline.transformer is adapter
    assert relative_error(run(pipeline), run(whole)) < 1e-4


def test_the_config_is_that_of_the_transformer(transformer: Any, float_file: Path) -> None:
    config = OnnxDiTTransformer2DModel(float_file).config
    assert {"sample_size", "in_channels", "out_channels", "num_embeds_ada_norm"} <= set(config)
    assert {name: transformer.config[name] for name in config} == dict(config)


def test_half_precision_is_the_pipelines_alone(transformer: Any, float_file: Path) -> None:
    adapter = OnnxDiTTransformer2DModel(float_file)
    assert (adapter.dtype, adapter.device) == (torch.float32, torch.device("cpu"))
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1000])
    with torch.no_grad():
        expected = transformer(latents, torch.tensor([999, 999]), labels).sample
    adapter.to(torch.float16)
    assert adapter.dtype == torch.float16
    found = adapter(latents.half(), timestep=999, class_labels=labels).sample
    assert found.dtype == torch.float16
    # Latents and result rounded to float16; with weights of float16 it would be more.
    assert relative_error(found.float(), expected) < 2e-3


@pytest.mark.parametrize(
    "timestep", [500, torch.tensor(500), torch.tensor([500.0]), torch.tensor([500, 500])], ids=str
)
def test_time_steps_of_every_form(float_file: Path, timestep: Any) -> None:
    adapter = OnnxDiTTransformer2DModel(float_file)
    latents, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1000])
    expected = adapter(latents, torch.tensor([500, 500]), labels).sample
    (found,) = adapter(latents, timestep, labels, return_dict=False)
    assert torch.equal(found, expected)


def test_time_steps_between_whole_ones_are_refused(float_file: Path) -> None:
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    with pytest.raises(RunnerError, match=r"time steps \[749.25\] are not whole"):
        pixels(OnnxDiTTransformer2DModel(float_file), scheduler)


def test_the_fixed_null_class_of_the_pipeline_does_not_fit_every_model() -> None:
    """A model of 10 classes: guided by class 1000 it cannot be, unguided it runs."""
    adapter = OnnxDiTTransformer2DModel(exported_reference())
    vae = random_vae(latent_channels=3)
    pipeline = DiTPipeline(transformer=adapter, vae=vae, scheduler=DDIMScheduler())
    with pytest.raises(
        RunnerError, match=r"class label 1000; .* null class 10\. .*guidance_scale=1"
    ):
        run(pipeline, class_labels=[3])
    images = run(pipeline, class_labels=[3], guidance_scale=1.0)
    assert images.shape == (1, 3, 32, 32)


def test_pictures_come_out_of_it(float_file: Path) -> None:
    pipeline = DiTPipeline(
        transformer=OnnxDiTTransformer2DModel(float_file),
        vae=random_vae(),
        scheduler=DDIMScheduler(),
    ).to("cpu")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(class_labels=[1], num_inference_steps=2).images
    assert np.asarray(images[0]).shape == (32, 32, 3)


def pipeline_of(transformer: Any) -> Any:
    return DiTPipeline(transformer=transformer, vae=random_vae(), scheduler=DDIMScheduler())


def test_a_pipeline_is_saved_and_loaded_with_its_file(float_file: Path, tmp_path: Path) -> None:
    pipeline = pipeline_of(OnnxDiTTransformer2DModel(float_file))
    expected = run(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert (tmp_path / "transformer" / float_file.name).read_bytes() == float_file.read_bytes()
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is OnnxDiTTransformer2DModel
    assert torch.equal(run(loaded), expected)
    half = OnnxDiTTransformer2DModel.from_pretrained(
        tmp_path, subfolder="transformer", torch_dtype=torch.float16
    )
    assert half.dtype == torch.float16
    loaded.save_pretrained(tmp_path)  # over itself


def test_saving_takes_data_and_manifest_along(float_file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(float_file))
    onnx.save(model, str(tmp_path / "big.onnx"), save_as_external_data=True, location="big.data")
    manifest = {
        "format": MANIFEST_FORMAT,
        "file": {"sha256": sha256_of_onnx(tmp_path / "big.onnx")},
    }
    (tmp_path / "big.json").write_text(json.dumps(manifest))
    OnnxDiTTransformer2DModel(tmp_path / "big.onnx").save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"big.onnx", "big.data", "big.json", "config.json"}
    OnnxDiTTransformer2DModel.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "big.onnx").write_bytes(float_file.read_bytes())
    with pytest.raises(OnnxExportError, match="is the manifest of another file"):
        OnnxDiTTransformer2DModel.from_pretrained(tmp_path / "saved")


def test_folders_of_others_are_refused(folder: Path, transformer: Any, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"names no ONNX file; give what save_pretrained"):
        OnnxDiTTransformer2DModel.from_pretrained(folder / "transformer")
    with pytest.raises(RunnerError, match=r"has no config\.json; give what save_pretrained wrote"):
        OnnxDiTTransformer2DModel.from_pretrained(tmp_path)
    assert transformer.config.num_layers == 2


def test_it_is_pickled_by_its_file(float_file: Path) -> None:
    adapter = OnnxDiTTransformer2DModel(float_file)
    inputs = torch.randn(2, 4, 8, 8), 500, torch.tensor([0, 1000])
    again = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(again(*inputs).sample, adapter(*inputs).sample)


def test_what_was_made_of_a_runner_has_no_file(dit: DiT, tmp_path: Path) -> None:
    adapter = OnnxDiTTransformer2DModel(runner=TorchRunner(dit))
    with pytest.raises(RunnerError, match="made of a runner, and has no file to save"):
        adapter.save_pretrained(tmp_path / "saved")
    with pytest.raises(RunnerError, match="made of a runner, and has no file to pickle"):
        pickle.dumps(adapter)
    assert list(tmp_path.iterdir()) == []


def test_the_pipeline_takes_it_for_its_own(
    float_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No warning of types; there is a parameter for offloading to look at; `from_pipe`."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    first = pipeline_of(OnnxDiTTransformer2DModel(float_file))
    assert "xpected types" not in caplog.text
    with pytest.raises(ValueError, match=r"expected .*'transformer'"):  # it compares exact types
        DiTPipeline.from_pipe(first)
    pipeline = DiTPipeline.from_pipe(first, transformer=first.transformer)
    assert pipeline.transformer is first.transformer
    assert next(pipeline.transformer.parameters()).device == torch.device("cpu")


def test_offloading_works(float_file: Path) -> None:
    pytest.importorskip("accelerate", reason="not a dependency")
    pipeline = pipeline_of(OnnxDiTTransformer2DModel(float_file))
    expected = run(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert torch.equal(run(pipeline), expected)


def test_what_it_is_made_of(dit: DiT, float_file: Path, tmp_path: Path) -> None:
    for path, runner in ((None, None), (float_file, TorchRunner(dit))):
        with pytest.raises(RunnerError, match="pass the path of an exported file, or runner="):
            OnnxDiTTransformer2DModel(path, runner=runner)
    with pytest.raises(OnnxExportError, match="no readable ONNX file"):
        OnnxDiTTransformer2DModel(tmp_path / "absent.onnx")
