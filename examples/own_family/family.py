"""The family of `model.py`: its configuration, and what ditas-export asks of any family."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from ditas_export.conditions.embeddings import PromptEmbeddings
from ditas_export.errors import ConditionsError
from ditas_export.families import base
from ditas_export.families.base import FamilyModel, Input, Modulation, Multiply, Rows, State
from ditas_export.families.packaged import PackagedFamily
from ditas_export.process import FlowProcess

from .model import Block, FrameTransformer, Shape, modulate, modulate_by_factor

FLOW = FlowProcess()  # t = 1 at the data, the velocity towards them


@dataclass(frozen=True, kw_only=True)
class FramesConfig(Shape):
    """What a model computes beside its tensors."""

    process: FlowProcess = FLOW
    out_channels = property(lambda self: self.in_channels)
    latent_shape = property(lambda self: (self.in_channels, self.num_tokens))
    to_dict = asdict


class FrameModel(FrameTransformer, FamilyModel):
    """The model, as ditas-export calls it."""


def run(block: Block, state: State, constants: State) -> State:
    """Run a block's own forward, by names."""
    return {"x": block(state["x"], **constants)}


class Frames(PackagedFamily[FramesConfig, FrameModel]):
    """Flow transformers over frames; what each method states is said in `base.Family`."""

    name, config_type = "frames", FramesConfig

    def module(self, config: FramesConfig, *, folded: bool = False) -> FrameModel:
        return FrameModel(config, modulate_by_factor if folded else modulate)

    def blocks(self, config: FramesConfig) -> tuple[base.Block, ...]:
        d, modulated = config.hidden_size, partial(Modulation, linear="modulation")
        attention = modulated(shift=slice(0, d), scale=slice(d, 2 * d))
        mlp = modulated(shift=slice(3 * d, 4 * d), scale=slice(4 * d, 5 * d))
        folds = {
            ("to_q", "to_k", "to_v"): attention,
            ("to_out",): Rows(linear="to_v", rows=base.ALL),
            ("ff_in",): mlp,
            ("ff_out",): Multiply(),
        }
        group = partial(base.Group, mask="attention_mask")
        groups = tuple(group(linears=linears, folds=(fold,)) for linears, fold in folds.items())
        stage = base.Stage(groups=groups, run=run)
        return tuple(base.Block(path=f"blocks.{i}", stages=(stage,)) for i in range(config.depth))

    def enter(self, model: FrameModel, inputs: base.ModelInputs) -> tuple[State, State]:
        *embedded, mask = inputs.values()
        x, c, turn = model.embed(*embedded)
        return {"x": x}, {"c": c, "turn": turn.expand(len(x), -1, -1), "mask": mask}

    def shapes(self, config: FramesConfig, rows: int, t: int) -> tuple[base.Shapes, base.Shapes]:
        d, turn = config.hidden_size, (rows, t, config.hidden_size // config.num_heads)
        return {"x": (rows, t, d)}, {"c": (rows, d), "turn": turn, "mask": (rows, t)}

    def modulations(self, config: FramesConfig) -> dict[str, tuple[slice, ...]]:
        d = config.hidden_size
        scales = (slice(d, 2 * d), slice(4 * d, 5 * d))
        blocks = {f"blocks.{i}.modulation": scales for i in range(config.depth)}
        return {**blocks, "modulation": scales[:1]}

    def modulation_inputs(self, config: FramesConfig, parameters: State) -> torch.Tensor:
        model = self.module(config)
        model.load_state_dict(parameters, strict=False)
        return model.of_time(torch.linspace(0, 1, 1000)).detach()

    def float_linears(self, _config: FramesConfig) -> tuple[str, ...]:
        return ("to_frames",)

    def embedders(self) -> tuple[str, ...]:
        return ("join", "embed_time")

    def inputs(self, config: FramesConfig) -> tuple[Input, ...]:
        of, (channels, t) = partial(Input, dtype=torch.float32), config.latent_shape
        return (
            of(name="frames", shape=(channels, t), is_feature=True),
            of(name="time", shape=(), bounds=base.Bounds(first=0, last=1, what="of the flow")),
            of(name="given", shape=(channels, t), is_feature=True),
            of(name="text", shape=(t, config.text_width), is_feature=True),
            of(name="attention_mask", shape=(t,)),
        )

    def conditions(self, config: FramesConfig, embeddings: Path | None) -> PromptEmbeddings:
        if embeddings is None:
            raise ConditionsError("frames are asked for by --embeddings, which make.py shows")
        return PromptEmbeddings.load(embeddings, inputs=self.inputs(config)[2:])


FRAMES = Frames()
