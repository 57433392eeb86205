"""The runner of plans: a stand-in for either product, host memory for the GPU's."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import TINY, example_inputs, exported, fed, snr_db
from tensorrt_fixture import ADA, VERSIONS, Behave, HostStream, made_plan, stand_ins
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from ditas_export.artifact_files import sha256_of_file
from ditas_export.cli.sample import app
from ditas_export.diffusion.sampling import sample, trajectory
from ditas_export.dit.model import DiTConfig
from ditas_export.engine.layers import layers_from_inspector
from ditas_export.engine.metadata import Gpu
from ditas_export.engine.options import BuildOptions
from ditas_export.engine.products import PRODUCTS, RTX, Product
from ditas_export.engine.report import layer_report
from ditas_export.errors import DitasExportError, EngineError, RunnerError
from ditas_export.families.base import ModelInputs
from ditas_export.onnx_export.file_facts import read_form
from ditas_export.runtime import tensorrt_runner
from ditas_export.runtime.cuda_stream import CudaStream
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.tensorrt_plan import load_plan, load_product
from ditas_export.runtime.tensorrt_runner import TensorRTRunner


@pytest.fixture
def behave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behave:
    return stand_ins(tmp_path, monkeypatch)


def calls(folder: Path, kind: str) -> list[Any]:
    return [call for call in json.loads((folder / "calls.json").read_text()) if call[0] == kind]


def formula(latents: Tensor, timesteps: Tensor) -> Tensor:
    eps = latents + timesteps[:, None, None, None] / 1000
    return torch.cat([eps, -eps], dim=1)


@pytest.mark.usefixtures("behave")
@pytest.mark.parametrize("product", VERSIONS)
def test_a_plan_is_run(tmp_path: Path, product: str) -> None:
    with TensorRTRunner(made_plan(tmp_path, product)) as runner:
        assert runner.config == TINY
        assert VERSIONS[product] in runner.description
        assert ADA.name in runner.description
        for seed in range(3):
            latents, timesteps, labels = example_inputs(seed=seed)
            found = runner(fed(latents, timesteps, labels))
            assert torch.equal(found, formula(latents, timesteps))
            assert found.device == latents.device


@pytest.mark.usefixtures("behave")
def test_an_output_is_not_written_to_again(tmp_path: Path) -> None:
    with TensorRTRunner(made_plan(tmp_path)) as runner:
        latents, timesteps, labels = example_inputs()
        first = runner(fed(latents, timesteps, labels))
        runner(fed(latents + 1, timesteps, labels))
        assert torch.equal(first, formula(latents, timesteps))


@pytest.mark.usefixtures("behave")
@pytest.mark.parametrize(("product", "captures"), [("tensorrt", 2), ("rtx", 0)])
def test_a_batch_size_is_set_up_once(tmp_path: Path, product: str, captures: int) -> None:
    """TensorRT for RTX captures inside; from outside, both would be nested."""
    with TensorRTRunner(made_plan(tmp_path, product)) as runner:
        for rows in (1, 3, 1, 3, 3):
            runner(fed(torch.randn(rows, 3, 8, 8), torch.arange(rows), torch.arange(rows)))
        stream: Any = runner._stream
    assert len(calls(tmp_path, "context")) == 2
    assert Counter(shape[0] for _, name, shape in calls(tmp_path, "shape")) == {1: 3, 3: 3}
    assert stream.captured == captures
    assert stream.replayed == (5 if captures else 0)
    executed = [rows for _, handle, rows in calls(tmp_path, "execute") if handle == stream.handle]
    assert executed == [1, 1, 3, 3, 1, 3, 3]  # the first of a size warms up


@pytest.mark.usefixtures("behave")
def test_rtx_compiles_at_once_and_captures_itself(tmp_path: Path) -> None:
    with TensorRTRunner(made_plan(tmp_path, "rtx")):
        pass
    assert calls(tmp_path, "set") == [
        ["set", "allocation", "USER_MANAGED"],
        ["set", "cuda_graph_strategy", "WHOLE_GRAPH_CAPTURE"],
        ["set", "dynamic_shapes_kernel_specialization_strategy", "EAGER"],
    ]


@pytest.mark.usefixtures("behave")
def test_compiled_kernels_are_kept(tmp_path: Path) -> None:
    plan, cache = made_plan(tmp_path, "rtx"), tmp_path / "new" / "cache"
    with TensorRTRunner(plan, cache=cache) as runner:
        assert not list(cache.rglob("kernels"))
        runner(fed(*example_inputs()))
        (kept,) = cache.rglob("kernels")
        assert kept.read_bytes() == b"+compiled"
    with TensorRTRunner(plan, cache=cache) as runner:
        assert calls(tmp_path, "deserialize kernels") == [["deserialize kernels", "+compiled"]]
        runner(fed(*example_inputs()))
    assert list(cache.rglob("kernels")) == [kept]
    assert kept.read_bytes() == b"+compiled+compiled"
    kept.write_bytes(b"-compiled+compiled")  # of the same size, written to: they are not trusted
    with TensorRTRunner(plan, cache=cache) as runner:
        runner(fed(*example_inputs()))
    assert kept.read_bytes() == b"+compiled"


@pytest.mark.usefixtures("behave")
def test_kernels_are_of_one_gpu_and_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept() -> int:
        with TensorRTRunner(made_plan(tmp_path, "rtx", version=version), cache=tmp_path) as runner:
            runner(fed(*example_inputs()))
        return len(list(tmp_path.rglob("kernels")))

    version = VERSIONS["rtx"]
    assert kept() == kept() == 1
    monkeypatch.setattr(HostStream, "gpu", Gpu(name="another", compute_capability="8.9"))
    assert kept() == 2
    version = "1.8.0.1"
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", version)
    assert kept() == 3


@pytest.mark.usefixtures("behave")
def test_tensorrt_has_no_kernels_to_keep(tmp_path: Path) -> None:
    with TensorRTRunner(made_plan(tmp_path), cache=tmp_path / "cache") as runner:
        runner(fed(*example_inputs()))
    assert not list((tmp_path / "cache").glob("entry-*"))


@pytest.mark.usefixtures("behave")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        TensorRTRunner(made_plan(tmp_path, "rtx"), cache=tmp_path / "file") as runner,
        pytest.warns(RuntimeWarning, match="cannot be written .* set DITAS_EXPORT_CACHE to a"),
    ):
        runner(fed(*example_inputs()))


@pytest.mark.usefixtures("behave")
def test_a_batch_outside_the_profile_is_refused(tmp_path: Path) -> None:
    with TensorRTRunner(made_plan(tmp_path)) as runner:
        inputs = torch.randn(5, 3, 8, 8), torch.arange(5), torch.arange(5)
        with pytest.raises(RunnerError, match="a batch of 5 rows; the plan takes 1 to 4 "):
            runner(fed(*inputs))


@pytest.mark.usefixtures("behave")
def test_inputs_that_do_not_fit(tmp_path: Path) -> None:
    latents, timesteps, labels = example_inputs()
    with TensorRTRunner(made_plan(tmp_path)) as runner:
        with pytest.raises(RunnerError, match=r"the model takes \(N, 3, 8, 8\)"):
            runner(fed(latents[:, :2], timesteps, labels))
        with pytest.raises(RunnerError, match="class_labels run from"):
            runner(fed(latents, timesteps, labels + 100))
    with pytest.raises(RunnerError, match="this runner is closed"):
        runner(fed(latents, timesteps, labels))


@pytest.mark.parametrize("product", VERSIONS)
@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses", "does not take the plan: Error Code 1: the magic tag$"),
        ("no memory", "cannot prepare a batch of 2: it gave no reason"),
        ("no shape", "cannot prepare a batch of 2"),
        ("fails", "failed: Error Code 3: an illegal memory access"),
        ("raises", "failed: incompatible function arguments"),
    ],
)
def test_what_the_product_reports_is_one_line(
    tmp_path: Path, behave: Behave, product: str, behaviour: str, message: str
) -> None:
    behave(behaviour)
    latents, timesteps, labels = (tensor[:2] for tensor in example_inputs())
    with pytest.raises(RunnerError, match=message) as caught:
        TensorRTRunner(made_plan(tmp_path, product))(fed(latents, timesteps, labels))
    assert "\n" not in str(caught.value)
    assert VERSIONS[product] in str(caught.value)


@pytest.mark.parametrize("product", VERSIONS)
def test_what_is_reported_of_a_call_that_succeeded_is_a_warning(
    tmp_path: Path, behave: Behave, product: str
) -> None:
    behave("complains")
    latents, timesteps, labels = example_inputs()
    with (
        TensorRTRunner(made_plan(tmp_path, product)) as runner,
        pytest.warns(RuntimeWarning, match="and goes on: Error Code 3: an illegal memory"),
    ):
        found = runner(fed(latents, timesteps, labels))
    assert torch.equal(found, formula(latents, timesteps))


def test_a_fault_of_the_gpu_is_one_line(tmp_path: Path, behave: Behave) -> None:
    """A replay is no call of the product's: torch raises what CUDA says of it."""
    behave("faults")
    with (
        TensorRTRunner(made_plan(tmp_path)) as runner,
        pytest.raises(RunnerError, match=r"4090 .*: CUDA error: an illegal memory access$"),
    ):
        runner(fed(*example_inputs()))


@pytest.mark.usefixtures("behave")
@pytest.mark.parametrize("product", VERSIONS)
def test_batch_sizes_share_one_block_of_memory(tmp_path: Path, product: str) -> None:
    with TensorRTRunner(made_plan(tmp_path, product)) as runner:
        for rows in (1, 2, 4):
            runner(fed(*example_inputs(batch=rows)))
    given = {(address, size) for _, address, size in calls(tmp_path, "memory")}
    assert len(calls(tmp_path, "memory")) == 3
    assert [size for _, size in given] == [4096]


@pytest.mark.usefixtures("behave")
@pytest.mark.parametrize("product", VERSIONS)
def test_batch_sizes_that_stay_set_up_are_bounded(
    tmp_path: Path, product: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_runner, "MOST_BATCH_SIZES", 2)
    alive = sys.modules["tensorrt"].Context.alive
    with TensorRTRunner(made_plan(tmp_path, product)) as runner:
        stream: Any = runner._stream
        for rows in (1, 2, 1):
            runner(fed(*example_inputs(batch=rows)))
        assert stream.finished == 0
        runner(fed(*example_inputs(batch=3)))  # 2 was used longest ago
        assert stream.finished == 1  # before its memory is freed
        assert sorted(context.shapes["latents"][0] for context in alive) == [1, 3]
        latents, timesteps, labels = example_inputs(batch=2)
        assert torch.equal(runner(fed(latents, timesteps, labels)), formula(latents, timesteps))
    assert stream.finished == 3
    assert not alive


@pytest.mark.usefixtures("behave")
@pytest.mark.parametrize("product", VERSIONS)
def test_threads_take_turns(tmp_path: Path, product: str) -> None:
    requests = [example_inputs(batch=1 + seed % 3, seed=seed) for seed in range(4)]
    with TensorRTRunner(made_plan(tmp_path, product)) as runner, ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda index: runner(fed(*requests[index % 4])), range(60))
        for index, found in enumerate(answers):
            latents, timesteps, _ = requests[index % 4]
            assert torch.equal(found, formula(latents, timesteps))


@pytest.mark.usefixtures("behave")
@pytest.mark.parametrize("product", VERSIONS)
def test_the_inspector_is_asked_under_shapes(tmp_path: Path, product: str) -> None:
    with TensorRTRunner(made_plan(tmp_path, product)) as runner:
        assert json.loads(runner.layer_information())["rows"] == 1
        runner(fed(*example_inputs(batch=3)))
        assert json.loads(runner.layer_information()) == {"Layers": [], "format": "JSON", "rows": 3}
    with pytest.raises(RunnerError, match="this runner is closed"):
        runner.layer_information()


@pytest.mark.parametrize("compatible", [True, False])
def test_code_in_a_plan_is_run_where_it_was_asked_for_alone(
    tmp_path: Path, behave: Behave, compatible: bool
) -> None:
    behave("host code")
    plan = made_plan(tmp_path, options=BuildOptions(version_compatible=compatible))
    if compatible:
        TensorRTRunner(plan).close()
        return
    with pytest.raises(RunnerError, match=r"does not take the plan: .* host code is not allowed"):
        TensorRTRunner(plan)


def test_kernels_of_another_driver_are_compiled_anew(tmp_path: Path, behave: Behave) -> None:
    plan, cache = made_plan(tmp_path, "rtx"), tmp_path / "cache"
    with TensorRTRunner(plan, cache=cache) as runner:
        runner(fed(*example_inputs()))
    behave("other driver")
    with pytest.warns(RuntimeWarning, match="leaves the kept kernels aside"):
        runner = TensorRTRunner(plan, cache=cache)
    runner(fed(*example_inputs()))
    (kept,) = cache.rglob("kernels")
    assert kept.read_bytes() == b"+compiled"


def test_a_product_that_keeps_no_kernels_says_so(tmp_path: Path, behave: Behave) -> None:
    behave("no cache")
    with pytest.warns(RuntimeWarning, match="compile them at every start"):
        runner = TensorRTRunner(made_plan(tmp_path, "rtx"), cache=tmp_path / "cache")
    runner(fed(*example_inputs()))
    assert not list((tmp_path / "cache").glob("entry-*"))


@pytest.mark.usefixtures("behave")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "10.13.2.6"}, r"built with TensorRT 10\.13\.2\.6"),
        ({"gpu": Gpu(name="NVIDIA L4", compute_capability="8.9")}, "was built on NVIDIA L4"),
        ({"plan_sha256": "0" * 64}, "describes another plan"),
    ],
)
def test_a_plan_for_another_place_is_not_deserialized(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        TensorRTRunner(made_plan(tmp_path, **changes))
    assert not (tmp_path / "calls.json").exists()


def test_the_real_product_says_why_it_refuses() -> None:
    pytest.importorskip("tensorrt_rtx", reason="extra [rtx]")
    trt = load_product(RTX)
    with pytest.raises(RunnerError, match=r"RTX does not take the plan: .*Error Code") as caught:
        load_plan(trt, b"no plan", title="RTX", kernels=b"")
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"there is no file .*out\.plan; build it"):
        TensorRTRunner(tmp_path / "out.plan")
    (tmp_path / "out.plan").write_bytes(b"a plan")
    with pytest.raises(EngineError, match="does not describe an engine"):
        TensorRTRunner(tmp_path / "out.plan")


def test_a_missing_product_is_named(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed")
    with pytest.raises(EngineError, match=r"TensorRT is not installed; run: pip install"):
        TensorRTRunner(made_plan(tmp_path))


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunnerError, match="device cuda:1 was asked for, but there are 1 GPUs"):
        CudaStream("cuda:1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="extra [rtx]")
    words = [str(made_plan(tmp_path, "rtx")), "-o", str(tmp_path / "out"), "--device", "cuda"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    *_, line = result.stderr.strip().splitlines()
    assert "sees no CUDA GPU" in line
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("behave")
def test_engines_are_opened_by_their_suffix(tmp_path: Path) -> None:
    plan = made_plan(tmp_path)
    opened = open_runner(str(plan), device="cuda:1", cache=tmp_path / "cache")
    assert isinstance(opened.runner, TensorRTRunner)
    assert opened.sha256 == sha256_of_file(plan)
    for settings, message in (
        ({"runtime": "openvino", "device": "cuda"}, "openvino does not run the engine"),
        ({"device": "cpu"}, "runs on GPUs; use --device cuda"),
        ({"device": "cuda", "threads": 2}, "an engine has no threads to set"),
    ):
        with pytest.raises(DitasExportError, match=message):
            open_runner(str(plan), **settings)


@pytest.mark.usefixtures("behave")
def test_the_sampling_loop_runs_a_plan(tmp_path: Path) -> None:
    class Formula:
        config = TINY

        def __call__(self, inputs: ModelInputs) -> Tensor:
            return formula(inputs.latents, inputs.timesteps)

    reference: Any = Formula()
    settings: dict[str, Any] = {"classes": [3, 7], "steps": 4, "seed": 2}
    with TensorRTRunner(made_plan(tmp_path)) as runner:
        found = sample(runner, device=runner.device, **settings)
    assert torch.equal(found, sample(reference, **settings))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_no_step_asks_for_latents_on_the_host(sampler: Any, cfg_scale: float) -> None:
    """Tensors of the meta device have shapes only: whatever copied them out would raise."""

    class Shapes:
        config: DiTConfig = TINY

        def __call__(self, inputs: ModelInputs) -> Tensor:
            latents, timesteps, labels = inputs.values()
            assert latents.is_meta
            assert timesteps.is_cpu
            assert labels.is_cpu
            return torch.cat([latents, latents], dim=1)

    class OneBit(TorchDispatchMode):
        """Says that meta latents are finite: the one thing that is read back of a step."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
                return True
            return func(*args, **(kwargs or {}))

    runner: Any = Shapes()
    with OneBit():
        steps = trajectory(
            runner, classes=[1, 2], steps=20, sampler=sampler, cfg_scale=cfg_scale, device="meta"
        )
        assert all(step.next_latents.is_meta for step in steps)


@pytest.mark.gpu
@pytest.mark.parametrize("product", PRODUCTS.values(), ids=lambda product: product.name)
def test_a_real_plan_gives_what_the_file_gives(tmp_path: Path, product: Product) -> None:
    """Whichever product is installed; batch sizes share memory, so each is asked again."""
    pytest.importorskip(product.module, reason=f"extra [{product.name}]")
    from ditas_export.cli.build import app as build

    file, plan = exported(layout="int8", target="tensorrt"), tmp_path / "out.plan"
    words = [str(file), "-o", str(plan), "--backend", product.name]
    built = CliRunner().invoke(build, words)
    assert built.exit_code == 0, built.stderr
    requests = [example_inputs(batch=rows, seed=rows) for rows in (2, 8, 1)]
    with OnnxRuntimeRunner(file) as runner:
        expected = [runner(fed(*inputs)) for inputs in requests]
    with TensorRTRunner(plan, cache=tmp_path / "cache") as runner:
        for inputs, reference in zip(requests, expected, strict=True):
            found = runner(fed(*(tensor.to(runner.device) for tensor in inputs)))
            assert found.device == runner.device
            assert snr_db(reference, found.cpu()) > 40  # rounding ties
        for _ in range(3):  # captured by now
            again = [runner(fed(*inputs)) for inputs in requests]
            for inputs, first in zip(requests, again, strict=True):
                assert torch.equal(runner(fed(*inputs)), first)
        layers = layers_from_inspector(runner.layer_information())
    assert not layer_report(layers, TINY, read_form(file)).lost
