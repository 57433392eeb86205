"""examples/browser: the sampler in JavaScript, exported files in onnxruntime-web, and the page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from chromium import Page, find_chromium, opened, require
from quantized_fixture import (
    TINY,
    example_inputs,
    exported,
    exported_reference,
    fed,
    quantized_tiny_dit,
    snr_db,
)
from torch import Tensor

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.diffusion.diffusion_schedules import make_scheduler
from ditas_export.diffusion.sampling import image_generator, sample
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import DitasExportError
from ditas_export.families.base import ModelInputs
from ditas_export.families.identity import identity_of
from ditas_export.families.load import load_model
from ditas_export.onnx_export.export import export_onnx, export_reference
from ditas_export.process import FlowProcess, Process
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner

EXAMPLE = Path(__file__).parents[1] / "examples" / "browser"
LINEAR = Process()
PROCESSES = {
    "linear": LINEAR,
    "scaled": Process(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        train_timesteps=500,
        variance="fixed_small",
    ),
    "cosine": Process(beta_schedule="squaredcos_cap_v2", variance="fixed_large"),
}


@pytest.fixture(scope="module")
def node() -> str:
    require(found=shutil.which("node") is not None, what="node")
    return "node"


@pytest.fixture(scope="module")
def onnxruntime_web() -> None:
    require(found=(EXAMPLE / "node_modules" / "onnxruntime-web").is_dir(), what="onnxruntime-web")


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_chromium()


def run(name: str, **job: Any) -> Any:
    """Return what tests/browser/run.mjs answers, or raise its error."""
    script = Path(__file__).parent / "browser" / "run.mjs"
    asked = json.dumps({"name": name, "folder": f"{EXAMPLE.as_uri()}/", **job})
    done = subprocess.run(
        ["node", str(script)], input=asked, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["result"]


class Simple:
    """A model that is a formula, the one of run.mjs."""

    def __init__(self, config: DiTConfig) -> None:
        self.config = config

    def __call__(self, inputs: ModelInputs) -> Tensor:
        latents, timesteps, class_labels = inputs.values()
        offset = timesteps / 2000 + class_labels / 100
        epsilon = 0.3 * latents + offset[:, None, None, None]
        if not self.config.learn_sigma:
            return epsilon
        return torch.cat([epsilon, (3 * latents).sin()], dim=1)


def drawn(config: DiTConfig, *, images: int, steps: int) -> list[list[float]]:
    """Return the noise that `sample` draws, of every image in one list."""
    shape = (config.in_channels, config.input_size, config.input_size)
    lists = []
    for image in range(images):
        generator = image_generator(0, image)
        draws = [torch.randn(shape, generator=generator) for _ in range(steps)]
        lists.append(torch.stack(draws).flatten().tolist())
    return lists


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_schedules_are_those_of_diffusers(process: Process) -> None:
    asked: list[tuple[Any, int]] = [("ddpm", 2), ("ddpm", 7), ("ddpm", 50), ("ddim", 50)]
    asked += [("ddpm", process.train_timesteps), ("ddim", process.train_timesteps)]
    found = run("schedule", process=dataclasses.asdict(process), asked=asked)
    for (sampler, count), steps in zip(asked, found["steps"], strict=True):
        scheduler = make_scheduler(sampler, count, process)
        # diffusers computes betas and their products in float32, this in float64.
        np.testing.assert_allclose(found["betas"], scheduler.betas, rtol=5e-6)
        assert [step["timestep"] for step in steps] == scheduler.timesteps.tolist()
        alphas = scheduler.alphas_cumprod[scheduler.timesteps]
        np.testing.assert_allclose([step["alpha"] for step in steps], alphas, rtol=5e-5)
        assert [step["next"] for step in steps] == [step["alpha"] for step in steps[1:]] + [1]


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_trajectories_are_those_of_sample(process: Process, sampler: Any, guidance: float) -> None:
    """Four channels, the fourth of which is not guided; a variance of every kind."""
    learned = process.variance == "learned_range"
    config = dataclasses.replace(TINY, in_channels=4, process=process, learn_sigma=learned)
    settings = {"labels": [3, 7], "sampler": sampler, "steps": 10, "guidance": guidance}
    found = run(
        "sample",
        config=dataclasses.asdict(config),
        settings=settings,
        noise=drawn(config, images=2, steps=10),
    )
    expected = sample(
        Simple(config),  # type: ignore[arg-type]
        classes=[3, 7],
        steps=10,
        sampler=sampler,
        cfg_scale=guidance,
    )
    # float32 latents at every step, and diffusers' float32 schedule.
    error = (torch.tensor(found) - expected.flatten()).norm() / expected.norm()
    assert float(error) < 2e-5


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("end", ["data", "noise"])
def test_flows_follow_sample_too(end: Any, guidance: float) -> None:
    process = FlowProcess(time_ends_at=end, velocity_towards=end)
    config = dataclasses.replace(TINY, in_channels=4, process=process, learn_sigma=False)
    settings = {"labels": [3, 7], "sampler": "euler", "steps": 10, "guidance": guidance}
    found = run(
        "sample",
        config=dataclasses.asdict(config),
        settings=settings,
        noise=drawn(config, images=2, steps=1),
    )
    simple: Any = Simple(config)
    expected = sample(simple, classes=[3, 7], steps=10, cfg_scale=guidance)
    error = (torch.tensor(found) - expected.flatten()).norm() / expected.norm()
    assert float(error) < 2e-6  # float32 latents at every step


@pytest.mark.usefixtures("node")
@pytest.mark.parametrize(
    ("change", "setting", "message"),
    [
        ({}, {"sampler": "ddim", "steps": 30}, "ddim takes a number of steps that divides 1000"),
        ({}, {"sampler": "euler"}, "sampler euler; expected ddpm or ddim"),
        ({}, {"steps": 1}, "1 steps; give 2 to 1000"),
        ({"process": {"prediction": "velocity"}}, {}, "sampler ddpm; expected euler"),
        ({"null_row": False}, {}, "nothing to guide with"),
        ({"process": {"beta_schedule": "odd"}}, {}, "beta_schedule odd; expected linear"),
    ],
)
def test_what_the_sampler_refuses(
    change: dict[str, Any], setting: dict[str, Any], message: str
) -> None:
    config = dataclasses.asdict(TINY)
    config = {**config, **change, "process": {**config["process"], **change.get("process", {})}}
    settings = {"labels": [3], "sampler": "ddpm", "steps": 2, "guidance": 4.0, **setting}
    with pytest.raises(ValueError, match=message):
        run("sample", config=config, settings=settings, noise=drawn(TINY, images=1, steps=2))


@pytest.mark.usefixtures("node")
def test_the_noise_of_the_page_is_normal_and_an_images_own() -> None:
    first, second = (run("noise", seed=s, images=[0, 1], count=100_000) for s in (0, 1))
    assert run("noise", seed=0, images=[1, 0], count=100_000) == first[::-1]
    draws = np.array([*first, *second])
    # Four deviations of the estimate of each.
    assert np.abs(draws.mean(axis=1)).max() < 0.013
    assert np.abs(draws.std(axis=1) - 1).max() < 0.009
    assert np.abs((draws**4).mean(axis=1) - 3).max() < 0.13
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.013


FORMS: dict[str, dict[str, Any]] = {
    "portable": {},
    "onnxruntime": {"target": "onnxruntime"},
    "tensorrt": {"target": "tensorrt", "layout": "int8", "dtype": torch.float16},
    "adaln 8": {"adaln_bits": 8},
    "adaln 4": {"adaln_bits": 4},
    "w 8": {"weight_bits": 8, "layout": "int8", "rank": 0},
    "a 16": {"activation_bits": 16, "block_size": 32},
    "static": {"ranges": "static"},
    "fp16": {"dtype": torch.float16},
    "int8": {"layout": "int8"},
}


@pytest.mark.usefixtures("node", "onnxruntime_web")
def test_every_form_computes_the_same_in_onnxruntime_web() -> None:
    paths = {name: exported(**settings) for name, settings in FORMS.items()}
    latents, timesteps, labels = example_inputs()
    found = run(
        "outputs",
        config=dataclasses.asdict(TINY),
        files=[str(path) for path in paths.values()],
        latents=latents.flatten().tolist(),
        timesteps=timesteps.tolist(),
        labels=labels.tolist(),
    )
    for (name, path), output in zip(paths.items(), found, strict=True):
        with OnnxRuntimeRunner(path, as_is=True) as runner:
            expected = runner(fed(latents, timesteps, labels))
        # Rounding ties; float16 kernels round where they like.
        least = 30 if FORMS[name].get("dtype") else 40
        assert snr_db(expected, torch.tensor(output).view_as(expected)) > least, name


@pytest.mark.usefixtures("node", "onnxruntime_web")
def test_onnxruntime_web_samples_what_the_runner_samples() -> None:
    path = exported_reference()
    settings = {"labels": [3, 7], "sampler": "ddpm", "steps": 5, "guidance": 1.5}
    found = run(
        "sample",
        config=dataclasses.asdict(TINY),
        settings=settings,
        noise=drawn(TINY, images=2, steps=5),
        file=str(path),
    )
    with OnnxRuntimeRunner(path) as runner:
        expected = sample(runner, classes=[3, 7], steps=5, cfg_scale=1.5)
    # float32 sums in another order, which a random model amplifies.
    assert snr_db(expected, torch.tensor(found).view_as(expected)) > 80


def load_serve() -> ModuleType:
    spec = importlib.util.spec_from_file_location("serve", EXAMPLE / "serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


serve = load_serve()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The bundled model quantized by plain rounding, and in float."""
    folder = tmp_path_factory.mktemp("browser")
    model = load_model("digits").model
    export_onnx(fold_smoothing(quantized_tiny_dit(model)), folder / "out.onnx")
    export_reference(model, folder / "fp32.onnx", identity=identity_of(model))
    return folder / "out.onnx", folder / "fp32.onnx"


@pytest.fixture(scope="module")
def address(digits: tuple[Path, Path], onnxruntime_web: None) -> Iterator[str]:
    server = serve.make_server(*digits, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


STATUS = "document.getElementById('status')?.textContent"


def fill(page: Page, **fields: object) -> None:
    """Fill the form and press its button."""
    for name, value in fields.items():
        page.evaluate(f"document.querySelector('[name={name}]').value = {json.dumps(str(value))}")
    page.evaluate("document.getElementById('start').click()")


def pictures(page: Page) -> np.ndarray[Any, Any]:
    """Return the red of every canvas, (models, pixels)."""
    found = page.evaluate(
        "[...document.querySelectorAll('canvas')].map((canvas) => Array.from("
        "canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data))"
    )
    return np.array(found)[:, ::4]


def test_the_page_samples_both_files_and_can_be_stopped(chromium: str, address: str) -> None:
    with opened(chromium, address) as page:
        page.wait_for(f"{STATUS} === 'Ready.'")
        assert page.evaluate("crossOriginIsolated"), "threads share memory"
        fill(page, classes="3, 7", sampler="ddim", steps=10)
        page.wait_for(f"{STATUS} === 'Done.'")
        quantized, full = pictures(page)
        assert quantized.shape == (2 * 16 * 16,)
        # The same digits: plain rounding of weights, 0.9 and more; other digits are below 0.6.
        assert 0.9 < np.corrcoef(quantized, full)[0, 1] < 1
        assert "step 10 of 10" in page.evaluate("document.body.innerText")
        fill(page, seed=1)
        page.wait_for(f"{STATUS} === 'Done.'")
        assert np.corrcoef(full, pictures(page)[1])[0, 1] < 0.9, "another seed, another picture"
        fill(page, steps=1000)
        page.wait_for("document.querySelector('progress').value > 0")
        page.evaluate("document.getElementById('cancel').click()")
        page.wait_for(f"{STATUS} === 'Cancelled.'")
        assert page.evaluate("document.querySelector('progress').value") < 1
        fill(page, steps=30)
        page.wait_for(f"{STATUS}.startsWith('ddim takes a number of steps that divides 1000')")
        fill(page, classes="3 10")
        page.wait_for(f"{STATUS} === 'classes 10; give some of 0 to 9'")


def test_the_server_answers_its_own_addresses_alone(address: str) -> None:
    with urllib.request.urlopen(f"{address}models.json") as answer:
        listed = json.load(answer)
    assert [model["url"] for model in listed["models"]] == [
        "models/quantized.onnx",
        "models/float.onnx",
    ]
    assert listed["config"]["num_classes"] == 10
    for other in ("serve.py", "../serve.py", "models/", "package.json"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}{other}")


def test_what_the_server_refuses(
    digits: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DitasExportError, match="was made from another model"):
        serve.page_contents(digits[0], exported_reference())
    with pytest.raises(DitasExportError, match="no readable ONNX file"):
        serve.page_contents(tmp_path / "absent.onnx", digits[1])
    monkeypatch.setattr(serve, "HERE", tmp_path)
    with pytest.raises(DitasExportError, match=r"has no ort\.wasm\.min\.mjs, .*npm install"):
        serve.page_contents(*digits)
