"""What can be asked of the samplers, by name. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

DiffusionSampler = Literal["ddpm", "ddim", "dpm++"]
"""Samplers of diffusions, the default first."""

FlowSampler = Literal["euler", "heun", "euler-maruyama"]
"""Samplers of flows, the default first."""

SamplerName = Literal["ddpm", "ddim", "dpm++", "euler", "heun", "euler-maruyama"]
"""Samplers to choose from; which of them is the model's to say."""

CfgChannels = Literal["3", "all"]
"""Which output channels guidance acts on: the first three at most, or every one."""

Interval = tuple[float, ...]
"""Two noise levels, from 0 (data) to 1 (noise alone), the lower one first."""
