"""The default method against NVIDIA's own quantizer, nvidia-modelopt, in the same run.

    python scripts/compare_modelopt.py                   # needs the extra [modelopt]
    python scripts/compare_modelopt.py --quick --rows modelopt-gptq,ditas-plus --models plain

modelopt's fake-quantized model is judged as `compare_methods.py` judges ours: same states, same
noise, same sampler. Everything of modelopt quantizes the block linears alone, W4A8 with

    weights      {"num_bits": 4, "block_sizes": {-1: 48, "type": "static"}}: float scales along K
    activations  {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}: per token

calibrated on the inputs that our walk sees. Its algorithms: `max`; `gptq` (perc_damp 0.01, its
default; updates in blocks of 192 columns, a multiple of 48) on the whole model, its default, and
layer by layer, each block on the quantized outputs of those before; `awq_lite` (α step 0.1, as in
its INT4_AWQ_CFG) and `svdquant` with our rank, both with static per-tensor activations, because
they refuse per-token ones; and, at W8A8, what its INT8_SMOOTHQUANT_CFG says (static ranges).
"""

from __future__ import annotations

import contextlib
import copy
import io
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from compare_methods import Candidate, Row, all_rows, common_options, run

from ditas_export.calibration.calibrate import DEFAULT_BLOCK_SIZE, QuantizationSettings
from ditas_export.calibration.states import CalibrationStates, walk_states
from ditas_export.calibration.walk import row_batches
from ditas_export.cli.console import clean_errors
from ditas_export.dit.model import DiT
from ditas_export.errors import CalibrationError

PACKAGE = "nvidia-modelopt"
TESTED_VERSION = "0.47"
GPTQ_COLUMNS = 4 * DEFAULT_BLOCK_SIZE
"""Columns that modelopt's GPTQ updates together; a multiple of the block size, as it asks."""

INT4_BLOCKS = {"num_bits": 4, "block_sizes": {-1: DEFAULT_BLOCK_SIZE, "type": "static"}}
INT8_ROWS = {"num_bits": 8, "axis": 0}
INT8_TOKENS = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
INT8_STATIC = {"num_bits": 8, "axis": None}

BITS_PER_WEIGHT = 4 + 16 / DEFAULT_BLOCK_SIZE
"""Of INT4 blocks whose scale is a half."""

OURS = ("ditas", "no-low-rank", "ditas-plus", "w8", "bf16")
"""Rows of `compare_methods.py` to set beside modelopt's."""


def modelopt_rows() -> tuple[Row, ...]:
    """Return modelopt's rows."""
    gptq = {"method": "gptq", "perc_damp": 0.01, "block_size": GPTQ_COLUMNS}
    return (
        _row("modelopt-max", "modelopt: max", {"method": "max"}),
        _row(
            "modelopt-awq",
            "modelopt: AWQ, static ranges",
            {"method": "awq_lite", "alpha_step": 0.1},
            activations=INT8_STATIC,
        ),
        _row(
            "modelopt-svdquant",
            "modelopt: SVDQuant with our rank, static ranges",
            lambda model: {
                "method": "svdquant",
                "lowrank": QuantizationSettings().rank_for(model.config),
            },
            activations=INT8_STATIC,
            bits_per_weight=None,
        ),
        _row("modelopt-gptq", "**modelopt: GPTQ**", gptq),
        _row(
            "modelopt-gptq-layerwise",
            "modelopt: GPTQ, layer by layer",
            gptq | {"layerwise": {"enable": True}},
        ),
        _row(
            "modelopt-w8a8-smoothquant",
            "modelopt: SmoothQuant, 8-bit weights, static ranges",
            {"method": "smoothquant"},
            weights=INT8_ROWS,
            activations=INT8_STATIC,
            bits_per_weight=8.0,
        ),
    )


def _row(
    key: str,
    label: str,
    algorithm: dict[str, Any] | Callable[[DiT], dict[str, Any]],
    *,
    weights: dict[str, Any] = INT4_BLOCKS,
    activations: dict[str, Any] = INT8_TOKENS,
    bits_per_weight: float | None = BITS_PER_WEIGHT,
) -> Row:
    """Return a row of one of modelopt's algorithms."""

    def build(model: DiT, states: CalibrationStates) -> Candidate:
        chosen = algorithm(model) if callable(algorithm) else algorithm
        config = {"quant_cfg": quantizers(weights, activations), "algorithm": chosen}
        return Candidate(model=quantize(model, states, config), bits_per_weight=bits_per_weight)

    return Row(key=key, label=label, build=build)


def quantizers(weights: dict[str, Any], activations: dict[str, Any]) -> list[dict[str, Any]]:
    """Return modelopt's list of quantizers: the linears that we quantize, nothing else."""
    chosen: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for kind in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        chosen.append({"quantizer_name": f"*{kind}.weight_quantizer", "cfg": weights})
        chosen.append({"quantizer_name": f"*{kind}.input_quantizer", "cfg": activations})
    return chosen


def quantize(model: DiT, states: CalibrationStates, config: dict[str, Any]) -> DiT:
    """Return a copy of the model, fake-quantized by modelopt on the states of our walk."""
    import modelopt.torch.quantization as mtq

    count = QuantizationSettings().walked_states(states.settings, model.config)
    inputs = walk_states(states, count=count)

    def forward_loop(quantized: DiT) -> None:
        for rows in row_batches(len(inputs.timesteps)):
            quantized(**inputs.rows(rows))

    report = io.StringIO()  # it reports on stdout, where the table goes
    with contextlib.redirect_stdout(report):
        quantized: DiT = mtq.quantize(copy.deepcopy(model), config, forward_loop)
    for line in report.getvalue().splitlines():
        if "warning" in line.lower():
            print(line, file=sys.stderr)
    return quantized


def require_modelopt() -> None:
    """Refuse to start without modelopt; teach it what the layers of a DiT are.

    Raises:
        CalibrationError: it is not installed, or another version than the one this was written for.
    """
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise CalibrationError(
            f"{PACKAGE} is not installed; run pip install 'ditas-export[modelopt]', best in an "
            f"environment of its own"
        ) from None
    if not version.startswith(f"{TESTED_VERSION}."):
        raise CalibrationError(
            f"{PACKAGE} {version} is installed; this comparison is written for {TESTED_VERSION}: "
            f"pip install '{PACKAGE}=={TESTED_VERSION}.*'"
        )
    from modelopt.torch.quantization.utils.layerwise_calib import LayerActivationCollector

    LayerActivationCollector.register_decoder_layer_support(
        lambda model: isinstance(model, DiT), lambda model: model.blocks
    )


def main() -> None:
    """Compare with modelopt."""
    args = common_options(str(__doc__).partition("\n")[0]).parse_args()
    with clean_errors():
        require_modelopt()
        ours = tuple(row for row in all_rows() if row.key in OURS)
        run(args, (*modelopt_rows(), *ours), PACKAGE)


if __name__ == "__main__":
    main()
