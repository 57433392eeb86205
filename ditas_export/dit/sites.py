"""The one table of quantized linears and of where the smoothing of each folds.

Identity: `x Wᵀ = (x / s)(W · s)ᵀ`. The division goes into whatever made x:

| linear   | x comes from             | 1/s folds into                                   |
|----------|--------------------------|--------------------------------------------------|
| attn.qkv | modulate(norm1, msa)     | rows shift_msa, scale_msa of adaLN_modulation.1  |
| attn.proj| softmax(q kᵀ) v          | the V rows of qkv (weight, bias, low rank)       |
| mlp.fc1  | modulate(norm2, mlp)     | rows shift_mlp, scale_mlp of adaLN_modulation.1  |
| mlp.fc2  | GELU, not homogeneous    | stays: one multiplication of x by 1/s            |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditas_export.dit.model import DiTConfig

LinearKind = Literal["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]

LINEAR_KINDS: tuple[LinearKind, ...] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""In the order in which a block uses them, and calibration walks."""

ADALN_CHUNKS = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
"""Row chunks of `adaLN_modulation.1`, each `hidden_size` rows."""

FINAL_ADALN = "final_layer.adaLN_modulation.1"
"""Module path of the final layer's modulation linear, into which nothing folds."""


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One quantized linear of one block."""

    block: int
    kind: LinearKind

    @property
    def name(self) -> str:
        """Module path, as in the checkpoint."""
        return f"blocks.{self.block}.{self.kind}"


def block_sites(block: int) -> tuple[LinearSite, ...]:
    """Return the four sites of a block, in order."""
    return tuple(LinearSite(block, kind) for kind in LINEAR_KINDS)


def linear_sites(depth: int) -> tuple[LinearSite, ...]:
    """Return every site of a DiT with `depth` blocks, in walk order."""
    return tuple(site for block in range(depth) for site in block_sites(block))


def in_features(config: DiTConfig, site: LinearSite) -> int:
    """Return K of a site's linear."""
    return config.mlp_hidden_size if site.kind == "mlp.fc2" else config.hidden_size


def out_features(config: DiTConfig, site: LinearSite) -> int:
    """Return N of a site's linear."""
    widths: dict[LinearKind, int] = {
        "attn.qkv": 3 * config.hidden_size,
        "attn.proj": config.hidden_size,
        "mlp.fc1": config.mlp_hidden_size,
        "mlp.fc2": config.hidden_size,
    }
    return widths[site.kind]


def adaln_rows(chunk: str, hidden_size: int) -> slice:
    """Return the rows of `adaLN_modulation.1` that make `chunk`."""
    index = ADALN_CHUNKS.index(chunk)
    return slice(index * hidden_size, (index + 1) * hidden_size)


def final_scale_rows(hidden_size: int) -> slice:
    """Return the rows of the final layer's modulation that make its scale: shift comes first."""
    return slice(hidden_size, 2 * hidden_size)


def adaln_name(block: int) -> str:
    """Module path of a block's modulation linear."""
    return f"blocks.{block}.adaLN_modulation.1"


def adaln_names(depth: int) -> tuple[str, ...]:
    """Return the module paths of every modulation linear, the final layer's last."""
    return (*(adaln_name(block) for block in range(depth)), FINAL_ADALN)


def value_rows(hidden_size: int) -> slice:
    """Return the V rows of `attn.qkv`."""
    return slice(2 * hidden_size, 3 * hidden_size)
