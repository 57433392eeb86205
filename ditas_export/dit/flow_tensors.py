"""What the tensors of flows' checkpoints have that a DiT's do not, and what is kept of it.

SiT's networks put out twice the channels and drop the second half (`learn_sigma`); REPA's have
heads (`projectors`) that are compared with another network's features in training alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ditas_export.dit.facts import Fact, Facts
from ditas_export.dit.model import DiTConfig
from ditas_export.dit.tensor_files import abbreviated
from ditas_export.errors import CheckpointError

_PROJECTORS = "projectors."
_NORM_OF_QUERIES = re.compile(r"blocks\.\d+\.attn\.q_norm\.")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetworkTensors:
    """The tensors that sampling needs, and what the others said."""

    tensors: Mapping[str, Tensor]
    facts: Facts = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def without_projectors(tensors: Mapping[str, Tensor], *, where: str) -> NetworkTensors:
    """Return the tensors but for REPA's projectors, which say whose model it is.

    Raises:
        CheckpointError: an attention that normalizes queries and keys.
    """
    norms = [name for name in tensors if _NORM_OF_QUERIES.match(name)]
    if _blocks(norms) and _blocks(norms) == _blocks(tensors):
        raise CheckpointError(
            f"{where}: its attention normalizes queries and keys (qk_norm: {abbreviated(norms)}), "
            f"which is not followed (yet)"
        )
    kept = {name: each for name, each in tensors.items() if not name.startswith(_PROJECTORS)}
    if len(kept) == len(tensors):
        return NetworkTensors(tensors=tensors)
    note = f"left out REPA's {_PROJECTORS}* ({len(tensors) - len(kept)} tensors), of training alone"
    return NetworkTensors(
        tensors=kept,
        facts={"family": Fact("repa", f"its {_PROJECTORS}* (REPA's)")},
        notes=(note,),
    )


def _blocks(names: Iterable[str]) -> set[str]:
    """Return the numbers of the blocks that names are of."""
    return {name.split(".")[1] for name in names if name.startswith("blocks.")}


def velocity_alone(state: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Return a state whose output has C channels, from one that has 2C: the first of every pixel.

    Args:
        state: float32; rows of `final_layer.linear` are (p, p, 2C), channels fastest.
        config: of the model without the second half.
    """
    pixels, channels = config.patch_size**2, config.in_channels
    cut = {}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        by_channel = state[name].reshape(pixels, 2 * channels, *state[name].shape[1:])
        cut[name] = by_channel[:, :channels].flatten(0, 1)
    return state | cut
