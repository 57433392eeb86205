"""`ditas-compare --ladder`: every rung on the same noise, each held against what it should be."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import (
    TINY,
    exported,
    fed,
    quantized_tiny_dit,
    save_checkpoint,
    snr_db,
    tiny_dit,
)
from tensorrt_fixture import made_plan, stand_ins
from torch import Tensor
from typer.testing import CliRunner, Result

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import QuantizedModel
from ditas_export.cli.compare import app
from ditas_export.diffusion.classes import parse_classes
from ditas_export.diffusion.runner import Runner
from ditas_export.diffusion.sampling import Step, trajectory
from ditas_export.errors import ArtifactError, OtherModelError, VerificationError
from ditas_export.evaluation import ladder as ladders
from ditas_export.evaluation.ladder import FORMAT, Ladder, ladder
from ditas_export.evaluation.options import LadderOptions
from ditas_export.families.registry import conditions_of
from ditas_export.onnx_export.form import Layout
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.torch_runner import TorchRunner

STEPS, IMAGES, SEED = 3, 2, 70
SETTINGS: dict[str, Any] = {"steps": STEPS, "images": IMAGES, "seed": SEED, "cfg_scale": 2.0}
CLASSES = parse_classes("random", conditions=conditions_of(TINY), count=IMAGES, seed=SEED)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint that does not say how many heads it has, and its quantized model, which does."""
    folder = tmp_path_factory.mktemp("models")
    save_checkpoint(folder / "model.safetensors", tiny_dit())
    quantized_tiny_dit(tiny_dit(), rank=0).save(folder / "quantized.safetensors")
    return folder / "model.safetensors", folder / "quantized.safetensors"


@pytest.fixture(scope="module")
def climbed(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Ladder:
    model, artifact = models
    options = LadderOptions(model=str(model), artifact=artifact, **SETTINGS)
    return ladder(options, report=tmp_path_factory.mktemp("report") / "ladder.json")


def steps_of(runner: Runner, seed: int) -> list[Step]:
    return list(
        trajectory(
            runner,
            classes=CLASSES,
            conditions=conditions_of(TINY),
            steps=STEPS,
            cfg_scale=2.0,
            seed=seed,
        )
    )


def answers(runner: Callable[..., Tensor], steps: list[Step]) -> list[Tensor]:
    """What a model gives at what float32 was fed: images with their class, then without."""
    found = []
    for step in steps:
        latents = torch.cat([step.latents, step.latents])
        labels = torch.cat([step.labels, torch.full_like(step.labels, TINY.num_classes)])
        times = torch.full((len(labels),), step.timestep)
        found.append(runner(latents, times, labels))
    return found


def folded() -> Any:
    return fold_smoothing(quantized_tiny_dit(tiny_dit(), rank=0), dtype=torch.float32)


def oracle(rung: str) -> tuple[Callable[..., Tensor], Callable[[int], list[Step]]]:
    """A rung's model, made by hand: its answers, and its trajectory of a seed."""
    model = tiny_dit()
    if rung in ("float16", "bfloat16"):
        half = copy.deepcopy(model).to(getattr(torch, rung))

        def answer(latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
            return half(latents.to(half.pos_embed.dtype), times, labels).float()

        return answer, lambda seed: steps_of(TorchRunner(half), seed)
    if rung.startswith("fake-quantized"):
        target: Any = "onnxruntime" if rung.endswith("CPU form") else "portable"
        model = fake_quantized_model(folded(), ranges="token", target=target)
        return model, lambda seed: steps_of(TorchRunner(model), seed)
    if rung == "float32":
        return model, lambda seed: steps_of(TorchRunner(model), seed)
    layout: Any = rung.rpartition(" ")[2]
    runner = OnnxRuntimeRunner(exported(layout=layout, rank=0), as_is=True)
    return lambda *inputs: runner(fed(*inputs)), lambda seed: steps_of(runner, seed)


def figures(
    mine: tuple[Callable[..., Tensor], Callable[[int], list[Step]]],
    other: tuple[Callable[..., Tensor], Callable[[int], list[Step]]],
    fed_to: list[Step],
) -> dict[str, Any]:
    with torch.inference_mode():
        pairs = list(zip(answers(other[0], fed_to), answers(mine[0], fed_to), strict=True))
        finals = [
            (other[1](seed)[-1].next_latents, mine[1](seed)[-1].next_latents)
            for seed in (SEED, SEED + 1)
        ]
    wanted, got = (torch.cat(each) for each in zip(*finals, strict=True))
    spread = (wanted.max() - wanted.min()).item()
    error = (wanted - got).double().square().mean().item()
    images = [snr_db(a, b) for pair in finals for a, b in zip(*pair, strict=True)]
    return {
        "by_step": [snr_db(*pair) for pair in pairs],
        "total": snr_db(*(torch.cat(each) for each in zip(*pairs, strict=True))),
        "images": images,
        "psnr": 10 * math.log10(spread**2 / error),
    }


def found_figures(distance: ladders.Distance | None) -> dict[str, Any]:
    assert distance is not None
    return {
        "by_step": [each.snr_db for each in distance.steps],
        "total": distance.single_step_db,
        "images": list(distance.final.images_db),
        "psnr": distance.final_psnr_db,
    }


@pytest.mark.parametrize(
    ("rung", "must_compute"),
    [
        ("float16", None),
        ("bfloat16", None),
        ("fake-quantized", None),
        ("fake-quantized, CPU form", None),
        ("onnxruntime, int4", "fake-quantized"),
        ("onnxruntime, int8", "fake-quantized"),
    ],
)
def test_a_rung_is_what_the_model_gives_by_hand(
    climbed: Ladder, rung: str, must_compute: str | None
) -> None:
    """The same sums in the same order, but for batches: 0.01 dB of the quantized, whose ties are
    the same too."""
    (found,) = [each for each in climbed.rungs if each.name == rung]
    assert found.must_compute == must_compute
    reference = oracle("float32")
    fed_to = reference[1](SEED)
    mine = oracle(rung)
    wanted = figures(mine, reference, fed_to)
    got = found_figures(found.from_float)
    assert {name: pytest.approx(value, abs=0.01) for name, value in wanted.items()} == got
    assert list(climbed.timesteps) == [step.timestep for step in fed_to]
    if must_compute is None:
        assert found.from_that is None
    else:
        # Rounding alone: its last bits are another's in other batches.
        wanted = figures(mine, oracle(must_compute), fed_to)
        assert found_figures(found.from_that)["total"] == pytest.approx(wanted["total"], abs=3)


def test_last_bits_are_of_a_millionth(climbed: Ladder) -> None:
    """Of float32 some 120 dB at a step; of the fake-quantized forward as much, or its ties."""
    alone = {each.name: each for each in climbed.rungs if each.name.endswith("last bits alone")}
    assert list(alone) == ["float32, last bits alone", "fake-quantized, last bits alone"]
    bits, ties = alone.values()
    assert 100 < found_figures(bits.from_float)["total"] < 130
    assert ties.from_float is None
    assert 20 < found_figures(ties.from_that)["total"] < 130
    assert (bits.must_compute, ties.must_compute) == ("float32", "fake-quantized")


def test_the_rungs_are_in_order(climbed: Ladder) -> None:
    names = [rung.name for rung in climbed.rungs]
    assert names[:9] == [
        "float32, last bits alone", "float16", "bfloat16", "fake-quantized",
        "fake-quantized, last bits alone", "fake-quantized, CPU form", "onnxruntime, int4",
        "onnxruntime, int8", "onnxruntime, CPU form",
    ]  # fmt: skip
    assert names[9:] in ([], ["OpenVINO, CPU form"])
    assert climbed.missing[-1].startswith("no engine: no PLAN was given")
    assert all(rung.not_finite is None for rung in climbed.rungs)


def test_both_layouts_are_one_computation(climbed: Ladder) -> None:
    int4, int8 = (rung for rung in climbed.rungs if rung.name in LAYOUTS)
    assert int4.from_float == int8.from_float


LAYOUTS = ("onnxruntime, int4", "onnxruntime, int8")


def quick(models: tuple[Path, Path], **options: Any) -> LadderOptions:
    model, artifact = models
    given = {"steps": 2, "images": 1, "cfg_scale": 1.0, **options}
    return LadderOptions(model=str(model), artifact=artifact, **given)


def names_of(found: Ladder) -> set[str]:
    return {rung.name for rung in found.rungs}


@pytest.mark.parametrize(
    ("facts", "layouts"),
    [
        ({}, ("int4", "int8")),
        ({"weight_bits": 8}, ("int8",)),
        ({"activation_bits": 16}, ("int8",)),  # of blocks of 48, which no kernel has
        ({"activation_bits": 16, "block_size": 32}, ("int4", "int8")),
        ({"weight_bits": 8, "activation_bits": 16}, ("int8",)),
    ],
)
def test_layouts_that_there_are(facts: dict[str, Any], layouts: tuple[Layout, ...]) -> None:
    quantized = quantized_tiny_dit(tiny_dit(), rank=0, **facts)
    assert ladders._layouts(quantized) == layouts


def test_an_engine_of_another_model_is_refused(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_ins(tmp_path, monkeypatch)
    plan = made_plan(tmp_path)
    about = json.loads(plan.with_name(f"{plan.name}.json").read_text())
    about["config"]["layer_norm_eps"] = 1e-5
    plan.with_name(f"{plan.name}.json").write_text(json.dumps(about))
    with pytest.raises(VerificationError, match="holds another model than the quantized one"):
        ladder(quick(models, plan=plan))


def test_a_quantized_model_of_another_one_is_refused(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_checkpoint(other, tiny_dit(seed=1))
    with pytest.raises(OtherModelError, match=r"quantized\.safetensors was made from another"):
        ladder(quick((other, models[1])))


def test_what_is_no_quantized_model(models: tuple[Path, Path]) -> None:
    with pytest.raises(ArtifactError, match="but no ditas-export quantized"):
        ladder(quick((models[0], models[0])))


def test_an_overflow_in_float16_is_a_rung_too(
    tmp_path: Path, hide_openvino: Callable[[], None]
) -> None:
    hide_openvino()
    model = tiny_dit()
    model.blocks[0].mlp.fc1.bias[3] = 1e5  # beyond float16; its GELU is as large
    model.blocks[0].mlp.fc2.weight[:, 3] = 1e-5
    save_checkpoint(tmp_path / "model.safetensors", model)
    quantized_tiny_dit(model, rank=0).save(tmp_path / "quantized.safetensors")
    found = ladder(quick((tmp_path / "model.safetensors", tmp_path / "quantized.safetensors")))
    (half,) = [rung for rung in found.rungs if rung.name == "float16"]
    assert half.not_finite is not None
    assert "overflows" in half.not_finite
    figures = half.to_dict()["from_float32"]
    assert figures["single_step_snr_db"] is None
    assert figures["final_latents_psnr_db"] is None
    assert all(rung.not_finite is None for rung in found.rungs if rung.name != "float16")


# The command --------------------------------------------------------------------------------------


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "120"})


def test_the_command_with_an_engine(
    models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hide_openvino: Callable[[], None],
) -> None:
    """The engine is played by the fake-quantized forward itself."""
    hide_openvino()
    stand_ins(tmp_path, monkeypatch)
    plan, opened = made_plan(tmp_path), []

    def engine(path: Path) -> Runner:
        opened.append(path)
        return TorchRunner(fake_quantized_model(folded(), ranges="token"))

    monkeypatch.setattr(ladders, "TensorRTRunner", engine)
    report = tmp_path / "ladder.json"
    words = ["--ladder", *models, plan, "--steps", 2, "--images", 1, "--json", report]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert opened == [plan]
    printed = " ".join(result.stdout.split())
    for text in ("float32, last bits", "bfloat16", "fake-quantized", "onnxruntime, int8", "999"):
        assert text in printed
    assert "no OpenVINO: it is not installed; run: pip install" in printed
    assert "OpenVINO, CPU form" not in printed
    assert "no engine" not in printed
    facts = json.loads(report.read_text())
    assert facts["format"] == FORMAT
    assert facts["timesteps"] == [999, 0]
    assert facts["options"]["seed"] == 1000
    assert facts["rungs"][0]["must_compute"] == "float32"
    assert facts["rungs"][1]["from_what_it_must_compute"] is None
    last = facts["rungs"][-1]
    assert (last["name"], last["must_compute"]) == ("engine", "fake-quantized")
    own = last["from_what_it_must_compute"]
    assert own["single_step_snr_db_by_step"] == [None, None]  # equal: infinite
    assert last["from_float32"]["single_step_snr_db"] < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--linear-db", 10], "--ladder has no --linear-db; leave it out"),
        (["--no-linears", "--threshold-db", 3], "--ladder has no --linears, --threshold-db"),
        (["--gen-inputs", "a.json"], "--ladder has no --gen-inputs"),
        (["--images", 0], "images=0; expected a whole number, 1 to"),
        (["--classes", "99"], "names class 99"),
        (["absent.plan"], "absent.plan"),
    ],
)
def test_what_a_ladder_does_not_have(
    models: tuple[Path, Path], words: list[Any], message: str
) -> None:
    result = run("--ladder", *models, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_third_file_needs_the_ladder() -> None:
    result = run(exported(), exported(), "c.plan")
    assert result.exit_code == 2
    assert "c.plan is one file too many; --ladder takes three" in result.stderr


def test_the_quantized_model_says_how_many_heads(models: tuple[Path, Path]) -> None:
    assert QuantizedModel.load(models[1]).config.to_dict()["num_heads"] == TINY.num_heads
