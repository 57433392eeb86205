"""Calibration states: what the float model saw while it sampled, and how large its inputs got.

Data-free (DiTAS, section 4.1): the float model samples with guidance, by DDPM or, where it is a
flow, by Euler steps; every x_t is kept,
and of every linear's input only the largest magnitude per channel and time step. Memory does not
grow with tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditas_export import __version__
from ditas_export.artifact_files import load_tensors, save_tensors
from ditas_export.calibration.calibration_settings import CalibrationSettings
from ditas_export.diffusion.guidance import model_inputs
from ditas_export.diffusion.sampling import Step, trajectory
from ditas_export.diffusion.schedules import make_schedule
from ditas_export.distributed import SINGLE, Ranks
from ditas_export.dit.fitting import Wanted, require_fits
from ditas_export.dit.tensor_files import abbreviated
from ditas_export.errors import ArtifactError, CalibrationError, NonFiniteError
from ditas_export.families.base import Conditions, FamilyModel, ModelConfig, ModelInputs
from ditas_export.families.identity import ModelIdentity
from ditas_export.families.registry import conditions_of, family_of, linear_shapes
from ditas_export.fast_matmul import fast_float32_matmul
from ditas_export.paths import StrPath
from ditas_export.process import FlowProcess, Process
from ditas_export.runtime.torch_runner import TorchRunner
from ditas_export.saved_records import from_record

STATES_KIND = "ditas-export calibration states"
STATES_FORMAT = f"{STATES_KIND} 2"
BATCH_FORMAT = "ditas-export sampled batch 1"

SAMPLES_PER_BATCH = 2
"""Samples that go through the model at once, however many ranks share them: the same numbers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibrationStates:
    """x_t of every step and sample, and running maxima of every linear's input."""

    latents: Tensor  # (steps, samples, C, …) float32: x_t before each step
    timesteps: Tensor  # (steps,) int64, float32 of a flow: what the model was fed, noisiest first
    input_maxima: Mapping[str, Tensor]  # module path -> (steps, K) float32
    settings: CalibrationSettings
    identity: ModelIdentity  # of the model that sampled

    def __post_init__(self) -> None:
        """Check that the states are whole and fit the model.

        Raises:
            ArtifactError: names what is missing, of another shape, or not finite.
        """
        config, settings = self.identity.config, self.settings
        steps, samples = settings.steps, len(settings.classes)
        shapes = {
            "latents": (self.latents, (steps, samples, *config.latent_shape)),
            "timesteps": (self.timesteps, (steps,)),
        }
        widths = {name: columns for name, (_, columns) in linear_shapes(config).items()}
        if odd := sorted(widths.keys() ^ self.input_maxima.keys()):
            raise ArtifactError(
                f"calibration states: maxima of {abbreviated(odd)} are missing or of no linear of "
                f"this model"
            )
        for name, width in widths.items():
            shapes[f"maxima of {name}"] = (self.input_maxima[name], (steps, width))
        for name, (tensor, shape) in shapes.items():
            dtype = config.process.time_dtype if name == "timesteps" else torch.float32
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ArtifactError(
                    f"calibration states: {name} are {tuple(tensor.shape)} {tensor.dtype}, "
                    f"expected {shape} {dtype}"
                )
            if not tensor.isfinite().all():
                raise ArtifactError(f"calibration states: {name} are not finite; calibrate again")
        if any(bool((maxima < 0).any()) for maxima in self.input_maxima.values()):
            raise ArtifactError("calibration states: a maximum is negative; calibrate again")
        _require_in_order(self.timesteps, config.process)
        try:
            settings.require_model(config)
        except CalibrationError as error:
            raise ArtifactError(f"calibration states: {error}; calibrate again") from error

    def save(self, path: StrPath) -> None:
        """Write one safetensors file."""
        path = Path(path)
        tensors = {f"maxima.{name}": maxima for name, maxima in self.input_maxima.items()}
        tensors |= {"latents": self.latents, "timesteps": self.timesteps}
        header = {"settings": self.settings.to_dict(), "identity": self.identity.to_dict()}
        save_tensors(path, tensors, file_format=STATES_FORMAT, header=header)

    @classmethod
    def load(
        cls, path: StrPath, *, identity: ModelIdentity, conditions: Conditions | None = None
    ) -> CalibrationStates:
        """Read states made with this very model, and these very conditions.

        Raises:
            ArtifactError: another kind of file, a damaged one, or states of another model or of
                other embeddings.
        """
        path = Path(path)
        tensors, header = load_tensors(path, file_format=STATES_FORMAT)
        try:
            stated = from_record(_Header, header, error=ArtifactError)
        except ArtifactError as error:
            raise ArtifactError(f"{path} is damaged ({error}); calibrate again") from error
        made_with, settings = stated.identity, stated.settings
        made_with.require_same(
            identity, what=str(path), remedy="Calibrate again, or pass the model that it is of"
        )
        if conditions is not None and settings.embeddings != conditions.identity:
            try:
                settings.require_conditions(conditions)
            except CalibrationError as error:
                raise ArtifactError(f"{path}: {error}; calibrate again") from error
        prefix = "maxima."
        maxima = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        try:
            require_fits(tensors, _wanted(made_with.config, settings), error=ArtifactError)
            return cls(
                latents=tensors["latents"],
                timesteps=tensors["timesteps"],
                input_maxima=maxima,
                settings=settings,
                identity=made_with,
            )
        except ArtifactError as error:
            raise ArtifactError(f"{path} is damaged: {error}; calibrate again") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What the header of states says."""

    settings: CalibrationSettings
    identity: ModelIdentity


def _wanted(config: ModelConfig, settings: CalibrationSettings) -> dict[str, Wanted]:
    """Return what a file of states must hold, by name."""
    steps = settings.steps
    wanted = {
        f"maxima.{name}": Wanted((steps, columns), low=0)
        for name, (_, columns) in linear_shapes(config).items()
    }
    latents = (steps, len(settings.classes), *config.latent_shape)
    timesteps = Wanted((steps,), config.process.time_dtype, low=0)
    return wanted | {"latents": Wanted(latents), "timesteps": timesteps}


def _require_in_order(timesteps: Tensor, process: Process | FlowProcess) -> None:
    """Refuse times beyond the process, or that do not go from noise to data.

    Raises:
        ArtifactError: says which times there are.
    """
    first, last = process.times
    upwards = isinstance(process, FlowProcess) and process.time_ends_at == "data"
    way = timesteps.diff() * (1 if upwards else -1)
    if bool(((timesteps < first) | (timesteps > last)).any()) or not bool((way > 0).all()):
        raise ArtifactError(
            f"calibration states: time steps do not {'ascend' if upwards else 'descend'} within "
            f"{first:.10g} to {last:.10g}"
        )


@fast_float32_matmul()
def collect_states(
    model: FamilyModel,
    settings: CalibrationSettings,
    *,
    identity: ModelIdentity,
    conditions: Conditions | None = None,
    ranks: Ranks = SINGLE,
    progress: StrPath | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> CalibrationStates:
    """Sample with the float model once and return what calibration needs of it, on every rank.

    Args:
        model: float32, on the device that computes; left untouched.
        settings: steps, guidance, classes, seed, precision.
        identity: of the model.
        conditions: what the classes of the settings name; the model's own if not given.
        ranks: the processes that share the samples; how many makes no difference to the result.
        progress: a folder that gets a file for every batch; batches in it that were sampled with
            the same model and settings, by however many ranks, are not sampled again.
        on_step: called with (steps done, steps in all) of this rank's batches.

    Raises:
        CalibrationError: an activation is not finite, or settings for other conditions.
        ArtifactError: a file of a batch cannot be written.
    """
    progress = None if progress is None else Path(progress)
    asked = conditions_of(model.config) if conditions is None else conditions
    settings.require_conditions(asked)
    batches = sample_batches(len(settings.classes))
    kept = _KeptBatches(folder=progress, facts=sampling_facts(identity, settings))
    latents, maxima = ranks.together(
        lambda: _sampled(
            model, settings, asked, ranks.mine(batches), kept, on_step or (lambda *_: None)
        )
    )
    shares = [iter(share) for share in ranks.gather(latents)]
    ordered = [next(shares[index % ranks.world_size]) for index in range(len(batches))]
    return CalibrationStates(
        latents=torch.cat(ordered, dim=1),
        timesteps=_times(settings.steps, identity.config.process),
        input_maxima={name: ranks.maximum_(value).cpu() for name, value in maxima.items()},
        settings=settings,
        identity=identity,
    )


def _times(steps: int, process: Process | FlowProcess) -> Tensor:
    """Return what the model is fed at each step, (steps,)."""
    moments = make_schedule(None, steps, process).moments
    return torch.tensor([moment.time for moment in moments], dtype=process.time_dtype)


def sampling_facts(identity: ModelIdentity, settings: CalibrationSettings) -> dict[str, Any]:
    """Return all that a batch depends on, as JSON values; an upgrade mixes nothing."""
    return {
        "identity": identity.to_dict(),
        "settings": settings.to_dict(),
        "versions": {"ditas-export": __version__, "torch": torch.__version__},
    }


def sample_batches(samples: int) -> list[range]:
    """Return the samples of each batch, by index."""
    return [
        range(start, min(start + SAMPLES_PER_BATCH, samples))
        for start in range(0, samples, SAMPLES_PER_BATCH)
    ]


def _sampled(
    model: FamilyModel,
    settings: CalibrationSettings,
    conditions: Conditions,
    batches: Sequence[range],
    kept: _KeptBatches,
    on_step: Callable[[int, int], None],
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return every batch's latents, (steps, batch, C, H, W) each, and the maxima over all batches.

    The maxima are module path -> (steps, K) on the model's device; zeros without a batch.

    Raises:
        CalibrationError: an activation is not finite.
    """
    device = model.device
    if settings.precision == "bf16":
        model = _in_bfloat16(model)
    runner = TorchRunner(model, device=device)
    maxima = {
        name: torch.zeros(settings.steps, columns, device=device)
        for name, (_, columns) in linear_shapes(model.config).items()
    }
    latents: list[Tensor] = []
    with recorded_maxima(model) as recorded:
        for batch in batches:
            part = kept.read(batch)
            if part is None:
                part = _sampled_batch(
                    runner,
                    settings,
                    conditions,
                    batch,
                    recorded,
                    lambda step: on_step(
                        len(latents) * settings.steps + step, len(batches) * settings.steps
                    ),
                )
                _require_finite(part.maxima)
                kept.write(batch, part)
            latents.append(part.latents)
            for name, largest in part.maxima.items():
                torch.maximum(maxima[name], largest.to(device), out=maxima[name])
    return latents, maxima


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Batch:
    """What the model saw while it sampled one batch."""

    latents: Tensor  # (steps, batch, C, H, W) float32
    maxima: Mapping[str, Tensor]  # module path -> (steps, K) float32


def _sampled_batch(
    runner: TorchRunner,
    settings: CalibrationSettings,
    conditions: Conditions,
    batch: range,
    recorded: dict[str, Tensor],
    on_step: Callable[[int], None],
) -> _Batch:
    """Sample one batch; `recorded` is filled by the hooks of `recorded_maxima`, and left empty."""
    seen: list[Tensor] = []
    maxima: dict[str, list[Tensor]] = {}
    recorded.clear()
    steps = trajectory(
        runner,
        classes=[settings.classes[index] for index in batch],
        conditions=conditions,
        steps=settings.steps,
        cfg_scale=settings.cfg_scale,
        seed=settings.seed,
        image_indices=batch,
    )
    for step in _naming_linears(steps, recorded):
        seen.append(step.latents)
        for name, largest in recorded.items():
            maxima.setdefault(name, []).append(largest.float())
        recorded.clear()
        on_step(step.index + 1)
    return _Batch(
        latents=torch.stack(seen).cpu(),
        maxima={name: torch.stack(largest) for name, largest in maxima.items()},
    )


def _in_bfloat16(model: FamilyModel) -> FamilyModel:
    """Return a copy of a model whose parameters are bfloat16; float32 is never there twice."""
    with torch.device("meta"):
        rounded: FamilyModel = family_of(model.config).module(model.config)
    parameters = model.state_dict()
    rounded.load_state_dict(
        {name: tensor.bfloat16() for name, tensor in parameters.items()}, assign=True
    )
    return rounded


def has_bfloat16_products(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16 itself: AVX512-BF16, AMX, or a GPU's units.

    Elsewhere torch takes bfloat16 as well, and is slower for it.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported()  # torch 2.8 has no public name for it


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeptBatches:
    """The batches that are finished, a file each, named by its first sample."""

    folder: Path | None
    facts: Mapping[str, Any]  # all that they depend on

    def write(self, batch: range, part: _Batch) -> None:
        """Keep a batch; atomic."""
        if self.folder is not None:
            tensors = {f"maxima.{name}": value for name, value in part.maxima.items()}
            tensors["latents"] = part.latents
            header = {**self.facts, "samples": list(batch)}
            save_tensors(self._file(batch), tensors, file_format=BATCH_FORMAT, header=header)

    def read(self, batch: range) -> _Batch | None:
        """Return what `write` was given by an interrupted run of the same facts, if any."""
        if self.folder is None or not self._file(batch).is_file():
            return None
        try:
            tensors, header = load_tensors(self._file(batch), file_format=BATCH_FORMAT)
        except ArtifactError:
            return None  # not ours: it is written anew
        if header != {**self.facts, "samples": list(batch)}:
            return None
        latents = tensors.pop("latents")
        maxima = {name.removeprefix("maxima."): value for name, value in tensors.items()}
        return _Batch(latents=latents, maxima=maxima)

    def _file(self, batch: range) -> Path:
        """Return the file of a batch."""
        assert self.folder is not None  # asked for by a caller who keeps batches
        return self.folder / f"{batch.start:05d}.safetensors"


def _naming_linears(steps: Iterator[Step], recorded: Mapping[str, Tensor]) -> Iterator[Step]:
    """Yield the steps; of one that is not finite name the first linear whose input is not.

    Raises:
        CalibrationError: there is one; it is where NaN or infinity comes from.
        NonFiniteError: there is none: they come from what follows the last linear.
    """
    try:
        yield from steps
    except NonFiniteError:
        _require_finite(recorded)
        raise


def _require_finite(maxima: Mapping[str, Tensor]) -> None:
    """Raise CalibrationError if any input had NaN or infinity."""
    for name, value in maxima.items():
        if not value.isfinite().all():
            raise CalibrationError(
                f"the input of {name} has NaN or infinity while the float model samples; "
                f"check the checkpoint, or --num-heads"
            )


@contextmanager
def recorded_maxima(model: FamilyModel) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that gathers max|x_c| of every quantized linear's input, (K,) each.

    Padded tokens do not count: of a group with a mask, the model's inputs say which they are.
    """
    maxima: dict[str, Tensor] = {}
    fed: dict[str, Tensor] = {}

    def keep(_model: nn.Module, _args: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> None:
        fed.update(inputs)

    def recorder(name: str, mask: str | None) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            tokens = x.flatten(0, -2) if mask is None else x[fed[mask] != 0]
            largest = tokens.abs().amax(dim=0)
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

        return record

    handles = [model.register_forward_pre_hook(keep, with_kwargs=True)]
    handles += [
        model.get_submodule(block.name(path)).register_forward_pre_hook(
            recorder(block.name(path), group.mask)
        )
        for block in family_of(model.config).blocks(model.config)
        for group in block.groups()
        for path in group.linears
    ]
    try:
        yield maxima
    finally:
        for handle in handles:
            handle.remove()


def walk_states(
    states: CalibrationStates, *, count: int, conditions: Conditions | None = None
) -> ModelInputs:
    """Return the states that the walk sees, both guidance halves of each.

    Steps are taken evenly and samples in turn, so every step keeps the same share of the samples
    and every sample the same share of the steps, to one state.

    Args:
        states: all states.
        count: how many, 1 to all.
        conditions: what the classes of the states' settings name; the model's own if not given.

    Raises:
        CalibrationError: there are not as many states, or they are of other conditions.
    """
    steps, samples = states.latents.shape[:2]
    if not 1 <= count <= steps * samples:
        raise CalibrationError(f"a walk over {count} of {steps * samples} states; pick 1 to all")
    chosen = torch.arange(count)
    step_of, sample_of = chosen * steps // count, chosen % samples
    latents = states.latents[step_of, sample_of]
    timesteps = states.timesteps[step_of]
    labels = torch.tensor(states.settings.classes)[sample_of]
    config, cfg_scale = states.identity.config, states.settings.cfg_scale
    asked = conditions_of(config) if conditions is None else conditions
    states.settings.require_conditions(asked)
    inputs = model_inputs(latents, 0, labels, cfg_scale=cfg_scale, config=config, conditions=asked)
    halves = len(inputs.latents) // count
    return inputs.with_timesteps(timesteps.repeat(halves))
