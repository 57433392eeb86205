"""Statistics of a model without an export: right in structure, made of plain numbers."""

from __future__ import annotations

import torch

from ditas_export.families.base import ModelConfig
from ditas_export.families.registry import linear_shapes
from ditas_export.report.gather import SHOWN_LINEARS, block_names
from ditas_export.report.stats import (
    MOST_CHANNELS,
    MOST_COLUMNS,
    MOST_ROWS,
    ExportStats,
    LinearStats,
    Samples,
    StatsHeader,
    WeightPictures,
)


def plain_stats(
    config: ModelConfig, *, steps: int = 50, images: int = 4, side: int = 256, seed: int = 0
) -> ExportStats:
    """Return statistics with everything that an export can leave, as large as they get."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) + 0.1

    shapes = linear_shapes(config)
    shown = list(shapes)[:SHOWN_LINEARS]
    pictures = torch.randint(0, 256, (2, images, side, side, 3), generator=generator)
    reference, quantized = pictures.to(torch.uint8)
    return ExportStats(
        header=StatsHeader(
            file_sha256="0" * 64,
            command=("ditas-export", "out.onnx"),
            notes=("a note",),
            blocks=block_names(config),
            times=tuple(float(time) for time in range(steps, 0, -1)),
            pictures="decoded",
            labels=tuple(range(images)),
            missing=(),
        ),
        linears={
            name: LinearStats(
                smoothing_scale=drawn(columns),
                step_ranges=drawn(steps),
                channel_maxima=drawn(columns),
                step_maxima=drawn(steps),
            )
            for name, (_, columns) in shapes.items()
        },
        maps={name: drawn(min(steps, 64), min(shapes[name][1], MOST_CHANNELS)) for name in shown},
        weights={
            name: WeightPictures(
                before=drawn(MOST_ROWS, MOST_COLUMNS),
                smoothed=drawn(MOST_ROWS, MOST_COLUMNS),
                error=drawn(MOST_ROWS, MOST_COLUMNS),
                codes=torch.arange(15),
            )
            for name in shown
        },
        samples=Samples(reference=reference, quantized=quantized),
    )
