from __future__ import annotations

import copy
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from quantized_fixture import fed, tiny_dit
from torch import Tensor, nn

from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.calibration.calibrate import (
    BLOCK_FORMAT,
    QuantizationSettings,
    quantize_model,
    solving_key,
)
from ditas_export.calibration.quantized_model import (
    QuantizedLinear,
    QuantizedModel,
    linear_to_parts,
)
from ditas_export.calibration.states import (
    STATES_FORMAT,
    CalibrationSettings,
    CalibrationStates,
    collect_states,
    has_bfloat16_products,
)
from ditas_export.diffusion.sampling import image_generator, initial_noise
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.dit.presets import preset_config
from ditas_export.errors import (
    CalibrationError,
    NonFiniteError,
    OtherModelError,
    QuantizationError,
)
from ditas_export.families.identity import identity_of
from ditas_export.families.registry import linear_names
from ditas_export.runtime.torch_runner import TorchRunner

SETTINGS = QuantizationSettings(rank=2, alpha_grid=(0.4, 0.5))


@pytest.fixture(scope="module")
def model() -> DiT:
    return tiny_dit()


@pytest.fixture(scope="module")
def states(model: DiT) -> CalibrationStates:
    settings = CalibrationSettings(steps=4, classes=(3, 7))
    return collect_states(model, settings, identity=identity_of(model))


class Stop(Exception):  # noqa: N818
    """Stands for Ctrl-C."""


def same(first: QuantizedModel, second: QuantizedModel) -> bool:
    """Whether all tensors of all linears are equal, their low-rank factors among them."""
    pairs = [
        (linear_to_parts(linear)[0], linear_to_parts(second.linears[name])[0])
        for name, linear in first.linears.items()
    ]
    return all(
        list(parts) == list(others)
        and all(torch.equal(tensor, others[part]) for part, tensor in parts.items())
        for parts, others in pairs
    )


def folder_in(path: Path) -> Path:
    folder = path / "progress"
    folder.mkdir()
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interrupted_run_goes_on_where_it_stopped(
    model: DiT, states: CalibrationStates, tmp_path: Path
) -> None:
    progress = folder_in(tmp_path)
    whole = quantize_model(model, states, SETTINGS)
    seen: list[str] = []

    def stop_in_the_second_block(name: str, _: QuantizedLinear) -> None:
        seen.append(name)
        if name == "blocks.1.attn.proj":
            raise Stop

    with pytest.raises(Stop):
        quantize_model(
            model, states, SETTINGS, progress=progress, on_linear=stop_in_the_second_block
        )
    assert list(files_in(progress)) == ["000.safetensors"]
    first = progress / "000.safetensors"
    written = first.stat().st_mtime_ns
    resumed = quantize_model(model, states, SETTINGS, progress=progress)
    assert same(whole, resumed)
    assert list(files_in(progress)) == ["000.safetensors", "001.safetensors"]
    assert first.stat().st_mtime_ns == written  # no block is written twice


def test_progress_of_other_settings_or_of_no_known_kind_is_not_taken(
    model: DiT, states: CalibrationStates, tmp_path: Path
) -> None:
    progress = folder_in(tmp_path)

    def stop(name: str, _: QuantizedLinear) -> None:
        if name == "blocks.1.attn.qkv":
            raise Stop

    with pytest.raises(Stop):
        quantize_model(model, states, SETTINGS, progress=progress, on_linear=stop)
    plain = QuantizationSettings(method="linear")
    assert same(
        quantize_model(model, states, plain),
        quantize_model(model, states, plain, progress=progress),
    )
    (progress / "000.safetensors").write_bytes(b"no safetensors")
    assert same(
        quantize_model(model, states, plain),
        quantize_model(model, states, plain, progress=progress),
    )


def leave_marked_progress(
    model: DiT,
    states: CalibrationStates,
    settings: QuantizationSettings,
    progress: Path,
    file_format: str = BLOCK_FORMAT,
) -> None:
    """Interrupt a walk after its first block and mark what that left behind."""

    def stop(name: str, _: QuantizedLinear) -> None:
        if name == "blocks.1.attn.qkv":
            raise Stop

    with pytest.raises(Stop):
        quantize_model(model, states, settings, progress=progress, on_linear=stop)
    first = progress / "000.safetensors"
    tensors, header = load_tensors(first, file_format=BLOCK_FORMAT)
    tensors["blocks.0.mlp.fc2.bias"] += 1.0
    save_tensors(first, tensors, file_format=file_format, header=header)


@pytest.mark.parametrize(
    ("file_format", "is_taken"),
    [(BLOCK_FORMAT, True), ("ditas-export calibration progress 1", False)],
)
def test_progress_of_another_format_is_not_taken(
    model: DiT, states: CalibrationStates, tmp_path: Path, file_format: str, is_taken: bool
) -> None:
    """With a marker in what the first block left behind."""
    progress = folder_in(tmp_path)
    settings = QuantizationSettings(method="linear")
    leave_marked_progress(model, states, settings, progress, file_format)
    resumed = quantize_model(model, states, settings, progress=progress)
    assert same(quantize_model(model, states, settings), resumed) == (not is_taken)


def test_same_inputs_give_the_same_bytes(
    model: DiT, states: CalibrationStates, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        quantize_model(model, states, SETTINGS).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_interrupted_sampling_goes_on_bit_for_bit(model: DiT, tmp_path: Path) -> None:
    """Two of three batches are kept; the third starts anew; other settings take nothing."""
    settings = CalibrationSettings(steps=4, classes=(3, 7, 1, 4, 9))
    whole = collect_states(model, settings, identity=identity_of(model))
    progress = folder_in(tmp_path)
    steps: list[int] = []

    def stop(done: int, total: int) -> None:
        assert total == 12
        steps.append(done)
        if done == 10:
            raise Stop

    with pytest.raises(Stop):
        collect_states(
            model, settings, identity=identity_of(model), progress=progress, on_step=stop
        )
    kept = files_in(progress)
    assert list(kept) == ["00000.safetensors", "00002.safetensors"]
    steps.clear()
    resumed = collect_states(
        model,
        settings,
        identity=identity_of(model),
        progress=progress,
        on_step=lambda done, _: steps.append(done),
    )
    assert steps == [9, 10, 11, 12]
    assert torch.equal(resumed.latents, whole.latents)
    for name, value in whole.input_maxima.items():
        assert torch.equal(resumed.input_maxima[name], value), name
    identity = identity_of(model)
    eps = replace(identity, config=replace(identity.config, layer_norm_eps=1e-5))
    for other, made_with in (
        (replace(settings, seed=1), identity),
        (replace(settings, precision="bf16"), identity),
        (settings, eps),
    ):
        for name, content in kept.items():
            (progress / name).write_bytes(content)
        steps.clear()
        collect_states(
            model,
            other,
            identity=made_with,
            progress=progress,
            on_step=lambda done, _: steps.append(done),
        )
        assert len(steps) == 12
    (progress / "00000.safetensors").write_bytes(b"no safetensors")
    collect_states(model, settings, identity=identity_of(model), progress=progress)


def test_states_come_back_and_belong_to_their_checkpoint(
    states: CalibrationStates, tmp_path: Path
) -> None:
    path = tmp_path / "states"
    states.save(path)
    identity = states.identity
    loaded = CalibrationStates.load(path, identity=identity)
    assert torch.equal(loaded.latents, states.latents)
    assert torch.equal(loaded.timesteps, states.timesteps)
    assert loaded.settings == states.settings
    assert all(torch.equal(loaded.input_maxima[name], states.input_maxima[name])
               for name in states.input_maxima)  # fmt: skip
    eps = replace(identity, config=replace(identity.config, layer_norm_eps=1e-5))
    with pytest.raises(OtherModelError, match=r"another model: layer_norm_eps 1e-06, now 1e-05"):
        CalibrationStates.load(path, identity=eps)
    with pytest.raises(OtherModelError, match=r"tensors_sha256 [0-9a-f]{12}…, now 000000000000…"):
        CalibrationStates.load(path, identity=replace(identity, tensors_sha256="0" * 64))


def test_states_say_in_which_precision_the_model_sampled(
    states: CalibrationStates, tmp_path: Path
) -> None:
    """A file from before there was a choice says nothing, and is of float32."""
    path = tmp_path / "states"
    rounded = replace(states, settings=replace(states.settings, precision="bf16"))
    rounded.save(path)
    tensors, header = load_tensors(path, file_format=STATES_FORMAT)
    assert header["settings"]["precision"] == "bf16"
    assert CalibrationStates.load(path, identity=states.identity).settings == rounded.settings
    del header["settings"]["precision"]
    save_tensors(path, tensors, file_format=STATES_FORMAT, header=header)
    assert CalibrationStates.load(path, identity=states.identity).settings == states.settings


def test_progress_of_states_of_another_precision_is_not_taken(
    model: DiT, states: CalibrationStates, tmp_path: Path
) -> None:
    """With a marker in what the first block left behind."""
    progress = folder_in(tmp_path)
    settings = QuantizationSettings(method="linear")
    rounded = replace(states, settings=replace(states.settings, precision="bf16"))
    leave_marked_progress(model, states, settings, progress)
    resumed = quantize_model(model, rounded, settings, progress=progress)
    assert same(quantize_model(model, rounded, settings), resumed)
    assert resumed.settings["calibration"]["precision"] == "bf16"


def test_a_solved_block_is_known_by_all_that_it_depends_on(
    states: CalibrationStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        SETTINGS,
        replace(SETTINGS, weight_bits=8),
        replace(SETTINGS, activation_bits=16),
        replace(SETTINGS, method="ditas"),
        replace(SETTINGS, method=replace(SETTINGS.recipe, name="mine")),
        replace(SETTINGS, rank=3),
        replace(SETTINGS, block_size=24),
        replace(SETTINGS, ranges="static"),
        replace(SETTINGS, alpha_grid=(0.4,)),
        replace(SETTINGS, walk_tokens=16),
    )
    keys = [solving_key(states, each) for each in settings]
    identity = states.identity
    other_heads = replace(identity, config=replace(identity.config, num_heads=2))
    keys += [
        solving_key(changed, SETTINGS)
        for changed in (
            replace(states, latents=states.latents + 1),
            replace(states, settings=replace(states.settings, seed=1)),
            replace(states, identity=replace(identity, tensors_sha256="0" * 64)),
            replace(states, identity=other_heads),
        )
    ]
    monkeypatch.setattr("ditas_export.calibration.states.__version__", "another")
    keys.append(solving_key(states, SETTINGS))
    monkeypatch.setattr(torch, "__version__", "another")
    keys.append(solving_key(states, SETTINGS))
    assert len(set(keys)) == len(keys) == 16


def test_bfloat16_sampling_is_the_trajectory_of_the_bfloat16_model(model: DiT) -> None:
    """Bit for bit, against diffusers' scheduler, guidance as published, and hooks of our own."""
    settings = CalibrationSettings(steps=4, cfg_scale=1.5, classes=(3, 7), precision="bf16")
    found = collect_states(model, settings, identity=identity_of(model))
    rounded = copy.deepcopy(model).bfloat16()
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        def hook(_module: nn.Module, taken: tuple[Tensor, ...]) -> None:
            inputs[name] = taken[0]

        return rounded.get_submodule(name).register_forward_pre_hook(hook)

    names = list(linear_names(model.config))
    for name in names:
        keep(name)
    runner = TorchRunner(rounded)
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        variance_type="learned_range",
        timestep_spacing="linspace",
        clip_sample=False,
    )
    scheduler.set_timesteps(4)
    generators = [image_generator(settings.seed, index) for index in range(2)]
    latents = initial_noise(model.config, generators)
    labels = torch.tensor([3, 7, model.config.null_class, model.config.null_class])
    for index, timestep in enumerate(scheduler.timesteps):
        assert torch.equal(found.latents[index], latents)
        output = runner(fed(torch.cat([latents, latents]), timestep.repeat(4), labels))
        for name in names:
            largest = inputs[name].float().abs().flatten(0, 1).amax(dim=0)
            assert torch.equal(found.input_maxima[name][index], largest), name
        with_class, without = output.chunk(2)
        eps = without[:, :3] + 1.5 * (with_class[:, :3] - without[:, :3])
        guided = torch.cat([eps, with_class[:, 3:]], dim=1)
        latents = scheduler.step(guided, timestep, latents, generator=generators).prev_sample
    assert {value.dtype for value in found.input_maxima.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    exact = collect_states(
        model, replace(settings, precision="fp32"), identity=identity_of(model)
    ).latents
    assert not torch.equal(exact[-1], found.latents[-1])
    # A mantissa of 8 bits in some twenty layers; the steps in between carry it on.
    assert float((exact - found.latents).norm() / exact.norm()) < 0.05


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="reads /proc/cpuinfo"
)
def test_a_processor_has_bfloat16_products_where_the_system_says_so() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert has_bfloat16_products(torch.device("cpu")) == ("avx512_bf16" in flags)


def test_the_model_is_left_alone(model: DiT, states: CalibrationStates) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_model(model, states, QuantizationSettings(method="linear"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("side", "tokens", "cfg_scale", "expected"),
    [
        (32, None, 1.5, 150),  # DiT-XL/2 at 256 pixels: a quarter of the paper's states
        (64, None, 1.5, 37),  # at 512
        (16, None, 1.5, 600),  # the bundled model: all
        (16, None, 1.0, 600),
        (24, None, 1.5, 266),
        (24, None, 1.0, 533),
        (32, 38_400, 1.5, 75),
        (32, 1, 1.5, 1),
    ],
)
def test_the_walk_sees_the_states_of_its_tokens(
    side: int, tokens: int | None, cfg_scale: float, expected: int
) -> None:
    paper = CalibrationSettings(classes=(1,) * 12, cfg_scale=cfg_scale)
    config = replace(preset_config("DiT-XL/2"), input_size=side)
    settings = (
        QuantizationSettings() if tokens is None else QuantizationSettings(walk_tokens=tokens)
    )
    assert settings.walked_states(paper, config) == expected


def test_defaults_follow_the_model() -> None:
    large = preset_config("DiT-XL/2")
    settings = QuantizationSettings()
    assert settings.rank_for(large) == 32
    assert settings.block_size_for(1152) == settings.block_size_for(4608) == 48
    assert settings.block_size_for(1024) == 32
    assert QuantizationSettings(weight_bits=8).block_size_for(1024) == 1024
    assert QuantizationSettings(weight_bits=8).rank_for(large) == 0
    assert QuantizationSettings(method="tas").rank_for(large) == 0
    assert QuantizationSettings(activation_bits=16).block_size_for(1152) == 32
    wide = DiTConfig(hidden_size=1024, depth=24)
    assert "block size 32 for 1024 inputs: 48 does not fit" in settings.notes(wide)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight_bits": 3}, "weight bits are 4 or 8, not 3"),
        ({"activation_bits": 4}, "activation bits are 8 or 16, not 4"),
        ({"rank": -1}, "rank=-1 is negative"),
        ({"alpha_grid": (0.5, 1.5)}, "give values in"),
        ({"alpha_grid": ()}, "give values in"),
        ({"walk_tokens": 0}, "takes at least one"),
        ({"block_size": 20}, "block_size=20 is not allowed with 8-bit"),
        ({"block_size": 48, "activation_bits": 16}, "block_size=48 is not allowed with 16-bit"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        QuantizationSettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no method"):
        QuantizationSettings(method="best")


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(QuantizationError, match=r"does not divide 1024 inputs; pick one of"):
        QuantizationSettings(block_size=48).block_size_for(1024)
    with pytest.raises(QuantizationError, match="no allowed block size"):
        QuantizationSettings().block_size_for(100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1, "classes": (0,)}, "steps=1"),
        ({"classes": ()}, "at least one sample"),
        ({"classes": (0,), "cfg_scale": float("nan")}, "cfg_scale=nan"),
        ({"classes": (0,), "precision": "fp16"}, "precision='fp16'; expected one of fp32"),
    ],
)
def test_impossible_calibrations_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        CalibrationSettings(**settings)  # type: ignore[arg-type]


def test_not_finite_activations_are_named(model: DiT) -> None:
    broken = tiny_dit()
    broken.t_embedder.mlp[2].bias[0] = float("nan")  # type: ignore[index, operator, union-attr]
    with pytest.raises(CalibrationError, match=r"input of blocks\.0\.attn\.qkv has NaN"):
        collect_states(
            broken, CalibrationSettings(steps=2, classes=(0,)), identity=identity_of(broken)
        )


def test_what_follows_the_last_linear_is_named_by_its_step(model: DiT) -> None:
    broken = tiny_dit()
    broken.final_layer.linear.bias[0] = float("inf")
    settings = CalibrationSettings(steps=2, classes=(0, 1))
    with pytest.raises(NonFiniteError, match=r"^step 1 of 2, time step 999, image 0, 1: "):
        collect_states(broken, settings, identity=identity_of(broken))


MEASURED = """
import torch
from pathlib import Path
from dataclasses import replace
from ditas_export.calibration.calibrate import QuantizationSettings, peak_bytes, quantize_model
from ditas_export.calibration.states import CalibrationSettings, CalibrationStates
from ditas_export.families.identity import identity_of
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.families.registry import linear_shapes

torch.set_num_threads(1)
config = DiTConfig(hidden_size=288, depth=1, num_heads=4)
model = DiT(config)
randomize(model, seed=0)
maxima = {name: torch.ones(2, k) for name, (_, k) in linear_shapes(config).items()}
def states(samples):
    return CalibrationStates(
        latents=torch.randn(2, samples, 4, 32, 32), timesteps=torch.tensor([999, 0]),
        input_maxima=maxima, settings=CalibrationSettings(steps=2, classes=(1,) * samples),
        identity=identity_of(model))
settings = QuantizationSettings(alpha_grid=(0.5,))
quantize_model(model, states(1), settings)  # what the libraries take
def peak():  # ru_maxrss starts from that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
whole = states(64)
quantize_model(model, whole, settings)
print(peak() - before, peak_bytes(config, whole.settings, settings))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_estimated() -> None:
    """A process of its own, whose resident set is measured: 300 MB of hidden states."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured, estimated = map(int, done.stdout.split())
    assert estimated / 1.5 < measured < 1.5 * estimated


@pytest.mark.gpu
def test_sampling_leaves_the_model_on_its_device(states: CalibrationStates) -> None:
    moved = tiny_dit().cuda()
    found = collect_states(moved, states.settings, identity=identity_of(moved))
    assert moved.pos_embed.device.type == "cuda"
    assert all(value.device.type == "cpu" for value in found.input_maxima.values())


@pytest.mark.gpu
def test_a_gpu_quantizes_as_well(states: CalibrationStates) -> None:
    """Sums run in another order there, and codes at ties of rounding with them."""
    wanted = quantize_model(tiny_dit(), states, SETTINGS).linears
    found = quantize_model(tiny_dit().cuda(), states, SETTINGS).linears
    for name, linear in found.items():
        assert linear.weight.codes.device.type == "cpu"
        assert abs(linear.output_snr_db - wanted[name].output_snr_db) < 1.0, name
