"""OpenVINO takes the same file and gives the same numbers."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from quantized_fixture import TINY, example_inputs, exported, exported_reference, fed, snr_db

from ditas_export.errors import RunnerError
from ditas_export.runtime.onnxruntime_runner import ACCURATE_WEIGHT_ONLY, OnnxRuntimeRunner
from ditas_export.runtime.openvino_runner import OpenVINORunner

pytest.importorskip("openvino", reason="extra [openvino]")

HERE = Path(__file__).parent
FINAL_BIAS = "final_layer.linear/bias"


@pytest.fixture
def reference_file() -> Path:
    return exported_reference()


def both(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what ONNX Runtime and OpenVINO make of a file."""
    inputs = example_inputs(batch=3)
    with OnnxRuntimeRunner(path, threads=2, session_entries=ACCURATE_WEIGHT_ONLY) as runner:
        expected = runner(fed(*inputs))
    with OpenVINORunner(path, threads=2) as runner:
        assert runner.config == TINY
        assert "openvino" in runner.description
        return expected, runner(fed(*inputs))


@pytest.mark.parametrize(
    ("layout", "ranges", "rank", "target"),
    [
        ("int4", "token", 4, "portable"),
        ("int4", "static", 0, "portable"),
        ("int8", "token", 0, "portable"),
        ("int4", "token", 4, "onnxruntime"),
        ("int8", "static", 4, "onnxruntime"),
    ],
)
def test_quantized_files_give_the_same_numbers(
    layout: str, ranges: str, rank: int, target: str
) -> None:
    path = exported(layout=layout, ranges=ranges, rank=rank, target=target)
    # A code that flips at a rounding tie shows as some 60 dB; anything wrong as less than 30.
    assert snr_db(*both(path)) > 50


def test_integer_modulation_gives_the_same_numbers() -> None:
    assert snr_db(*both(exported(adaln_bits=4, rank=4))) > 50


def test_the_float_file_gives_the_same_numbers(reference_file: Path) -> None:
    # In BF16, which OpenVINO would choose by itself on some processors, this is near 40 dB.
    assert snr_db(*both(reference_file)) > 100


BFLOAT16_PRODUCTS = """
import sys
import torch
from pathlib import Path
from quantized_fixture import example_inputs, fed, snr_db, tiny_dit
from ditas_export.runtime.openvino_runner import OpenVINORunner

inputs = example_inputs(batch=3)
expected = tiny_dit().to(torch.bfloat16).float()(*inputs)
with OpenVINORunner(Path(sys.argv[1]), threads=1) as runner:
    print(snr_db(expected, runner(fed(*inputs))), runner.description)
"""


@pytest.mark.parametrize("instructions", ["DEFAULT", "AVX2"])
def test_the_description_says_what_the_products_are(instructions: str) -> None:
    """A bf16 file is computed in bf16 where the processor has it, whatever hint is given."""
    done = subprocess.run(
        [sys.executable, "-c", BFLOAT16_PRODUCTS, str(exported_reference(torch.bfloat16))],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "PYTHONPATH": str(HERE)},
    )
    snr, _, description = done.stdout.partition(" ")
    # The weights are rounded on both sides: only products that round too are far from float32's.
    assert description.strip().endswith("(CPU, bf16)" if float(snr) < 60 else "(CPU, f32)"), snr


def test_the_description_of_float32(reference_file: Path) -> None:
    for path in (reference_file, exported()):
        with OpenVINORunner(path, threads=1) as runner:
            assert runner.description.endswith("(CPU, f32)")


def test_what_was_compiled_is_kept(tmp_path: Path) -> None:
    """For every number of threads, and wherever the file lies."""
    inputs, cache = example_inputs(batch=3), tmp_path / "cache"
    with OpenVINORunner(exported(), threads=1, cache=cache) as runner:
        expected, description = runner(fed(*inputs)), runner.description
    (blob,) = cache.rglob("*.blob")
    made = blob.stat().st_mtime_ns
    copy = tmp_path / "copy.onnx"
    shutil.copy(exported(), copy)
    for path, threads in ((exported(), 1), (copy, 2)):
        with OpenVINORunner(path, threads=threads, cache=cache) as runner:
            assert torch.equal(runner(fed(*inputs)), expected)
            assert runner.description == description
            assert runner._backend.model.get_property("INFERENCE_NUM_THREADS") == threads
    assert list(cache.rglob("*.blob")) == [blob]
    assert blob.stat().st_mtime_ns == made
    # Cut short by whatever: it is compiled again.
    blob.write_bytes(blob.read_bytes()[:-1000])
    with OpenVINORunner(exported(), threads=1, cache=cache) as runner:
        assert torch.equal(runner(fed(*inputs)), expected)
    # What is kept is of one precision.
    with OpenVINORunner(exported(), threads=1, precision="bf16", cache=cache):
        assert len(list(cache.rglob("*.blob"))) == 2


def test_a_kept_model_outlives_its_entry(tmp_path: Path) -> None:
    """It is mapped from a file that may be deleted while it is used."""
    inputs, cache = example_inputs(batch=3), tmp_path / "cache"
    with OpenVINORunner(exported(), threads=1, cache=cache) as runner:
        expected = runner(fed(*inputs))
        shutil.rmtree(cache)
        gc.collect()
        assert torch.equal(runner(fed(*inputs)), expected)


def test_what_was_compiled_of_another_file_is_not_taken(tmp_path: Path) -> None:
    """Of the same name, the same size and the same time."""
    path, inputs = tmp_path / "model.onnx", example_inputs(batch=3)
    path.write_bytes(exported().read_bytes())
    with OpenVINORunner(path, threads=1, cache=tmp_path / "cache") as runner:
        before = runner(fed(*inputs))
    status = path.stat()
    model = onnx.load(str(path))
    bias = next(part for part in model.graph.initializer if part.name == FINAL_BIAS)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1, bias.name))
    onnx.save(model, str(path))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with OpenVINORunner(path, threads=1, cache=tmp_path / "cache") as runner:
        assert torch.allclose(runner(fed(*inputs)), before + 1, atol=1e-5)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.warns(RuntimeWarning, match="cannot be written .* set DITAS_EXPORT_CACHE to a"),
        OpenVINORunner(exported(), threads=1, cache=tmp_path / "file") as runner,
    ):
        runner(fed(*example_inputs()))


def test_a_closed_runner_is_refused(reference_file: Path) -> None:
    with OpenVINORunner(reference_file) as runner:
        pass
    with pytest.raises(RunnerError, match="closed"):
        runner(fed(*example_inputs()))


def test_a_file_that_openvino_refuses(reference_file: Path, tmp_path: Path) -> None:
    model = onnx.load(str(reference_file))
    next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "NoSuchOp"
    path = tmp_path / "broken.onnx"
    onnx.save(model, str(path))
    with pytest.raises(RunnerError, match=r"openvino .* refuses .*broken.onnx"):
        OpenVINORunner(path)


def test_without_openvino(reference_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(RunnerError, match=r"pip install \"ditas-export\[openvino\]\""):
        OpenVINORunner(reference_file)
