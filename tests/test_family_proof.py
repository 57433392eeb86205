"""`prove_folds`: what a family's author calls; every kind of fold, right and wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from joint_families import JointFamily, joint_model
from quantized_fixture import tiny_dit

from ditas_export.calibration.family_proof import prove_folds
from ditas_export.calibration.walk import walk
from ditas_export.errors import CalibrationError, QuantizationError
from ditas_export.families import registry
from ditas_export.families.base import Block, Group, ModelInputs, Stage
from ditas_export.families.dit import DiTFamily
from ditas_export.process import Process

EXACT = 1e-12
"""Relative error of a fold in float64: K at most 480, and s over five orders of magnitude."""

GROUPS = {"sd3": (7 + 2) + 7 + (3 + 2), "flux": 3 * 7 + 2 * 2, "normed": 3 * 2}
"""Groups of each: SD3's first block has two more, its last has no MLP of the text."""


def test_dit() -> None:
    families = list(registry.FAMILIES)
    proof = prove_folds(DiTFamily("dit", Process), tiny_dit(), bound=EXACT)
    assert list(proof.groups)[:2] == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert 0 < max(proof.groups.values()) < EXACT
    assert families == registry.FAMILIES


@pytest.mark.parametrize("kind", GROUPS)
def test_tables_are_proved(kind: str) -> None:
    proof = prove_folds(JointFamily(kind), joint_model(kind), bound=EXACT)
    assert len(proof.groups) == GROUPS[kind]
    assert 0 < max(proof.groups.values()) < EXACT
    assert proof.stages < EXACT
    assert 0 < proof.output < EXACT


class Edited(JointFamily):
    """Tables of which one group's folds are others."""

    def __init__(self, kind: str, linear: str, edit: Any) -> None:
        super().__init__(kind)
        object.__setattr__(self, "edits", (linear, edit))

    __slots__ = ("edits",)

    def blocks(self, config: Any) -> tuple[Block, ...]:
        linear, edit = self.edits

        def edited(group: Group) -> Group:
            return replace(group, folds=edit(group.folds)) if linear in group.linears else group

        return tuple(
            Block(
                path=block.path,
                stages=tuple(
                    Stage(groups=tuple(map(edited, stage.groups)), run=stage.run)
                    for stage in block.stages
                ),
            )
            for block in JointFamily.blocks(self, config)
        )


@pytest.mark.parametrize(
    ("kind", "linear", "edit"),
    [
        ("sd3", "attn.to_add_out", lambda folds: folds[:1]),  # not into the text's values
        ("sd3", "attn.to_out.0", lambda folds: folds[1:]),
        ("flux", "proj_out", lambda folds: folds[1:]),  # a part that nothing divides
        ("flux", "proj_out", lambda folds: folds[:1]),
        ("flux", "proj_mlp", lambda folds: (replace(folds[0], shift=folds[0].scale),)),
        ("normed", "up", lambda folds: ()),
        ("normed", "down", lambda folds: (replace(folds[0], linear="gate"),)),
    ],
)
def test_a_table_that_is_wrong_is_found(kind: str, linear: str, edit: Any) -> None:
    family = Edited(kind, linear, edit)
    with pytest.raises(QuantizationError, match=rf"the folds of [^:]*{linear}"):
        prove_folds(family, joint_model(kind))


def test_stages_that_are_not_the_model_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = JointFamily.enter

    def wrong(self: JointFamily, *arguments: Any) -> Any:
        state, constants = right(self, *arguments)
        return {**state, "x": 1.001 * state["x"]}, constants

    monkeypatch.setattr(JointFamily, "enter", wrong)
    with pytest.raises(QuantizationError, match="the stages, against the model's forward: "):
        prove_folds(JointFamily("flux"), joint_model("flux"))


def test_the_walk_refuses_two_inputs_under_one_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", [JointFamily("flux")])
    model = joint_model("flux")
    inputs = ModelInputs({"hidden_states": torch.zeros(1, 16, 16), "timestep": torch.zeros(1)})
    walked = walk(model, model.config, inputs, {}, pytest.fail, known={})
    with pytest.raises(
        CalibrationError, match=r"to_out\.0 and \S*to_add_out read different inputs"
    ):
        next(walked)
