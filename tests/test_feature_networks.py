"""The networks whose features judge images: the bundled digit classifier, Inception's loading."""

from __future__ import annotations

import importlib.resources
import pickle
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from npz_fixture import images
from torch import Tensor, nn

from ditas_export.errors import CheckpointError, EvaluationError
from ditas_export.evaluation import inception_features
from ditas_export.evaluation.digit_features import FILE, DigitFeatures, load_digit_classifier
from ditas_export.evaluation.extractors import open_extractor
from ditas_export.evaluation.inception_features import WEIGHTS, InceptionFeatures, weights_path
from ditas_export.generation.pixels import to_pixels

ROOT = Path(__file__).parents[1]

# Digits -------------------------------------------------------------------------------------------


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from train_digits import digit_images

    _, _, pictures, labels = digit_images()
    return pictures, labels


def test_the_classifier_reads_digits_that_it_never_saw(held_out: tuple[Tensor, Tensor]) -> None:
    pictures, labels = held_out
    predicted = load_digit_classifier()(pictures).argmax(1)
    # The support-vector machine of evaluate_digits.py is right on 99.5 %.
    assert (predicted == labels).float().mean() > 0.98


def test_its_features_are_those_before_the_logits(held_out: tuple[Tensor, Tensor]) -> None:
    """Of pixels, which are rounded to 1/127.5 and cost no more than that."""
    pictures, _ = held_out
    model = load_digit_classifier()
    pixels = torch.from_numpy(to_pixels(pictures)).permute(0, 3, 1, 2)
    pooled, spatial = DigitFeatures()(pixels)
    assert spatial is None
    assert pooled.shape == (397, 64)
    torch.testing.assert_close(model.head(model.features(pictures)), model(pictures))
    torch.testing.assert_close(pooled, model.features(pictures), atol=0.02, rtol=0.02)


def test_it_is_small() -> None:
    file = importlib.resources.files("ditas_export.evaluation") / "bundled" / FILE
    assert len(file.read_bytes()) < 0.3 * 2**20


# Inception ----------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """As torch-fidelity's class is made and called; its features are sums of channels."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str
    ) -> None:
        super().__init__()
        assert (name, features_list) == ("inception-v3-compat", ["2048"])
        self.Mixed_6d = nn.Module()
        self.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, kernel_size=1)
        # As there: whatever the file holds is unpickled.
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8
        assert x.shape[1] == 3
        self.Mixed_6d.branch1x1(x.float())
        return (x.float().sum((2, 3)),)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Install the stand-in, with weights in PyTorch's folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    package, module = ModuleType("torch_fidelity"), ModuleType("network")
    package.__spec__ = ModuleSpec("torch_fidelity", None)
    module.FeatureExtractorInceptionV3 = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    name = "torch_fidelity.feature_extractor_inceptionv3"
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(inception_features.importlib.metadata, "version", lambda _: "0.4.0")
    network = StandIn.__new__(StandIn)
    nn.Module.__init__(network)
    network.Mixed_6d = nn.Module()
    network.Mixed_6d.branch1x1 = nn.Conv2d(3, 9, kernel_size=1)
    weights_path().parent.mkdir(parents=True)
    torch.save(network.state_dict(), weights_path())
    return network


@pytest.mark.parametrize("channels", [1, 3])
def test_inceptions_features(stand_in: StandIn, channels: int) -> None:
    """Spatial ones are the first seven channels, channels last."""
    extractor = open_extractor("inception", device="cpu")
    assert extractor.description == "Inception of torch-fidelity 0.4.0, 2048 features"
    pictures = images(5, channels=channels)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    pooled, spatial = extractor(pixels)
    assert spatial is not None
    rgb = np.broadcast_to(pictures, (5, 16, 16, 3)).astype(np.float64)
    np.testing.assert_allclose(pooled, rgb.sum((1, 2)))
    layer = stand_in.Mixed_6d.branch1x1
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    wanted = rgb @ weight[:7, :, 0, 0].T + bias[:7]  # (5, 16, 16, 7)
    np.testing.assert_allclose(spatial.detach(), wanted.reshape(5, -1), rtol=1e-4, atol=1e-3)


class Runs:
    """A pickle that leaves a trace."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_weights_that_are_not_at_hand(stand_in: StandIn) -> None:
    weights_path().unlink()
    with pytest.raises(EvaluationError, match=f"put torch-fidelity's {WEIGHTS} into /"):
        InceptionFeatures()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(pickle.dumps(Runs())), "asks to run code"),
        (lambda path: torch.save({"a": Runs()}, path), "holds no Inception"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "holds no Inception"),
    ],
)
def test_weights_that_are_none(
    stand_in: StandIn, content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of them is run, though torch-fidelity itself would."""
    monkeypatch.chdir(tmp_path)
    content(weights_path())
    with pytest.raises((CheckpointError, EvaluationError), match=message):
        InceptionFeatures()
    assert not (tmp_path / "ran").exists()
