"""The two ways in which a DiT's tensors are named and split, and the strict check of either.

`official` is the published one, and ours. `diffusers` is `DiTTransformer2DModel`'s: q, k and v
apart, a copy of the time and label embedders in every block, no position embedding (it is
computed, and equals ours).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.dit.fitting import Wanted, complaint, faults_of
from ditas_export.dit.model import MOST_BLOCKS, DiT, DiTConfig, position_embedding
from ditas_export.dit.tensor_files import abbreviated
from ditas_export.errors import CheckpointError, UnrecognizedError


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a file, and the parameter, or third of its rows, that it fills."""

    file_name: str
    name: str
    third: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names of one kind of checkpoint; `slots` lists every tensor of a model of some depth."""

    block_prefix: str
    patch_weight: str
    label_table: str
    fc1_weight: str
    final_weight: str
    slots: Callable[[int], list[Slot]]


def _official_slots(depth: int) -> list[Slot]:
    """Every tensor under its own name."""
    config = DiTConfig(input_size=2, hidden_size=4, depth=depth, num_heads=1, num_classes=1)
    with torch.device("meta"):
        return [Slot(name, name) for name in DiT(config).state_dict()]


_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
}
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
_INSIDE = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def _diffusers_slots(depth: int) -> list[Slot]:
    """Every tensor of diffusers' model; the embedders once for each block."""
    slots = _pairs(_OUTSIDE, "", "")
    for block in range(depth):
        theirs, ours = f"transformer_blocks.{block}.", f"blocks.{block}."
        slots += _pairs(_INSIDE, theirs, ours)
        for third, letter in enumerate("qkv"):
            slots += [
                Slot(f"{theirs}attn1.to_{letter}.{kind}", f"{ours}attn.qkv.{kind}", third)
                for kind in ("weight", "bias")
            ]
        embedders = f"{theirs}norm1.emb."
        slots += _pairs(_EMBEDDERS, embedders, "")
        table = "class_embedder.embedding_table.weight"
        slots.append(Slot(f"{embedders}{table}", OFFICIAL.label_table))
    return slots


_COPIED = {
    "y_embedder.embedding_table.weight",
    *(f"{ours}.{kind}" for ours in _EMBEDDERS.values() for kind in ("weight", "bias")),
}
"""Parameters that every block has a copy of in diffusers' layout."""


def _pairs(names: Mapping[str, str], theirs: str, ours: str) -> list[Slot]:
    """Return the slots of weight and bias of some modules."""
    return [
        Slot(f"{theirs}{their_name}.{kind}", f"{ours}{our_name}.{kind}")
        for their_name, our_name in names.items()
        for kind in ("weight", "bias")
    ]


OFFICIAL = Layout(
    block_prefix="blocks.",
    patch_weight="x_embedder.proj.weight",
    label_table="y_embedder.embedding_table.weight",
    fc1_weight="blocks.0.mlp.fc1.weight",
    final_weight="final_layer.linear.weight",
    slots=_official_slots,
)

DIFFUSERS = Layout(
    block_prefix="transformer_blocks.",
    patch_weight="pos_embed.proj.weight",
    label_table="transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
    fc1_weight="transformer_blocks.0.ff.net.0.proj.weight",
    final_weight="proj_out_2.weight",
    slots=_diffusers_slots,
)


_FEWEST_IN_BLOCK = 4
"""Tensors of a block, on average, below which names are not taken for a DiT's; it has 10."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the shapes of a checkpoint's tensors tell."""

    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    mlp_ratio: float
    label_rows: int  # 0 where there is no label table
    learn_sigma: bool  # whether the output has twice the channels of the input


def infer_geometry(tensors: Mapping[str, Tensor], layout: Layout, *, where: str) -> Geometry:
    """Read a DiT's shape off its tensors.

    Raises:
        UnrecognizedError: the first of the tensors that tell is missing.
        CheckpointError: another one is, or has the wrong number of dimensions.
    """
    ranks = {layout.patch_weight: 4, layout.fc1_weight: 2, layout.final_weight: 2}
    if layout.label_table in tensors or layout is not OFFICIAL:
        ranks[layout.label_table] = 2
    if odd := [
        f"{rank}-D {name}"
        for name, rank in ranks.items()
        if name not in tensors or tensors[name].ndim != rank or not tensors[name].numel()
    ]:
        is_strange = layout.patch_weight not in tensors
        raise (UnrecognizedError if is_strange else CheckpointError)(
            f"{where} is no DiT: it has no {abbreviated(odd)}; found "
            f"{len(tensors)} tensors such as {abbreviated(sorted(tensors)) or 'none'}"
        )
    hidden_size, in_channels, patch_size, _ = tensors[layout.patch_weight].shape
    in_blocks = [name for name in tensors if name.startswith(layout.block_prefix)]
    depth = len({name.removeprefix(layout.block_prefix).split(".")[0] for name in in_blocks})
    if depth > MOST_BLOCKS:
        raise CheckpointError(
            f"{where} is no DiT: its tensors have names of {depth} blocks, expected {MOST_BLOCKS} "
            f"at most; get the file again"
        )
    if len(in_blocks) < _FEWEST_IN_BLOCK * depth:
        raise CheckpointError(
            f"{where} is no DiT: {len(in_blocks)} tensors have names of {depth} blocks, such as "
            f"{abbreviated(in_blocks)}"
        )
    pixels = tensors[layout.final_weight].shape[0]
    labels = tensors.get(layout.label_table)
    return Geometry(
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        mlp_ratio=tensors[layout.fc1_weight].shape[0] / hidden_size,
        label_rows=0 if labels is None else labels.shape[0],
        learn_sigma=pixels != patch_size**2 * in_channels,
    )


def assemble(
    tensors: Mapping[str, Tensor], layout: Layout, config: DiTConfig, *, where: str
) -> dict[str, Tensor]:
    """Return our state dict in float32, after checking every tensor of the file.

    A float32 tensor that fills a parameter of its own is passed on as it is, mapped or not. What a
    file may lack is computed: the sin-cos position table, and for a model without classes a label
    table of one row of zeros, which adds nothing.

    Raises:
        CheckpointError: one line that names missing, unexpected, misshapen, non-float and
            non-finite tensors, and embedders that differ between blocks.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT(config).state_dict().items()}
    computed = {
        "pos_embed": position_embedding(config.hidden_size, config.input_size // config.patch_size)[
            None
        ],
    }
    if layout is OFFICIAL and config.label_rows == 1:
        computed[OFFICIAL.label_table] = torch.zeros(1, config.hidden_size)
    slots = [
        slot
        for slot in layout.slots(config.depth)
        if slot.name not in computed or slot.file_name in tensors
    ]
    _check(tensors, slots, shapes, where=where)
    sources: dict[str, list[Tensor]] = {}
    for slot in slots:
        copies = sources.setdefault(slot.name, [])
        if slot.third is not None or not copies:
            copies.append(tensors[slot.file_name].float())
    state = {name: torch.cat(parts) if len(parts) > 1 else parts[0]
             for name, parts in sources.items()}  # fmt: skip
    return computed | state


def _check(
    tensors: Mapping[str, Tensor],
    slots: Iterable[Slot],
    shapes: Mapping[str, torch.Size],
    *,
    where: str,
) -> None:
    """Raise one error that names all that is wrong."""
    expected = {
        slot.file_name: Wanted(tuple(_slot_shape(slot, shapes[slot.name])), dtype=None)
        for slot in slots
    }
    faults = faults_of(tensors, expected)
    if not any(faults.values()):
        unlike = _unlike_first(tensors, slots)
        _refuse_own_embedders(unlike, slots, where)
        faults = {"unlike block 0's copy": unlike}
    if found := complaint(faults):
        raise CheckpointError(
            f"{where} is no sound DiT checkpoint: {found}. Expected the {len(expected)} tensors of "
            f"its depth and width, all finite; get the file again, or check how it was written"
        )


def _slot_shape(slot: Slot, shape: torch.Size) -> torch.Size:
    """Return the shape that a file's tensor must have: a parameter's, or a third of its rows."""
    return shape if slot.third is None else torch.Size((shape[0] // 3, *shape[1:]))


def _unlike_first(tensors: Mapping[str, Tensor], slots: Iterable[Slot]) -> list[str]:
    """Return the file names of copies of one parameter that differ from its first."""
    first: dict[str, Tensor] = {}
    odd = []
    for slot in slots:
        if slot.third is None and slot.file_name in tensors:
            tensor = tensors[slot.file_name].float()
            if not torch.equal(first.setdefault(slot.name, tensor), tensor):
                odd.append(slot.file_name)
    return odd


def _refuse_own_embedders(unlike: Iterable[str], slots: Iterable[Slot], where: str) -> None:
    """Tell a model whose blocks were trained with embedders of their own from a damaged copy."""
    copies: dict[str, int] = {}
    for slot in slots:
        if slot.name in _COPIED:
            copies[_block_of(slot.file_name)] = 0
    for name in unlike:
        copies[_block_of(name)] += 1
    others = list(copies.values())[1:]
    if others and min(others) >= _OWN_COPIES:
        raise CheckpointError(
            f"{where}: the time and label embedders of all {len(copies)} blocks differ, as after "
            f"fine-tuning in diffusers, where each block has a copy of its own; a DiT has one pair "
            f"for all blocks, and such a model is not followed (yet). Tie the copies in training"
        )


def _block_of(name: str) -> str:
    """Return the part of a name in diffusers' layout that tells the block."""
    return ".".join(name.split(".")[:2])


_OWN_COPIES = 3
"""Of the five embedder tensors of a block, how many differ at least where all were trained."""
