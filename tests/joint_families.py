"""SD3.5 and FLUX.1 as group tables, over small random modules of diffusers; and an affine norm.

The tables are all that is stated: joint attention's two outputs under one s, dual attention, one
linear whose input is made in two ways. What prediction, sampling and files need is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn

from ditas_export.families.base import (
    ALL,
    Block,
    FamilyModel,
    Group,
    Input,
    ModelInputs,
    Modulation,
    Multiply,
    Norm,
    Rows,
    Shapes,
    Stage,
    State,
)
from ditas_export.process import DIT_PROCESS, FlowProcess, Process

WIDTH, HEADS, TEXT, POOLED, SIDE = 96, 3, 40, 24, 8
DEPTH, SINGLES = 3, 2
TOKENS = (SIDE // 2) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class JointConfig:
    """Which of the three, all of one shape."""

    kind: str
    process: Process | FlowProcess = DIT_PROCESS
    in_channels: int = 4
    out_channels: int = 4
    latent_shape: tuple[int, ...] = (4, SIDE, SIDE)
    hidden_size: int = WIDTH
    num_tokens: int = TOKENS

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class WithFactors:
    """A norm of diffusers whose linear's scales are factors: what adds 1 finds it taken off."""

    scales: tuple[slice, ...]

    def forward(self, *args: Any, **named: Any) -> Any:
        def less_one(_module: nn.Module, _x: Any, y: Tensor) -> Tensor:
            y = y.clone()
            for rows in self.scales:
                y[..., rows] -= 1
            return y

        handle = self.linear.register_forward_hook(less_one)  # type: ignore[attr-defined]
        try:
            return super().forward(*args, **named)  # type: ignore[misc]
        finally:
            handle.remove()


def chunk(index: int) -> slice:
    return slice(index * WIDTH, (index + 1) * WIDTH)


def modulated(linears: tuple[str, ...], norm: str, *, scale: int, shift: int) -> Group:
    fold = Modulation(linear=f"{norm}.linear", scale=chunk(scale), shift=chunk(shift))
    return Group(linears=linears, folds=(fold,))


def mlp(path: str, norm: str) -> tuple[Group, Group]:
    return (
        modulated((f"{path}.net.0.proj",), norm, scale=4, shift=3),
        Group(linears=(f"{path}.net.2",), folds=(Multiply(),)),
    )


def joint(*, dual: bool = False, last: bool = False) -> tuple[Group, ...]:
    """The groups of a block of two streams; in SD3's last one the text stream ends."""
    image = tuple(f"attn.to_{name}" for name in "qkv")
    text = tuple(f"attn.add_{name}_proj" for name in "qkv")
    values = (Rows(linear="attn.to_v", rows=ALL), Rows(linear="attn.add_v_proj", rows=ALL))
    outputs = ("attn.to_out.0",) if last else ("attn.to_out.0", "attn.to_add_out")
    order = {"scale": 0, "shift": 1} if last else {"scale": 1, "shift": 0}
    groups = [
        modulated(image, "norm1", scale=1, shift=0),
        modulated(text, "norm1_context", **order),
        Group(linears=outputs, folds=values, reads_one_input=last),
    ]
    if dual:
        second = tuple(f"attn2.to_{name}" for name in "qkv")
        groups += [
            modulated(second, "norm1", scale=7, shift=6),
            Group(linears=("attn2.to_out.0",), folds=(Rows(linear="attn2.to_v", rows=ALL),)),
        ]
    groups += mlp("ff", "norm1")
    if not last:
        groups += mlp("ff_context", "norm1_context")
    return tuple(groups)


SINGLE = (
    modulated(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "norm", scale=1, shift=0),
    Group(
        linears=("proj_out",),
        folds=(
            Rows(linear="attn.to_v", rows=ALL, channels=slice(0, WIDTH)),
            Multiply(channels=slice(WIDTH, None)),
        ),
    ),
)


def run_joint(block: nn.Module, state: State, constants: State) -> State:
    named = {"temb": constants["temb"]}
    if "cos" in constants:
        named["image_rotary_emb"] = (constants["cos"][0], constants["sin"][0])  # type: ignore[assignment]
    context, x = block(hidden_states=state["x"], encoder_hidden_states=state["context"], **named)
    return {"x": x} if context is None else {"x": x, "context": context}


class Joint(FamilyModel):
    """A transformer of diffusers, called with the inputs of its table."""

    config: JointConfig

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.config = config
        shared = {
            "num_attention_heads": HEADS,
            "attention_head_dim": WIDTH // HEADS,
            "num_layers": DEPTH,
            "joint_attention_dim": TEXT,
            "pooled_projection_dim": POOLED,
        }
        if config.kind == "sd3":
            self.inner = SD3Transformer2DModel(
                sample_size=SIDE, patch_size=2, in_channels=4, out_channels=4, qk_norm="rms_norm",
                caption_projection_dim=WIDTH, pos_embed_max_size=6, dual_attention_layers=(0,),
                **shared,
            )  # fmt: skip
        else:
            self.inner = FluxTransformer2DModel(
                in_channels=16, num_single_layers=SINGLES, axes_dims_rope=(8, 12, 12), **shared
            )

    def ids(self, tokens: int) -> dict[str, Tensor]:
        return {
            "img_ids": torch.arange(TOKENS)[:, None].repeat(1, 3).float(),
            "txt_ids": torch.zeros(tokens, 3),
        }

    def forward(self, timestep: Tensor, **named: Tensor) -> Tensor:
        if self.config.kind == "flux":
            named |= self.ids(named["encoder_hidden_states"].shape[1])
        output: Tensor = self.inner(timestep=timestep, return_dict=False, **named)[0]
        return output


class Normed(FamilyModel):
    """x + fc(norm(x)), its norm affine, its MLP's rows folded into nothing."""

    config: JointConfig

    def __init__(self, config: JointConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(nn.Module() for _ in range(DEPTH))
        for block in self.blocks:
            block.norm = nn.LayerNorm(WIDTH)
            block.up, block.gate = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
            block.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        state: State = {"x": hidden_states + 0 * timestep[:, None, None]}
        for block in self.blocks:
            state = run_normed(block, state, {})
        return state["x"]


def run_normed(block: nn.Module, state: State, _constants: State) -> State:
    read = block.norm(state["x"])  # type: ignore[operator]
    gated = nn.functional.silu(block.gate(read)) * block.up(read)  # type: ignore[operator]
    return {"x": state["x"] + block.down(gated)}  # type: ignore[operator]


NORMED = (
    Group(linears=("gate", "up"), folds=(Norm(norm="norm"),)),
    Group(linears=("down",), folds=(Rows(linear="up", rows=ALL),)),
)


@dataclass(frozen=True, slots=True)
class JointFamily:
    """The tables of one of the three."""

    kind: str

    @property
    def name(self) -> str:
        return self.kind

    @property
    def config_type(self) -> type[JointConfig]:
        return JointConfig

    def serves(self, config: JointConfig) -> bool:
        return config.kind == self.kind

    def module(self, config: JointConfig, *, folded: bool = False) -> FamilyModel:
        if self.kind == "normed":
            return Normed(config)
        model = Joint(config)
        if folded:
            for path, scales in self.modulations(config).items():
                norm = model.get_submodule(path.removesuffix(".linear"))
                norm.scales = scales  # type: ignore[assignment]
                norm.__class__ = type("Factors", (WithFactors, type(norm)), {})
        return model

    def blocks(self, config: JointConfig) -> tuple[Block, ...]:
        def block(path: str, groups: tuple[Group, ...], run: Callable[..., State]) -> Block:
            return Block(path=path, stages=(Stage(groups=groups, run=run),))

        if self.kind == "normed":
            return tuple(block(f"blocks.{index}", NORMED, run_normed) for index in range(DEPTH))
        path = "inner.transformer_blocks"
        if self.kind == "sd3":
            return tuple(
                block(f"{path}.{index}", joint(dual=index == 0, last=index == DEPTH - 1), run_joint)
                for index in range(DEPTH)
            )
        return (
            *(block(f"{path}.{index}", joint(), run_joint) for index in range(DEPTH)),
            *(
                block(f"inner.single_transformer_blocks.{index}", SINGLE, run_joint)
                for index in range(SINGLES)
            ),
        )

    def modulations(self, config: JointConfig) -> Mapping[str, tuple[slice, ...]]:
        found: dict[str, set[int]] = {}
        for block in self.blocks(config):
            for fold in (fold for group in block.groups() for fold in group.folds):
                if isinstance(fold, Modulation):
                    scales = found.setdefault(block.name(fold.linear), set())
                    scales.add(fold.scale.start // WIDTH)
        last = {} if self.kind == "normed" else {"inner.norm_out.linear": (chunk(0),)}
        scales = {name: tuple(map(chunk, sorted(each))) for name, each in found.items()}
        return scales | last

    def enter(self, model: Joint, inputs: ModelInputs) -> tuple[State, State]:
        if self.kind == "normed":
            return {"x": inputs.latents}, {}
        inner, fed = model.inner, dict(inputs)
        latents, captions, pooled = (
            fed[name] for name in ("hidden_states", "encoder_hidden_states", "pooled_projections")
        )
        state = {"context": inner.context_embedder(captions)}
        if self.kind == "sd3":
            temb = inner.time_text_embed(fed["timestep"], pooled)
            return {"x": inner.pos_embed(latents), **state}, {"temb": temb}
        temb = inner.time_text_embed(fed["timestep"] * 1000, pooled)
        ids = model.ids(captions.shape[1])
        rotary = inner.pos_embed(torch.cat((ids["txt_ids"], ids["img_ids"])))
        cos, sin = (each.expand(len(latents), -1, -1) for each in rotary)
        return {"x": inner.x_embedder(latents), **state}, {"temb": temb, "cos": cos, "sin": sin}

    def shapes(self, _config: JointConfig, rows: int, tokens: int) -> tuple[Shapes, Shapes]:
        state = {"x": (rows, tokens, WIDTH)}
        if self.kind == "normed":
            return state, {}
        rotary = (rows, tokens + 5, WIDTH // HEADS)
        constants = {"temb": (rows, WIDTH)}
        if self.kind == "flux":
            constants |= {"cos": rotary, "sin": rotary}
        return {**state, "context": (rows, 5, WIDTH)}, constants

    def inputs(self, _config: JointConfig) -> tuple[Input, ...]:
        shape = {"sd3": (4, SIDE, SIDE), "flux": (TOKENS, 16), "normed": (TOKENS, WIDTH)}
        latents = Input(name="hidden_states", dtype=torch.float32, shape=shape[self.kind])
        time = Input(name="timestep", dtype=torch.float32, shape=())
        if self.kind == "normed":
            return latents, time
        return (
            latents,
            time,
            Input(name="encoder_hidden_states", dtype=torch.float32, shape=("tokens", TEXT)),
            Input(name="pooled_projections", dtype=torch.float32, shape=(POOLED,)),
        )


def joint_model(kind: str) -> FamilyModel:
    """Return a model of random weights; gates and scales are no zeros."""
    torch.manual_seed(0)
    model = JointFamily(kind).module(JointConfig(kind=kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval().requires_grad_(requires_grad=False)
