"""A DiT rounded to nearest, with random low-rank factors: right for speed, not for quality."""

from __future__ import annotations

import torch

from ditas_export.calibration.quantized_model import QuantizedLinear, QuantizedModel
from ditas_export.dit.model import DiT
from ditas_export.families.identity import identity_of
from ditas_export.families.registry import linear_names
from ditas_export.quantization.integer import LowRank, quantize_rows, round_to_blocks

RANK = 32
BLOCK_SIZE = 48


def randomly_quantized(model: DiT, *, rank: int = RANK) -> QuantizedModel:
    """Round the linears to nearest and give each random low-rank factors."""
    generator = torch.Generator().manual_seed(0)
    parameters = model.state_dict()
    linears = {}
    for name in linear_names(model.config):
        weight = parameters.pop(f"{name}.weight")
        codes, _ = quantize_rows(torch.randn(rank, weight.shape[1], generator=generator))
        linears[name] = QuantizedLinear(
            weight=round_to_blocks(weight, block_size=BLOCK_SIZE),
            low_rank=LowRank(
                left_codes=torch.randint(
                    -60, 61, (weight.shape[0], rank), dtype=torch.int8, generator=generator
                ),
                right_codes=codes,
                divisor=torch.full((rank,), 2 * int(70 * weight.shape[1] ** 0.5) + 1).int(),
            ),
            bias=parameters.pop(f"{name}.bias"),
            smoothing_scale=torch.ones(weight.shape[1]),
            alpha=None,
            step_ranges=torch.tensor([8.0]),
            output_snr_db=float("nan"),
        )
    return QuantizedModel(
        identity=identity_of(model),
        float_parameters=parameters,
        linears=linears,
        activation_bits=8,
        settings={"ranges": "token"},
    )
