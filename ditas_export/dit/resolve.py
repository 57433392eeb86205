"""From what tensors show and records say to one configuration, every disagreement by name.

What shapes determine, a record may only confirm. What they leave open (heads, norm eps, time-step
frequencies, the null row, the process) the record says, else the caller, else the published
convention, which is said where it is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditas_export.dit.facts import Fact, Facts, merged
from ditas_export.dit.flows import flow_of
from ditas_export.dit.layouts import Geometry
from ditas_export.dit.model import DiTConfig
from ditas_export.dit.positions import square_side
from ditas_export.dit.presets import LATENT_DOWNSCALE, preset_num_heads
from ditas_export.errors import CheckpointError
from ditas_export.process import DIT_PROCESS, Process, Variance

_SHAPED = ("patch_size", "in_channels", "hidden_size", "depth", "mlp_ratio", "learn_sigma")
"""Fields that shapes determine, each by itself."""

_LATENT_CHANNELS = 4
"""Channels of the latents of the published models."""

_PIXEL_CHANNELS = (1, 3)

_MOST_PATCHES = 1024
"""Patches a side for which a position table is computed; published models have 32 at most."""

_FED_STEPS = 1000
"""Steps to which OpenAI's `rescale_timesteps` scales what the network is fed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is known of a checkpoint before its configuration is."""

    geometry: Geometry
    positions: Tensor | None  # the position table of the file, where it has one
    record: Facts
    hints: Facts
    where: str  # the file, for messages
    mlp_norm_eps: float  # where no record says
    frequency_shift: int
    fixed_variance: Variance  # where none is learned and no record says which


def resolve(source: Source) -> tuple[DiTConfig, tuple[str, ...]]:
    """Return the configuration, and one line for each guess.

    Raises:
        CheckpointError: a record that tensors, another record or an option contradicts; what only
            an option can tell; or something that is not followed.
    """
    geometry, where = source.geometry, source.where
    facts = merged(source.record, source.hints, where=where, remedy="leave the option out")
    _require_shapes(geometry, facts, where)
    num_classes, null_row, label_notes = _labels(geometry.label_rows, facts, where)
    input_size, grid_notes = _input_size(source, facts)
    num_heads, flow = _num_heads(source, facts), flow_of(facts, where)
    process = _process(source, facts) if flow is None else flow
    with _naming(facts, where):
        config = DiTConfig(
            input_size=input_size,
            patch_size=geometry.patch_size,
            in_channels=geometry.in_channels,
            hidden_size=geometry.hidden_size,
            depth=geometry.depth,
            num_heads=num_heads,
            mlp_ratio=geometry.mlp_ratio,
            num_classes=num_classes,
            null_row=null_row,
            learn_sigma=geometry.learn_sigma and flow is None,
            layer_norm_eps=_value(facts, "layer_norm_eps", 1e-6),
            mlp_norm_eps=_value(facts, "mlp_norm_eps", source.mlp_norm_eps),
            frequency_shift=_value(facts, "frequency_shift", source.frequency_shift),
            process=process,
        )
    return config, (*label_notes, *grid_notes, *_output_notes(geometry, config))


def _output_notes(geometry: Geometry, config: DiTConfig) -> list[str]:
    """Return what is to be said of output that a flow's network drops."""
    if geometry.learn_sigma == config.learn_sigma:
        return []
    return [f"left out the {config.in_channels} channels of its output that are no velocity"]


@contextmanager
def _naming(facts: Facts, where: str) -> Iterator[None]:
    """Add to a refusal of values the file, and where those that it names stand."""
    try:
        yield
    except CheckpointError as error:
        fields = re.findall(r"\w+", str(error).replace("input_size", "input_size image_size"))
        places = [facts[field].where for field in dict.fromkeys(fields) if field in facts]
        remedy = f"; correct {', '.join(dict.fromkeys(places))}" if places else ""
        raise CheckpointError(f"{where}: {error}{remedy}") from None


def _value(facts: Facts, field: str, default: Any) -> Any:
    """Return what is said of a field, or the default."""
    return facts[field].value if field in facts else default


def _require_shapes(geometry: Geometry, facts: Facts, where: str) -> None:
    """Refuse a record that the tensors' shapes contradict."""
    odd = []
    for field in _SHAPED:
        found = getattr(geometry, field)
        if field in facts and not _agree(facts[field].value, found):
            odd.append(_disagreement(facts[field], field, found))
    if odd:
        raise CheckpointError(
            f"{where}: record and tensors disagree: {'; '.join(odd)}; get the right file, or "
            f"correct the record"
        )


def _is_option(fact: Fact | None) -> bool:
    """Return whether a caller says it."""
    return fact is not None and fact.where.startswith("--")


def _agree(told: Any, found: Any) -> bool:
    """Return whether two values are one; ratios of widths to a hundred-thousandth."""
    return bool(abs(told - found) <= 1e-5 * found) if isinstance(found, float) else told == found


def _disagreement(fact: Fact, field: str, found: object) -> str:
    """Return both values of a field and where the record's stands."""
    return f"{field} {fact.value} ({fact.where}), but {found} by shape"


def _num_heads(source: Source, facts: Facts) -> int:
    """Return the number of heads: recorded, of the size that is named, told, or published."""
    told, named = facts.get("num_heads"), source.record.get("named_heads")
    if told is not None and _is_option(told) and named is not None:
        merged({"num_heads": named}, {"num_heads": told}, where=source.where,
               remedy="leave the option out")  # fmt: skip
    geometry = source.geometry
    if (fact := told or named) is not None:
        if geometry.hidden_size % fact.value:
            remedy = "pass another" if _is_option(fact) else "correct the record"
            raise CheckpointError(
                f"{source.where}: hidden_size={geometry.hidden_size} is no multiple of "
                f"num_heads={fact.value} ({fact.where}); {remedy}"
            )
        return int(fact.value)
    known = preset_num_heads(depth=geometry.depth, hidden_size=geometry.hidden_size)
    if known is None:
        raise CheckpointError(
            f"{source.where} does not say how many heads its attention has, and no published DiT "
            f"has depth {geometry.depth} and width {geometry.hidden_size}; pass --num-heads"
        )
    return known


def _labels(rows: int, facts: Facts, where: str) -> tuple[int, bool, list[str]]:
    """Return the number of classes, whether there is a null row, and what was guessed."""
    told, null_row = facts.get("num_classes"), facts.get("null_row")
    if rows == 0:
        if told is not None and told.value > 0:
            raise CheckpointError(
                f"{where}: record and tensors disagree: {told.value} classes ({told.where}), but "
                f"no label table; get the file again"
            )
        return 0, True, ["it has no label table: a model without classes, which nothing guides"]
    if told is None and null_row is None:
        if rows == 1:
            return 0, True, ["its label table has one row: a model without classes"]
        note = (
            f"nothing records its classes: the last of the {rows} rows of its label table is taken "
            f"for the null class; --num-classes {rows} or --no-null-class says otherwise"
        )
        return rows - 1, True, [note]
    if told is None:
        assert null_row is not None
        return rows - null_row.value, bool(null_row.value), []
    allowed = (0, 1) if null_row is None else (int(null_row.value),)
    if rows - told.value not in allowed:
        null = "" if null_row is None else (
            f" and {'a' if null_row.value else 'no'} null row ({null_row.where})"
        )  # fmt: skip
        options = [fact.where for fact in (told, null_row) if fact and _is_option(fact)]
        remedy = f"; leave {' and '.join(options)} out" if options else "; correct the record"
        raise CheckpointError(
            f"{where}: record and tensors disagree: {told.value} classes ({told.where}){null}, but "
            f"a label table of {rows} rows; expected one row a class, and one for the null class "
            f"where there is one{remedy}"
        )
    without = f"its label table has no null row: {rows} rows, {told.value} classes ({told.where})"
    has_null = rows > told.value
    return told.value, has_null, [] if has_null or null_row is not None else [without]


def _input_size(source: Source, facts: Facts) -> tuple[int, list[str]]:
    """Return the latent's side, and what was guessed."""
    patch, where = source.geometry.patch_size, source.where
    told, image = facts.get("input_size"), facts.get("image_size")
    if source.positions is None:
        return _told_size(source, told, image), [
            "it has no pos_embed: the sin-cos table is computed"
        ]
    side, is_sincos = square_side(source.positions, where=where)
    size = side * patch
    if told is not None and told.value != size:
        raise CheckpointError(
            f"{where}: record and tensors disagree: "
            f"{_disagreement(told, 'input_size', size)} (of pos_embed)"
        )
    if image is not None and not _is_image_of(image.value, size):
        raise CheckpointError(
            f"{where}: record and tensors disagree: images of {image.value} pixels "
            f"({image.where}), but pos_embed is for inputs of {size} pixels"
        )
    if is_sincos:
        return size, []
    return size, [f"its pos_embed is a learned one: taken for a square of {side} x {side} patches"]


def _is_image_of(pixels: int, size: int) -> bool:
    """Return whether images of a size can be inputs, or have latents, of another.

    Autoencoders are smaller by a power of two.
    """
    scale, rest = divmod(pixels, size)
    return rest == 0 and scale > 0 and scale & (scale - 1) == 0


def _told_size(source: Source, told: Fact | None, image: Fact | None) -> int:
    """Return the latent's side as recorded, where no position table shows it."""
    channels = source.geometry.in_channels
    if told is not None:
        return _bounded_size(source, told, int(told.value))
    if image is not None and channels == _LATENT_CHANNELS:
        return _bounded_size(source, image, int(image.value) // LATENT_DOWNSCALE)
    if image is not None and channels in _PIXEL_CHANNELS:
        return _bounded_size(source, image, int(image.value))
    raise CheckpointError(
        f"{source.where} has no pos_embed, and nothing says how large its latents are; add it, or "
        f"write the weights as safetensors with input_size in the metadata"
    )


def _bounded_size(source: Source, fact: Fact, size: int) -> int:
    """Return a recorded side, whose position table is computed; refuse one of another order."""
    most = _MOST_PATCHES * source.geometry.patch_size
    if not 0 < size <= most:
        raise CheckpointError(
            f"{source.where}: {fact.where} gives inputs of {size} pixels a side; expected 1 to "
            f"{most} ({_MOST_PATCHES} patches); correct {fact.where}"
        )
    return size


def _process(source: Source, facts: Facts) -> Process:
    """Return the process, the published one where nothing is said."""
    return process_of(
        facts,
        fixed_variance=None if source.geometry.learn_sigma else source.fixed_variance,
        in_channels=source.geometry.in_channels,
        where=source.where,
    )


def process_of(
    facts: Facts, *, fixed_variance: Variance | None, in_channels: int, where: str
) -> Process:
    """Return the process that is recorded of a diffusion, the published one where nothing is said.

    Args:
        facts: of records and hints.
        fixed_variance: of a model that puts no variance out, where no record says which; None where
            it puts one out.
        in_channels: C.
        where: the file, for messages.

    Raises:
        CheckpointError: a process that is not followed, or that the output contradicts.
    """
    _refuse_rescaled(facts, where)
    default = DIT_PROCESS.variance
    if fixed_variance is not None:
        default = _fixed_variance(facts, fixed_variance, in_channels, where)
    with _naming(facts, where):
        return Process(
            beta_schedule=_value(facts, "beta_schedule", DIT_PROCESS.beta_schedule),
            beta_start=_value(facts, "beta_start", DIT_PROCESS.beta_start),
            beta_end=_value(facts, "beta_end", DIT_PROCESS.beta_end),
            train_timesteps=_value(facts, "train_timesteps", DIT_PROCESS.train_timesteps),
            variance=_value(facts, "variance", default),
            vae=_value(facts, "vae", None),
        )


def _fixed_variance(facts: Facts, default: Variance, in_channels: int, where: str) -> Variance:
    """Return the variance of a model that puts none out: as recorded, under either name."""
    told, fixed = facts.get("variance"), facts.get("fixed_variance")
    if told is not None and told.value == "learned_range":
        raise CheckpointError(
            f"{where}: record and tensors disagree: variance learned_range "
            f"({told.where}), but the output has {in_channels} channels: no learned variance"
        )
    both = [{"variance": fact} for fact in (told, fixed) if fact is not None]
    variance: Variance = _value(merged(*both, where=where), "variance", default)
    return variance


def _refuse_rescaled(facts: Facts, where: str) -> None:
    """Refuse a network that is fed other numbers than its time steps."""
    rescaled = facts.get("rescale_timesteps")
    steps = _value(facts, "train_timesteps", DIT_PROCESS.train_timesteps)
    if rescaled is not None and rescaled.value and steps != _FED_STEPS:
        raise CheckpointError(
            f"{where}: {rescaled.where}=True: the model is fed its {steps} time steps scaled to "
            f"{_FED_STEPS}, which is not followed (yet)"
        )
