"""Literal numpy transcription of the formulas that fix a published DiT's constants.

Sources: Vaswani et al. 2017, section 3.5 (sinusoids); Peebles and Xie 2023 (2-D positions, one axis
per half of the features; cosines before sines for time steps); Nichol and Dhariwal 2021 (time-step
features over half the width).
"""

from __future__ import annotations

import math

import numpy as np


def positions(hidden_size: int, grid_size: int) -> np.ndarray:
    """Return (grid_size², hidden_size) float64, one entry at a time."""
    half, quarter = hidden_size // 2, hidden_size // 4
    table = np.zeros((grid_size * grid_size, hidden_size))
    for row in range(grid_size):
        for column in range(grid_size):
            for i in range(quarter):
                omega = 1.0 / 10000 ** (i / quarter)
                entry = table[row * grid_size + column]
                entry[i] = math.sin(column * omega)
                entry[quarter + i] = math.cos(column * omega)
                entry[half + i] = math.sin(row * omega)
                entry[half + quarter + i] = math.cos(row * omega)
    return table


def timestep_features(timestep: int) -> np.ndarray:
    """Return (256,) float64."""
    features = np.zeros(256)
    for i in range(128):
        frequency = math.exp(-math.log(10000) * i / 128)
        features[i] = math.cos(timestep * frequency)
        features[128 + i] = math.sin(timestep * frequency)
    return features
