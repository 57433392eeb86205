"""FID, KID, precision, recall, PSNR and SSIM against transcriptions and torchmetrics."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from reference import published_figures as published
from torch import Tensor, nn

from ditas_export.evaluation import kernel_distance as kernels
from ditas_export.evaluation import row_blocks
from ditas_export.evaluation.bootstrap import Figure, resample_counts
from ditas_export.evaluation.gaussians import Moments, frechet_distance
from ditas_export.evaluation.image_pairs import psnr_db, squared_errors, structural_similarities
from ditas_export.evaluation.kernel_distance import kernel_distances
from ditas_export.evaluation.manifolds import memberships, squared_distances

RELATIVE = 1e-9
"""Float64 on both sides, sums of some thousand terms; the square root of a matrix loses more."""


def rows(count: int, width: int, seed: int, *, spread: float = 1.0, shift: float = 0.0) -> Tensor:
    """Correlated features, above zero as those after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    values = torch.randn(count, width, generator=generator) @ mixing * spread + shift
    return values.clamp(min=-0.3).double()


def ones(count: int) -> Tensor:
    return torch.ones(1, count, dtype=torch.float64)


# Fréchet distance ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(300, 250), (40, 500)])
def test_frechet_distance_is_the_published_one(first: int, second: int) -> None:
    x, y = rows(first, 24, 0), rows(second, 24, 1, spread=1.3, shift=0.2)
    found = frechet_distance(Moments.of(x), Moments.of(y))
    assert found == pytest.approx(published.frechet(x.numpy(), y.numpy()), rel=1e-7)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    """Of singular covariances; by N × D factors, with XᵢᵀXᵢ / (Nᵢ − 1) = Σᵢ, as an oracle."""
    x, y = rows(9, 64, 0), rows(12, 64, 1)
    cx, cy = x - x.mean(0), y - y.mean(0)
    traces = (cx**2).sum() / 8 + (cy**2).sum() / 11
    shared = np.linalg.norm((cx @ cy.T).numpy(), "nuc") / math.sqrt(8 * 11)
    wanted = float(((x.mean(0) - y.mean(0)) ** 2).sum() + traces) - 2 * shared
    found = frechet_distance(Moments.of(x), Moments.of(y))
    assert found == pytest.approx(wanted, rel=1e-6)  # 55 roots of eigenvalues that should be 0
    assert frechet_distance(Moments.of(x), Moments.of(x)) == pytest.approx(0, abs=1e-6)


def test_moments_of_counts_are_those_of_repeated_rows() -> None:
    x = rows(30, 8, 0)
    counts = resample_counts(30, resamples=1, generator=torch.Generator().manual_seed(5))[1]
    drawn = x.repeat_interleave(counts.long(), dim=0)
    assert len(drawn) == 30
    assert counts.max() > 1
    found, wanted = Moments.of(x, counts), Moments.of(drawn)
    torch.testing.assert_close(found.mean, wanted.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.covariance, wanted.covariance, rtol=1e-12, atol=1e-14)


# Kernel distance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**25, 100])
def test_kernel_distance_is_the_published_one(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "LARGEST_BLOCK", block)
    x, y = rows(23, 10, 0), rows(31, 10, 1, shift=0.3)
    (found,) = kernel_distances(x, y, ones(23), ones(31)).tolist()
    assert found == pytest.approx(published.kernel_distance(x.numpy(), y.numpy()), rel=RELATIVE)


def test_kernel_distances_of_resamples_are_those_of_repeated_rows() -> None:
    x, y = rows(23, 10, 0), rows(31, 10, 1, shift=0.3)
    generator = torch.Generator().manual_seed(0)
    x_counts = resample_counts(23, resamples=3, generator=generator)
    y_counts = resample_counts(31, resamples=3, generator=generator)
    found = kernel_distances(x, y, x_counts, y_counts)
    for value, mine, theirs in zip(found.tolist(), x_counts, y_counts, strict=True):
        drawn_x = x.repeat_interleave(mine.long(), dim=0).numpy()
        drawn_y = y.repeat_interleave(theirs.long(), dim=0).numpy()
        assert value == pytest.approx(published.kernel_distance(drawn_x, drawn_y), rel=1e-8)


def test_the_kernel_is_cubic() -> None:
    x, y = rows(3, 10, 0), rows(4, 10, 1)
    wanted = [[published.kernel(a, b) for b in y.numpy()] for a in x.numpy()]
    np.testing.assert_allclose(kernels.polynomial_kernel(x, y).numpy(), wanted, rtol=1e-12)


# Precision and recall -----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [2**25, 100])
def test_precision_and_recall_are_adms(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "LARGEST_BLOCK", block)
    samples, reference = rows(60, 6, 0), rows(45, 6, 1, spread=0.8, shift=0.6)
    found = memberships(samples, reference)
    wanted = published.precision_recall(reference.numpy(), samples.numpy())
    assert 0 < wanted[0] < 1  # the test tells something
    assert 0 < wanted[1] < 1
    precision, recall = (each.double().mean().item() for each in (found.samples, found.reference))
    assert (precision, recall) == pytest.approx(wanted, rel=1e-12)


def test_equal_rows_are_at_no_distance_at_all() -> None:
    """Sums in two orders differ in their last digits, of which a ball of radius 0 would know."""
    x = rows(40, 300, 0) * 100
    y = torch.cat([x[7:], x[:7] + 1e-3])
    found = squared_distances(x, y)
    equal = (x[:, None] == y).all(2)
    assert equal.sum() == 33
    assert (found[equal] == 0).all()
    direct = (x[:, None] - y).square().sum(2)
    torch.testing.assert_close(found, direct, rtol=1e-5, atol=0)  # the smallest is 3e-4 of 3e6
    plain = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    assert (plain[equal] != 0).any()  # the test tells something


def test_images_that_are_there_many_times() -> None:
    """Balls of radius 0 hold what lies at their centre, whatever rounding leaves of distances."""
    x = rows(5, 300, 0).repeat_interleave(6, dim=0) * 100
    found = memberships(x, x.flip(0))
    assert found.samples.all()
    assert found.reference.all()
    apart = memberships(x, x + 1e-3)
    assert not apart.samples.any()
    assert not apart.reference.any()


# Pairs --------------------------------------------------------------------------------------------


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (3, 2, 19, 15), generator=generator)
    y = (x + torch.randint(-40, 41, x.shape, generator=generator)).clamp(0, 255)
    return x.to(torch.uint8), y.to(torch.uint8)


def test_ssim_is_the_published_one() -> None:
    x, y = pair()
    wanted = [
        np.mean([published.ssim(a, b) for a, b in zip(one.numpy(), other.numpy(), strict=True)])
        for one, other in zip(x, y, strict=True)
    ]
    np.testing.assert_allclose(structural_similarities(x, y).numpy(), wanted, rtol=1e-10)
    assert structural_similarities(x, x).tolist() == [1.0] * 3


def test_psnr_of_known_errors() -> None:
    x = torch.full((2, 1, 4, 4), 100, dtype=torch.uint8)
    y = x.clone()
    y[0] += 5
    y[1, 0, 0, 0] = 84  # below x: unsigned differences would wrap
    assert squared_errors(x, y).tolist() == [25.0, 16.0]
    assert psnr_db(25.0) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr_db(0.0) == math.inf


# torchmetrics -------------------------------------------------------------------------------------


class Identity(nn.Module):
    """What torchmetrics takes for a network; what it is fed are features."""

    num_features = 24

    def forward(self, features: Tensor) -> Tensor:
        return features


def test_fid_and_kid_are_torchmetrics() -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = rows(300, 24, 0), rows(300, 24, 1, spread=1.2, shift=0.1)
    fid = FrechetInceptionDistance(feature=Identity())
    fid.set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it keeps what it is fed
        kid = KernelInceptionDistance(feature=Identity(), subsets=1, subset_size=300)
    metrics: list[Any] = [fid, kid]
    for metric in metrics:
        metric.update(x, real=False)
        metric.update(y, real=True)
    found = frechet_distance(Moments.of(x), Moments.of(y))
    assert found == pytest.approx(fid.compute().item(), rel=1e-6)
    (distance,) = kernel_distances(x, y, ones(300), ones(300)).tolist()
    assert distance == pytest.approx(kid.compute()[0].item(), rel=1e-6)


def test_ssim_and_psnr_are_torchmetrics() -> None:
    """Its own mean is over windows that reach beyond the image too; those that do not are ours."""
    pytest.importorskip("torchmetrics")
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    x, y = (each.double() for each in pair())
    _, whole = structural_similarity_index_measure(
        x, y, data_range=255.0, reduction="none", return_full_image=True
    )
    wanted = whole[..., 5:-5, 5:-5].mean((1, 2, 3))
    torch.testing.assert_close(structural_similarities(x, y), wanted, rtol=1e-10, atol=0)
    decibels = psnr_db(squared_errors(x, y).mean().item())
    assert decibels == pytest.approx(peak_signal_noise_ratio(x, y, data_range=255.0).item())


# Intervals ----------------------------------------------------------------------------------------


def test_an_interval_is_as_wide_as_the_figure_varies() -> None:
    """Over sets drawn anew from the distribution itself; a spread of 100 is known to 7 %."""
    drawn, found = [], []
    for seed in range(100):
        x, y = rows(200, 4, seed), rows(200, 4, 1000 + seed, shift=0.3)
        drawn.append(frechet_distance(Moments.of(x), Moments.of(y)))
        if seed < 10:
            counts = resample_counts(
                200, resamples=50, generator=torch.Generator().manual_seed(seed)
            )
            pairs = zip(counts, counts.flip(0), strict=True)
            resampled = [frechet_distance(Moments.of(x, a), Moments.of(y, b)) for a, b in pairs]
            interval = Figure.of(drawn[-1], resampled).interval
            assert interval is not None
            found.append((interval[1] - interval[0]) / 2 / 1.96)
    assert np.mean(found) == pytest.approx(np.std(drawn, ddof=1), rel=0.25)


def test_an_interval_of_a_mean_is_the_textbooks() -> None:
    values = rows(400, 1, 0)[:, 0]
    counts = resample_counts(400, resamples=2000, generator=torch.Generator().manual_seed(0))
    figure = Figure.of_means(values, counts, low=-10, high=10)
    half = 1.96 * values.std().item() / 20
    assert figure.value == pytest.approx(values.mean().item(), rel=1e-12)
    # The spread of 2000 resamples is known to 2 %.
    assert figure.interval == pytest.approx(
        (figure.value - half, figure.value + half), abs=half / 10
    )


def test_resamples_are_as_large_as_the_set_and_the_same_for_a_seed() -> None:
    counts, again = (
        resample_counts(50, resamples=4, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    assert counts.shape == (5, 50)
    assert (counts[0] == 1).all()
    assert (counts.sum(1) == 50).all()
    assert torch.equal(counts, again)
    assert not torch.equal(counts[1], counts[2])


def test_figures_without_an_interval() -> None:
    assert Figure.of(1.0, []).interval is None
    assert Figure.of(1.0, [1.0]).interval is None
    assert Figure.of(math.inf, [1.0, 2.0]).interval is None
    assert Figure.of(0.1, [0.0, 0.4], low=0.0).interval == pytest.approx(
        (0.0, 0.1 + 1.96 * 0.2828), rel=1e-3
    )
