"""Inception's features by torch-fidelity, the network that published figures are of.

Neither the package (extra `[fid]`) nor its weights come with ditas-export, and nothing is
downloaded: what is not at hand is said in one line. Spatial features are those of ADM's evaluator:
the first seven channels of `mixed_6/conv`, which torch-fidelity calls `Mixed_6d.branch1x1`.
Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, weights of 2015-12-05.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditas_export.dit.tensor_files import read_tensor_file
from ditas_export.errors import EvaluationError
from ditas_export.temporary_files import temporary_folder

PACKAGE = "torch_fidelity"

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
"""The weights' file, as torch-fidelity's release names it."""

SPATIAL_CHANNELS = 7

_POOLED = "2048"
"""torch-fidelity's name of the pooled features."""

_ROOM = 2**28
"""Bytes of the weights, with room to spare."""


def weights_path() -> Path:
    """Return where torch-fidelity's weights are kept once it has downloaded them."""
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS


def why_absent() -> str | None:
    """Return in one line what is missing, and how to get it; None where all is at hand."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "Inception's features need torch-fidelity: pip install 'ditas-export[fid]'"
    if not weights_path().is_file():
        return (
            f"Inception's weights are not at hand: put torch-fidelity's {WEIGHTS} into "
            f"{weights_path().parent}"
        )
    return None


class InceptionFeatures:
    """torch-fidelity's Inception as an extractor: 2048 pooled, 7 · 17 · 17 spatial features."""

    def __init__(self, *, device: str = "cpu") -> None:
        if (reason := why_absent()) is not None:
            raise EvaluationError(reason)
        self._network = _load_network().to(device)
        self._spatial: Tensor | None = None
        self._network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @property
    def description(self) -> str:
        """What it is, in one line."""
        version = importlib.metadata.version("torch-fidelity")
        return f"Inception of torch-fidelity {version}, 2048 features"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, 2048) and (N, 2023) features of (N, 1 or 3, H, W) uint8 images."""
        (pooled,) = self._network(images.expand(-1, 3, -1, -1))
        assert self._spatial is not None
        # Channels last, as the moments in ADM's reference files are.
        spatial = self._spatial[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return pooled, spatial

    def _keep(self, _module: object, _inputs: object, output: Tensor) -> None:
        """Keep what the hooked layer put out."""
        self._spatial = output


def _load_network() -> Any:
    """Return the network; torch-fidelity unpickles what it is given, so it gets a file of ours.

    Raises:
        CheckpointError: the weights' file is damaged.
        EvaluationError: it holds other tensors.
    """
    path = weights_path()
    content = read_tensor_file(path).content
    state = {name: each for name, each in content.items() if isinstance(each, Tensor)}
    module = importlib.import_module(f"{PACKAGE}.feature_extractor_inceptionv3")
    with temporary_folder(room=_ROOM) as folder:
        torch.save(state, folder / WEIGHTS)
        try:
            return module.FeatureExtractorInceptionV3(
                "inception-v3-compat",
                [_POOLED],
                feature_extractor_weights_path=str(folder / WEIGHTS),
            )
        except RuntimeError as error:
            raise EvaluationError(f"{path} holds no Inception: {error}") from error
