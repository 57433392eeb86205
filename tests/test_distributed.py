"""Two real processes over gloo, as torchrun launches them, against one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_on_ranks
import pytest
import torch
import two_ranks
from quantized_fixture import snr_db, tiny_dit

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.calibration.states import CalibrationStates
from ditas_export.diffusion.sampling import sample
from ditas_export.distributed import SINGLE, launched_ranks
from ditas_export.errors import CalibrationError, DistributedError
from ditas_export.runtime.torch_runner import TorchRunner

Found = dict[str, Any]


def torchrun(*arguments: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, *map(str, arguments)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.terminate()  # past its time: torchrun, unlike a kill, takes its processes along
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As torchrun's processes have: how a product is split over threads may move its last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("pair")
    return folder, torchrun(two_ranks.__file__, folder)


@pytest.fixture(scope="module")
def pair(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> tuple[Found, Found]:
    folder, done = launched
    assert {"0.pt", "1.pt"} <= {path.name for path in folder.iterdir()}, done.stderr
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def alone() -> CalibrationStates:
    return two_ranks.sampled(SINGLE)


def test_states_and_maxima_are_equal_bit_for_bit(
    pair: tuple[Found, Found], alone: CalibrationStates
) -> None:
    for found in pair:
        latents, timesteps, maxima = found["states"]
        assert torch.equal(latents, alone.latents)
        assert torch.equal(timesteps, alone.timesteps)
        assert set(maxima) == set(alone.input_maxima)
        for name, value in maxima.items():
            assert torch.equal(value, alone.input_maxima[name]), name


def test_moments_agree_to_1e_6(pair: tuple[Found, Found]) -> None:
    """Against one process, and against the definition in float64."""
    moments, weights, tokens = two_ranks.reduced(SINGLE)
    x, x_hat = (torch.cat(parts).double() for parts in zip(*two_ranks.token_batches(), strict=True))
    centred = x_hat - x_hat.mean(0)
    outputs = x @ two_ranks.weight().double().T
    wanted = {
        "quantized": centred.T @ centred / len(x),
        "cross": (outputs - outputs.mean(0)).T @ centred / len(x),
        "quantized_mean": x_hat.mean(0),
        "output_mean": outputs.mean(0),
    }
    for found in pair:
        for name, reference in wanted.items():
            got, single = getattr(found["reduced"][0], name), getattr(moments, name)
            assert (got - single).norm() < 1e-12 * single.norm(), name  # the same float32 products
            assert (got - reference).norm() < 1e-6 * reference.norm(), name
        assert torch.allclose(found["reduced"][1], weights, rtol=1e-5)
    assert torch.equal(torch.cat([found["reduced"][2] for found in pair]), tokens)


def final_snr_db(quantized: QuantizedModel) -> float:
    settings: dict[str, Any] = {"classes": (2, 5, 8, 0), "steps": 6, "seed": 7}
    fake = fake_quantized_model(fold_smoothing(quantized), ranges="token")
    return snr_db(
        sample(TorchRunner(tiny_dit()), **settings), sample(TorchRunner(fake), **settings)
    )


def test_the_final_snr_is_that_of_one_process(
    pair: tuple[Found, Found], alone: CalibrationStates
) -> None:
    wanted = final_snr_db(two_ranks.quantized(SINGLE, alone))
    got = final_snr_db(pair[0]["quantized"])
    assert abs(got - wanted) < 0.5


def test_both_ranks_hold_the_same_model(pair: tuple[Found, Found]) -> None:
    first, second = (found["quantized"].linears for found in pair)
    for name, linear in first.items():
        other = second[name]
        for part in ("codes", "multipliers", "row_scale"):
            assert torch.equal(getattr(linear.weight, part), getattr(other.weight, part)), name
        assert torch.equal(linear.bias, other.bias)
        assert linear.output_snr_db == other.output_snr_db


def test_the_first_rank_alone_keeps_progress_and_both_go_on(pair: tuple[Found, Found]) -> None:
    assert [found["resumed"] for found in pair] == [(True, 4), (False, 4)]  # of eight linears
    assert [found["first"] for found in pair] == [0, 0]


def test_what_one_rank_finds_stops_both_with_its_message(pair: tuple[Found, Found]) -> None:
    for found in pair:
        sampling, walking, refused, _, _, crowded = found["ill"]
        assert "CalibrationError: the input of blocks.1.mlp.fc2 has NaN or infinity" in sampling
        assert "CalibrationError: blocks.1.attn.proj puts out NaN or infinity" in walking
        assert refused == "CalibrationError: no good"
        assert "CalibrationError: 2 processes for 16 rows" in crowded
        assert "launch at most 1" in crowded


def test_any_other_error_of_one_rank_reaches_the_others(pair: tuple[Found, Found]) -> None:
    told = "DistributedError: rank {} has stopped: MemoryError: no memory"
    own = "MemoryError: no memory"
    alone, together = zip(*(found["ill"][3:5] for found in pair), strict=True)
    assert alone == (own, told.format(0))
    assert together == (told.format(1), own)


def test_a_rank_that_dies_stops_the_other(
    launched: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = launched
    assert done.returncode != 0
    assert "a bug of rank 1" in done.stderr
    assert not (folder / "not stopped").exists()


OPTIONS = ("--device", "cpu", "--json")
COMMAND = ("-m", "ditas_export.cli.export", *OPTIONS)


def test_the_command_writes_and_speaks_once(checkpoint: Path, tmp_path: Path) -> None:
    quick = ("--model", checkpoint, "--steps", "4", "--samples", "3", "--method", "linear")
    done = torchrun(command_on_ranks.__file__, *OPTIONS, *quick, tmp_path / "out.onnx")
    assert done.returncode == 0, done.stderr
    left = [tmp_path / f"out.{rank}.txt" for rank in (0, 1)]
    written = {tmp_path / f"out.{end}" for end in ("onnx", "json", "stats.safetensors")}
    assert set(tmp_path.iterdir()) == {*written, *left}
    assert json.loads(done.stdout) == json.loads((tmp_path / "out.json").read_text())
    assert not any("gloo" in path.read_text() for path in left)


@pytest.mark.slow
def test_the_bundled_model_loses_the_same_on_two_ranks(tmp_path: Path) -> None:
    quick = ("--steps", "10", "--samples", "4")
    refused = torchrun(*COMMAND, "--classes", "11", tmp_path / "out.onnx")
    assert refused.returncode != 0
    assert "names class 11; this model has 0 to 9" in refused.stderr
    pair, single = tmp_path / "pair.onnx", tmp_path / "single.onnx"
    torchrun(*COMMAND, *quick, pair, timeout=600)
    subprocess.run([sys.executable, *COMMAND, *quick, str(single)], check=True, timeout=600)
    found, wanted = (
        torch.tensor(
            json.loads(path.with_suffix(".json").read_text())["verification"][
                "final_latents_snr_db"
            ]
        ).mean()
        for path in (pair, single)
    )
    assert abs(found - wanted) < 0.5


def test_a_process_on_its_own_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with launched_ranks() as ranks:
        assert ranks is SINGLE
        assert not torch.distributed.is_initialized()
    x = torch.tensor([1.0, 2.0])
    assert SINGLE.sum_(x) is x
    assert SINGLE.maximum_(x) is x
    assert SINGLE.gather("a") == ["a"]
    assert SINGLE.mine(range(3)) == range(3)
    with pytest.raises(CalibrationError, match="no good"):
        SINGLE.together(two_ranks.refuse)
    monkeypatch.setenv("WORLD_SIZE", "2")  # but no RANK, no MASTER_ADDR: not torchrun
    with pytest.raises(DistributedError, match="launch them with torchrun"), launched_ranks("cpu"):
        pass
