"""VAE decoding in PyTorch: against diffusers itself, batch mates, every refusal."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_vae
from torch import Tensor

from ditas_export.dit.model import DiTConfig
from ditas_export.errors import CheckpointError, OnnxExportError, RunnerError
from ditas_export.runtime.onnxruntime_runner import CPU, CUDA
from ditas_export.vae import decoder as decoder_module
from ditas_export.vae.decoder import (
    Decoder,
    OnnxVaeDecoder,
    VaeDecoder,
    open_decoder,
)
from ditas_export.vae.export import export_vae_decoder

WEIGHTS = "diffusion_pytorch_model.safetensors"


STATISTICS = {"latents_mean": (-1.6, 1.1, 2.5, 0.4), "latents_std": (8.4, 5.9, 0.5, 1.2)}


def some_latents(*, count: int = 3, channels: int = 4, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, 6, 5, generator=generator)


def decoded_by_diffusers(vae: Any, latents: Tensor) -> Tensor:
    """What diffusers' own pipelines compute of the sampler's latents, image by image.

    With statistics of the latents, that of Stable Diffusion XL.
    """
    config = vae.config
    if config.latents_mean is None:
        z = latents / config.scaling_factor + (config.shift_factor or 0.0)
    else:
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        z = latents * std / config.scaling_factor + mean
    return torch.cat([vae.decode(image[None]).sample for image in z]).clamp(-1, 1)


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_pixels_are_those_of_diffusers(vae_folder: Path) -> None:
    latents = some_latents()
    decoder: Decoder = VaeDecoder(str(vae_folder))
    with decoder:
        images = decoder(latents)
    expected = decoded_by_diffusers(random_vae(), latents)
    assert images.shape == (3, 3, 24, 20)
    assert images.dtype == torch.float32
    # The same operations in the same order.
    assert torch.equal(images, expected)
    assert float(images.std()) > 0.05, "a flat image would agree with anything"
    assert (decoder.in_channels, decoder.scale) == (4, 4)


def test_another_vae_has_another_hash(vae_folder: Path, tmp_path: Path) -> None:
    """Under the same name too: images that are there were decoded with other weights."""
    other = tmp_path / "other"
    random_vae(seed=1).save_pretrained(other)
    with VaeDecoder(str(vae_folder)) as decoder, VaeDecoder(str(other)) as another:
        assert len({decoder.sha256, another.sha256}) == 2
    files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for folder, file in zip((vae_folder, other), files, strict=True):
        export_vae_decoder(str(folder), file)
    hashes = set()
    for file in files:
        with OnnxVaeDecoder(file) as decoder:
            hashes.add(decoder.sha256)
    assert len(hashes) == 2


def test_pixels_are_clamped(vae_folder: Path) -> None:
    with VaeDecoder(str(vae_folder)) as decoder:
        images = decoder(300 * some_latents())
    assert (float(images.amin()), float(images.amax())) == (-1.0, 1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling_factor": 0.5},
        {"shift_factor": 0.7},
        STATISTICS | {"scaling_factor": 0.5},
        {"use_post_quant_conv": False},
        {"latent_channels": 8},
    ],
    ids=str,
)
def test_the_config_of_the_vae_counts(tmp_path: Path, changes: dict[str, Any]) -> None:
    vae = random_vae(**changes)
    vae.save_pretrained(tmp_path)
    latents = some_latents(channels=vae.config.latent_channels)
    with VaeDecoder(str(tmp_path)) as decoder:
        assert torch.equal(decoder(latents), decoded_by_diffusers(vae, latents))


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_an_image_does_not_depend_on_its_batch_mates(
    vae_folder: Path, tmp_path: Path, backend: str
) -> None:
    source = str(vae_folder)
    if backend == "onnx":
        export_vae_decoder(source, tmp_path / "vae_decoder.ONNX")  # suffixes count in any case
        source = str(tmp_path / "vae_decoder.ONNX")
    latents = some_latents(count=5)
    decoder = open_decoder(source, config=DiTConfig(), device="cpu")
    assert decoder is not None
    with decoder:
        together = decoder(latents)
        alone = torch.cat([decoder(image[None]) for image in latents])
    assert torch.equal(together, alone)


def test_the_parts_of_a_pipeline_and_half_precision(vae_folder: Path, tmp_path: Path) -> None:
    latents = some_latents()
    copy_of(vae_folder, tmp_path / "pipeline" / "vae")
    with VaeDecoder(str(tmp_path / "pipeline")) as decoder, VaeDecoder(str(vae_folder)) as plain:
        expected = plain(latents)
        assert torch.equal(decoder(latents), expected)
    random_vae().half().save_pretrained(tmp_path / "half", variant="fp16")
    random_vae().save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with VaeDecoder(str(tmp_path / "half")) as half, VaeDecoder(str(tmp_path / "pickle")) as other:
        assert torch.equal(other(latents), expected)
        # Weights rounded to float16, the arithmetic in float32.
        assert 0 < float((half(latents) - expected).norm() / expected.norm()) < 3e-3


def test_open_decoder_picks_by_name(vae_folder: Path) -> None:
    assert open_decoder(None, config=DiTConfig(), device="cpu") is None
    assert open_decoder("none", config=DiTConfig(in_channels=1), device="cpu") is None
    decoder = open_decoder(str(vae_folder), config=DiTConfig(), device="cpu")
    assert isinstance(decoder, VaeDecoder)
    assert f"{vae_folder} (AutoencoderKL, PyTorch {torch.__version__}" in decoder.description


def test_a_vae_of_other_latents_is_refused(vae_folder: Path) -> None:
    message = rf"the model makes 8-channel latents, the VAE {vae_folder} takes 4; pass the VAE"
    with pytest.raises(RunnerError, match=message):
        open_decoder(str(vae_folder), config=DiTConfig(in_channels=8), device="cpu")


def test_latents_that_do_not_fit_are_named(vae_folder: Path) -> None:
    decoder = VaeDecoder(str(vae_folder))
    with decoder:
        for odd in (torch.zeros(1, 3, 8, 8), torch.zeros(4, 8, 8), torch.zeros(0, 4, 8, 8)):
            with pytest.raises(RunnerError, match=r"latents are .* takes \(N, 4, h, w\)"):
                decoder(odd)
    with pytest.raises(RunnerError, match="closed"):
        decoder(some_latents())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match="sees no CUDA GPU; use --device cpu"):
        VaeDecoder(str(vae_folder), "cuda")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"no/such/folder: no such folder; expected a VAE's"):
        VaeDecoder("no/such/folder")
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(RunnerError, match="no such folder"):
        VaeDecoder(str(tmp_path / "file.safetensors"))


def test_folders_that_hold_no_vae(vae_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunnerError, match=r"is no VAE folder: it has no config\.json"):
        VaeDecoder(str(tmp_path))
    other = copy_of(vae_folder, tmp_path / "other")
    edit_config(other, _class_name="AutoencoderTiny")
    with pytest.raises(RunnerError, match="describes a AutoencoderTiny, expected AutoencoderKL"):
        VaeDecoder(str(other))
    (other / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        VaeDecoder(str(other))


def test_weights_that_are_not_whole(vae_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(vae_folder, tmp_path / "vae")
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(RunnerError, match=r"cannot be loaded: .*; get it again"):
        VaeDecoder(str(folder))
    del tensors["decoder.conv_in.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(RunnerError, match=r"does not fit its config.json \(decoder.conv_in.weight"):
        VaeDecoder(str(folder))
    (folder / WEIGHTS).unlink()
    with pytest.raises(RunnerError, match="json but none of diffusion_pytorch_model"):
        VaeDecoder(str(folder))


def test_weights_of_another_shape(vae_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(vae_folder, tmp_path / "vae")
    edit_config(folder, latent_channels=8)
    with pytest.raises(RunnerError, match="cannot be loaded"):
        VaeDecoder(str(folder))


def test_a_vae_of_grey_images_is_refused(tmp_path: Path) -> None:
    random_vae(out_channels=1).save_pretrained(tmp_path)
    with pytest.raises(RunnerError, match=r"makes images of 1 channels; expected 3 \(RGB\)"):
        VaeDecoder(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents_mean": (0.1,) * 4}, r"has \{'latents_mean': 4\} values; expected 4 of"),
        (
            STATISTICS | {"latents_std": (1.0,) * 3},
            r"\{'latents_mean': 4, 'latents_std': 3\} values; expected 4 of latents_mean and "
            r"latents_std each, or neither",
        ),
        (STATISTICS | {"shift_factor": 0.7}, "has both latents_mean and shift_factor; expected"),
    ],
    ids=["no std", "too few", "shifted twice"],
)
def test_scaling_that_no_pipeline_knows_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    random_vae(**changes).save_pretrained(tmp_path)
    with pytest.raises(RunnerError, match=message):
        VaeDecoder(str(tmp_path))


@pytest.mark.parametrize("place", ["", "vae"], ids=["model", "pipeline"])
@pytest.mark.parametrize(("safe", "downloads"), [(True, 1), (False, 2)], ids=["safe", "bin"])
def test_a_hub_id_fetches_the_vae_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, safe: bool, downloads: int
) -> None:
    from fnmatch import fnmatch

    repository, cache, asked = tmp_path / "repository", tmp_path / "cache", []
    random_vae().save_pretrained(repository / place, safe_serialization=safe)
    (repository / "transformer").mkdir()
    (repository / "transformer" / WEIGHTS).write_bytes(b"large")

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        assert repo_id == "someone/a-vae"
        asked.append(allow_patterns)
        for file in repository.rglob("*"):
            name = str(file.relative_to(repository))
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    latents = some_latents()
    with VaeDecoder("someone/a-vae") as decoder:
        assert torch.equal(decoder(latents), decoded_by_diffusers(random_vae(), latents))
    assert len(asked) == downloads
    assert not (cache / "transformer").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repo_id: str, **_: Any) -> str:
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(RunnerError) as caught:
        VaeDecoder("stabilityai/sd-vae-ft-ema")
    assert str(caught.value) == (
        "stabilityai/sd-vae-ft-ema is no folder here and could not be had from the hub (Name or "
        "service not known); check the name and the network, or download it and pass the folder"
    )


def test_a_file_that_holds_no_vae(tmp_path: Path) -> None:
    with pytest.raises(OnnxExportError, match="no readable ONNX file"):
        OnnxVaeDecoder(tmp_path / "absent.onnx")


@pytest.mark.parametrize(
    ("device", "threads", "expected"),
    [
        ("cpu", None, (CPU, 0, 0)),
        ("cpu", 3, (CPU, 0, 3)),
        ("cuda", None, (CUDA, 0, 0)),
        ("cuda:3", 2, (CUDA, 3, 2)),
    ],
)
def test_a_file_is_decoded_on_the_device_and_the_threads_that_were_asked_for(
    vae_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    threads: int | None,
    expected: tuple[Any, ...],
) -> None:
    """Ranks on one machine have a GPU each, or a share of its cores."""
    path, opened = tmp_path / "vae_decoder.onnx", []
    shutil.copy(vae_file(vae_folder), path)
    open_session = decoder_module.open_session

    def watched(path: Path, options: Any, providers: Any, device_id: int = 0, **rest: Any) -> Any:
        opened.append((providers, device_id, options.intra_op_num_threads))
        return open_session(path, options, CPU, **rest)  # this machine may have no GPU

    monkeypatch.setattr(decoder_module, "open_session", watched)
    with OnnxVaeDecoder(path, device, threads=threads):
        assert opened == [expected]


def test_a_device_that_nothing_has_is_refused(vae_folder: Path) -> None:
    with pytest.raises(RunnerError, match="device='tpu'; choose cpu, cuda or cuda:N"):
        OnnxVaeDecoder(vae_file(vae_folder), "tpu")


@functools.cache
def vae_file(vae_folder: Path) -> Path:
    path = vae_folder.with_name("vae_file.onnx")
    export_vae_decoder(str(vae_folder), path)
    return path
