"""What `Runner` promises, of every backend that runs here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import (
    TINY,
    example_inputs,
    exported,
    exported_reference,
    fed,
    tiny_dit,
    tiny_folded,
)
from tensorrt_fixture import made_plan, stand_ins
from torch import Tensor

from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.dit.model import DiT
from ditas_export.errors import NonFiniteError, RunnerError
from ditas_export.families.base import ModelInputs
from ditas_export.runtime.checked_runner import CheckedRunner
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.tensorrt_runner import TensorRTRunner
from ditas_export.runtime.torch_int8 import Int8Runner
from ditas_export.runtime.torch_runner import TorchRunner


def fake_quantized() -> TorchRunner:
    return TorchRunner(fake_quantized_model(tiny_folded(), ranges="token"))


MAKERS: dict[str, Callable[[], CheckedRunner]] = {
    "torch": lambda: TorchRunner(tiny_dit()),
    "fake-quantized": fake_quantized,
    "int8": lambda: Int8Runner(tiny_folded(), ranges="token"),
    "onnxruntime": lambda: OnnxRuntimeRunner(exported(), threads=1),
    "onnxruntime-float": lambda: OnnxRuntimeRunner(exported_reference(), threads=1),
    "openvino": lambda: OpenVINORunner(exported(target="onnxruntime"), threads=1),
}


STAND_INS = ("tensorrt", "rtx")
"""Products whose stand-ins run plans; what the engines compute, a GPU must show."""


@pytest.fixture(params=[*MAKERS, *STAND_INS])
def runner(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[CheckedRunner]:
    if request.param == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("extra [openvino]")
    if request.param in STAND_INS:
        stand_ins(tmp_path, monkeypatch)
        with TensorRTRunner(made_plan(tmp_path, request.param)) as opened:
            yield opened
        return
    with MAKERS[request.param]() as opened:
        yield opened


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_get_what_they_would_get_alone(runner: CheckedRunner, threads: int) -> None:
    """Requests of several sizes at once, twelve each: byte for byte what one thread gets."""
    requests = [example_inputs(batch=1 + seed % 3, seed=seed) for seed in range(threads)]
    alone = [runner(fed(*inputs)) for inputs in requests]

    def ask(index: int) -> list[Tensor]:
        return [runner(fed(*requests[index])) for _ in range(12)]

    with ThreadPoolExecutor(threads) as pool:
        for expected, answers in zip(alone, pool.map(ask, range(threads)), strict=True):
            assert all(torch.equal(answer, expected) for answer in answers)


def test_an_answer_is_not_written_to_by_the_next(runner: CheckedRunner) -> None:
    first = runner(fed(*example_inputs(seed=0)))
    kept = first.clone()
    runner(fed(*example_inputs(seed=1)))
    assert torch.equal(first, kept)
    assert first.dtype == torch.float32
    assert not first.requires_grad


LATENTS, TIMESTEPS, LABELS = example_inputs(batch=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latents": LATENTS[:, :2]},
            r"latents are \(2, 2, 8, 8\); the model takes \(N, 3, 8, 8\)",
        ),
        ({"latents": LATENTS[..., :4]}, r"latents are \(2, 3, 8, 4\)"),
        ({"latents": LATENTS[0]}, r"latents are \(3, 8, 8\)"),
        ({"latents": LATENTS[:0]}, "one row at least"),
        ({"latents": LATENTS.long()}, "takes floats"),
        ({"latents": LATENTS.numpy()}, "latents are ndarray; the model takes torch tensors"),
        ({"class_labels": [1, 2]}, "class_labels are list"),
        ({"class_labels": LABELS.bool()}, "torch.bool; the model takes whole numbers"),
        ({"timesteps": TIMESTEPS[:1]}, r"timesteps are \(1,\); with 2 latents"),
        ({"timesteps": torch.tensor(5)}, r"timesteps are \(\)"),
        ({"timesteps": TIMESTEPS.float()}, "whole numbers"),
        ({"timesteps": torch.tensor([1000, 3])}, "timesteps run from 3 to 1000; .* 0 to 999"),
        ({"timesteps": torch.tensor([-1, 3])}, "timesteps run from -1 to 3"),
        ({"class_labels": torch.tensor([11, 3])}, "run from 3 to 11; the model knows 0 to 10"),
        ({"class_labels": torch.tensor([-1, 3])}, "run from -1 to 3"),
        ({"class_labels": LABELS[:, None]}, r"class_labels are \(2, 1\)"),
    ],
)
def test_inputs_that_do_not_fit(
    runner: CheckedRunner, changes: dict[str, Tensor], message: str
) -> None:
    given = {"latents": LATENTS, "timesteps": TIMESTEPS, "class_labels": LABELS} | changes
    with pytest.raises(RunnerError, match=message):
        runner(fed(**given))


def test_an_output_that_is_not_finite_is_an_error(runner: CheckedRunner) -> None:
    latents = LATENTS.clone()
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinity in rows 1 of a batch") as caught:
        runner(fed(latents, TIMESTEPS, LABELS))
    assert caught.value.rows == (1,)
    runner(fed(LATENTS, TIMESTEPS, LABELS))  # the next one is answered


def test_nothing_is_answered_after_the_end(runner: CheckedRunner) -> None:
    runner.close()
    with pytest.raises(RunnerError, match="closed; open the model again"):
        runner(fed(LATENTS, TIMESTEPS, LABELS))
    runner.close()  # twice is once


class Failing(CheckedRunner):
    """A backend that raises what it is given."""

    description = "a backend"
    device = torch.device("cpu")

    def __init__(self, error: BaseException) -> None:
        super().__init__(TINY, one_at_a_time=True)
        self._backend = error

    def _infer(self, backend: Any, _inputs: ModelInputs) -> Tensor:
        raise backend


def test_a_fault_of_a_backend_is_one_line() -> None:
    with pytest.raises(RunnerError, match=r"^a backend failed: two lines$"):
        Failing(ValueError("two\nlines"))(fed(LATENTS, TIMESTEPS, LABELS))
    with pytest.raises(RunnerError, match=r"^a backend failed: MemoryError$"):
        Failing(MemoryError())(fed(LATENTS, TIMESTEPS, LABELS))
    with pytest.raises(KeyboardInterrupt):
        Failing(KeyboardInterrupt())(fed(LATENTS, TIMESTEPS, LABELS))


class Shared(CheckedRunner):
    """A backend with one buffer, which a second call at the same time would overwrite."""

    description = "shared memory"
    device = torch.device("cpu")

    def __init__(self, model: DiT) -> None:
        super().__init__(TINY, one_at_a_time=True)
        self._backend = model
        self.inside = 0

    def _infer(self, backend: DiT, inputs: ModelInputs) -> Tensor:
        self.inside += 1
        assert self.inside == 1
        output: Tensor = backend(**inputs)
        assert self.inside == 1
        self.inside -= 1
        return output


def test_calls_take_turns_where_they_would_share_memory() -> None:
    runner = Shared(tiny_dit())
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: runner(fed(LATENTS, TIMESTEPS, LABELS)), range(16)))
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16, torch.uint64])
def test_whole_numbers_of_any_type_are_taken(runner: CheckedRunner, dtype: torch.dtype) -> None:
    steps = torch.tensor([3, 200])
    expected = runner(fed(LATENTS, steps, LABELS))
    assert torch.equal(runner(fed(LATENTS, steps.to(dtype), LABELS.to(dtype))), expected)
