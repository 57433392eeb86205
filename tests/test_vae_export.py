"""The VAE's decoder as ONNX: against PyTorch, its form, its bytes; `ditas-export --vae`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import random_vae
from quantized_fixture import exported, save_checkpoint
from torch import Tensor
from typer.testing import CliRunner

from ditas_export.artifact_files import sha256_of_file
from ditas_export.cli.export import app
from ditas_export.dit.model import DiT, DiTConfig, randomize
from ditas_export.errors import ArtifactError, OnnxExportError, RunnerError
from ditas_export.process import VaeFactors
from ditas_export.vae.decoder import OnnxVaeDecoder, VaeDecoder, open_decoder
from ditas_export.vae.export import export_vae_decoder
from ditas_export.vae.shape import VaeShape, read_vae_shape

QUICK = ["--steps", "2", "--samples", "1", "--method", "linear", "--quiet"]


@pytest.fixture(scope="module")
def vae_file(vae_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "vae_decoder.onnx"
    export_vae_decoder(str(vae_folder), path)
    return path


def some_latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run_file(path: Path, latents: Tensor) -> Tensor:
    """Run a file without this package."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (images,) = session.run(["images"], {"latents": latents.numpy()})
    return torch.from_numpy(np.asarray(images))


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 4, 8, 8), (3, 4, 5, 12)], ids=str)
def test_the_file_computes_what_the_vae_computes(vae_file: Path, shape: tuple[int, ...]) -> None:
    vae, latents = random_vae(), some_latents(*shape)
    expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    # float32 sums in another order.
    assert relative_error(run_file(vae_file, latents), expected) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling_factor": 0.5, "shift_factor": 0.7, "use_post_quant_conv": False},
        {"mid_block_add_attention": False, "latent_channels": 8},
        {"latents_mean": (-1.6, 1.1, 2.5, 0.4), "latents_std": (8.4, 5.9, 0.5, 1.2)},
    ],
    ids=str,
)
def test_the_config_of_the_vae_counts(tmp_path: Path, changes: dict[str, Any]) -> None:
    random_vae(**changes).save_pretrained(tmp_path)
    path = tmp_path / "vae_decoder.onnx"
    export_vae_decoder(str(tmp_path), path)
    latents = some_latents(2, changes.get("latent_channels", 4), 8, 8)
    with OnnxVaeDecoder(path) as decoder, VaeDecoder(str(tmp_path)) as in_torch:
        assert relative_error(decoder(latents), in_torch(latents)) < 1e-5
    factors = VaeFactors(
        scaling_factor=changes.get("scaling_factor", 0.18215),
        shift_factor=changes.get("shift_factor", 0.0),
    )
    expected = VaeShape(in_channels=latents.shape[1], scale=4, factors=factors)
    assert read_vae_shape(path) == expected


def test_the_form_of_the_file(vae_file: Path) -> None:
    model = onnx.load(str(vae_file))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["latents"] == ["N", 4, "h", "w"]
    assert shapes["images"][:2] == ["N", 3]
    assert (model.producer_name, model.ir_version) == ("ditas-export", 10)
    encoder = [tensor.name for tensor in model.graph.initializer if "encoder" in tensor.name]
    assert encoder == []


def test_the_same_vae_gives_the_same_bytes(
    vae_file: Path, vae_folder: Path, tmp_path: Path
) -> None:
    export_vae_decoder(str(vae_folder), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == vae_file.read_bytes()


def test_past_2_gb_the_tensors_lie_beside_the_file(
    vae_file: Path, vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ditas_export.onnx_export.export.LARGEST_INLINE_BYTES", 1)
    export_vae_decoder(str(vae_folder), tmp_path / "large.onnx")
    names = " ".join(sorted(path.name for path in tmp_path.iterdir()))
    assert re.fullmatch(r"large\.onnx large\.onnx\.[0-9a-f]{16}\.data", names)
    latents = some_latents(1, 4, 8, 8)
    assert torch.equal(run_file(tmp_path / "large.onnx", latents), run_file(vae_file, latents))


def test_the_decoder_of_a_file(vae_file: Path) -> None:
    decoder = open_decoder(str(vae_file), config=DiTConfig(), device="cpu")
    assert isinstance(decoder, OnnxVaeDecoder)
    with decoder:
        assert (decoder.in_channels, decoder.scale) == (4, 4)
        assert decoder.description == f"{vae_file} (onnxruntime, CPUExecutionProvider)"
        assert decoder(some_latents(2, 4, 8, 8)).shape == (2, 3, 32, 32)
    with pytest.raises(RunnerError, match="closed"):
        decoder(some_latents(1, 4, 8, 8))
    with pytest.raises(RunnerError, match=rf"makes 3-channel latents, the VAE {vae_file} takes 4"):
        open_decoder(str(vae_file), config=DiTConfig(in_channels=3), device="cpu")


def test_a_dit_is_no_vae() -> None:
    with pytest.raises(OnnxExportError, match=r"has no metadata entry ditas_export\.vae"):
        OnnxVaeDecoder(exported())


def test_a_file_that_cannot_be_written(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist; create it first"):
        export_vae_decoder(str(vae_folder), tmp_path / "no" / "vae_decoder.onnx")


# --- ditas-export --vae -------------------------------------------------------------------------


def write_checkpoint(folder: Path, *, in_channels: int) -> Path:
    model = DiT(
        DiTConfig(
            input_size=8,
            in_channels=in_channels,
            hidden_size=48,
            depth=1,
            num_heads=2,
            num_classes=3,
        )
    )
    randomize(model, seed=0)
    path = folder / "tiny.safetensors"
    save_checkpoint(path, model)
    return path


def run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_writes_the_decoder_beside_the_model(
    vae_file: Path, vae_folder: Path, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path, in_channels=4)
    output = tmp_path / "out.onnx"
    code, out, err = run(
        "--model", checkpoint, *QUICK[:-1], "--vae", vae_folder, output
    )  # fmt: skip
    assert code == 0, err
    written = tmp_path / "vae_decoder.onnx"
    assert written.read_bytes() == vae_file.read_bytes()
    assert json.loads((tmp_path / "out.json").read_text())["vae_decoder"] == {
        "name": "vae_decoder.onnx",
        "sha256": sha256_of_file(written),
        "source": str(vae_folder),
    }
    assert "VAE decoder" in out


def test_without_the_option_there_is_none(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, in_channels=4)
    code, _, err = run("--model", checkpoint, *QUICK, tmp_path / "out.onnx")
    assert code == 0, err
    assert not (tmp_path / "vae_decoder.onnx").exists()
    assert json.loads((tmp_path / "out.json").read_text())["vae_decoder"] is None


def test_a_vae_that_does_not_fit_fails_before_the_work(vae_folder: Path, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, in_channels=3)
    arguments = ["--model", checkpoint, *QUICK]
    cases = {
        str(vae_folder): "the model makes 3-channel latents, the VAE",
        str(tmp_path / "absent"): "no such folder",
    }
    for vae, message in cases.items():
        code, _, err = run(*arguments, "--vae", vae, tmp_path / "out.onnx")
        assert code == 2
        assert message in " ".join(err.split())
    code, _, err = run(*arguments, "--vae", vae_folder, tmp_path / "vae_decoder.onnx")
    assert code == 2
    assert "two outputs have one name" in " ".join(err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]
