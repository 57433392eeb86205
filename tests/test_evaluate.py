"""Images against a reference in one call: which figures there are, of what, and the same twice."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from npz_fixture import Array, features, images, moments, noisy, saved, stack
from reference import published_figures as published
from torch import Tensor

from ditas_export.errors import ArtifactError, EvaluationError
from ditas_export.evaluation import evaluate as evaluation
from ditas_export.evaluation import perceptual_distance
from ditas_export.evaluation.digit_features import DigitFeatures, load_digit_classifier
from ditas_export.evaluation.evaluate import Evaluation, evaluate
from ditas_export.evaluation.options import EvaluateOptions

SAMPLES, REFERENCE = features(60, 8), features(50, 8, seed=1, shift=0.4)
SPATIAL = (features(60, 5, seed=2), features(50, 5, seed=3, shift=0.2))


def judged(samples: Path, reference: Path, **options: Any) -> Evaluation:
    options = {"resamples": 8, **options}
    return evaluate(EvaluateOptions(samples=samples, reference=reference, **options))


def values(found: Evaluation) -> dict[str, float]:
    return {name: each.value for name, each in found.figures.items() if each is not None}


def test_given_features(tmp_path: Path) -> None:
    samples = saved(tmp_path / "a.npz", features=SAMPLES, spatial=SPATIAL[0])
    reference = saved(tmp_path / "b.npz", features=REFERENCE, spatial=SPATIAL[1])
    found = judged(samples, reference)
    x, y = SAMPLES.astype(np.float64), REFERENCE.astype(np.float64)
    precision, recall = published.precision_recall(y, x)
    assert values(found) == pytest.approx(
        {
            "fid": published.frechet(x, y),
            "sfid": published.frechet(*(each.astype(np.float64) for each in SPATIAL)),
            "kid": published.kernel_distance(x, y),
            "precision": precision,
            "recall": recall,
        },
        rel=1e-7,
    )
    assert found.features == "given in the files"
    assert (found.images, found.reference_images) == (60, 50)
    assert found.notes == ("no pairs: the images are none and none",)
    for figure in filter(None, found.figures.values()):
        assert figure.interval is not None
        assert figure.interval[0] <= figure.value <= figure.interval[1]


def test_adms_reference_with_moments_alone(tmp_path: Path) -> None:
    stated = moments(REFERENCE) | moments(SPATIAL[1], "_s")
    samples = saved(tmp_path / "a.npz", features=SAMPLES, spatial=SPATIAL[0])
    rows = saved(tmp_path / "b.npz", features=REFERENCE, spatial=SPATIAL[1])
    found = judged(samples, saved(tmp_path / "c.npz", **stated))
    wanted = values(judged(samples, rows))
    assert values(found) == pytest.approx({name: wanted[name] for name in ("fid", "sfid")})
    assert found.reference_images is None
    assert "no KID, precision and recall: of one set the moments alone are known" in found.notes


def test_moments_that_are_stated_win_over_images_of_the_reference(tmp_path: Path) -> None:
    """ADM's files have the moments of all data beside a few images, which make the rest."""
    samples = saved(tmp_path / "a.npz", features=SAMPLES)
    other = moments(features(500, 8, seed=7))
    found = values(judged(samples, saved(tmp_path / "b.npz", features=REFERENCE, **other)))
    wanted = values(judged(samples, saved(tmp_path / "c.npz", features=REFERENCE)))
    x = moments(SAMPLES)
    fid = published.frechet_of_moments(x["mu"], x["sigma"], other["mu"], other["sigma"])
    assert found == pytest.approx(wanted | {"fid": fid}, rel=1e-6)


def test_two_sets_of_moments_are_not_drawn(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{index}.npz", **moments(each))
        for index, each in enumerate((SAMPLES, REFERENCE))
    ]
    found = judged(*paths)
    fid = found.sets.fid
    assert fid.interval is None
    x, y = SAMPLES.astype(np.float64), REFERENCE.astype(np.float64)
    assert fid.value == pytest.approx(published.frechet(x, y), rel=1e-6)
    assert (found.images, found.reference_images) == (None, None)


def pair(folder: Path, *, count: int = 70, side: int = 16) -> tuple[Array, Array, Path, Path]:
    """Two files of ditas-sample, of more than one batch."""
    x = images(count, side=side)
    y = noisy(x)
    return y, x, stack(folder / "samples.npz", y), stack(folder / "reference.npz", x)


def test_pairs(tmp_path: Path) -> None:
    x, y, *paths = pair(tmp_path)
    found = judged(*paths)
    error = ((x.astype(np.float64) - y) ** 2).mean()
    wanted = np.mean([published.ssim(a[..., 0], b[..., 0]) for a, b in zip(x, y, strict=True)])
    assert found.pairs is not None
    assert found.pairs.psnr_db.value == pytest.approx(10 * math.log10(255**2 / error), rel=1e-12)
    assert found.pairs.ssim is not None
    assert found.pairs.ssim.value == pytest.approx(wanted, rel=1e-9)
    assert found.pairs.lpips is None
    assert "LPIPS needs the package lpips, which is not installed" in found.notes


def test_digits_are_judged_by_the_bundled_classifier(tmp_path: Path) -> None:
    x, y, *paths = pair(tmp_path)
    found = judged(*paths)
    assert found.features == "the bundled digit classifier, 64 features"
    model = load_digit_classifier()
    with torch.inference_mode():
        rows = [
            model.features(torch.from_numpy(each[..., 0][:, None] / 127.5 - 1).float()).double()
            for each in (x, y)
        ]
    wanted = published.kernel_distance(*(each.numpy() for each in rows))
    assert found.sets.kid is not None
    assert found.sets.kid.value == pytest.approx(wanted, rel=1e-4)  # features in float32
    assert "no sFID: there are no spatial features of both" in found.notes


def test_grey_images_of_three_channels_are_digits_too() -> None:
    """As ditas-sample writes them; colours are refused."""
    judge = DigitFeatures()
    grey = torch.randint(0, 256, (5, 1, 16, 16), dtype=torch.uint8)
    assert torch.equal(judge(grey.expand(-1, 3, -1, -1))[0], judge(grey)[0])
    coloured = grey.repeat(1, 3, 1, 1)
    coloured[4, 1, 7, 7] ^= 1
    with pytest.raises(EvaluationError, match="in colour"):
        judge(coloured)


def test_equal_pairs(tmp_path: Path) -> None:
    _, _, _, path = pair(tmp_path)
    other = tmp_path / "other.npz"
    other.write_bytes(path.read_bytes())
    found = judged(path, other)
    assert found.pairs is not None
    assert found.pairs.psnr_db.value == math.inf
    assert found.to_dict()["figures"]["psnr_db"] == {"value": None, "interval": None}
    assert "all pairs are equal: their PSNR is infinite" in found.notes
    assert found.sets.fid.value == pytest.approx(0, abs=1e-9)
    assert (found.sets.precision, found.sets.recall) == (found.sets.recall, found.sets.precision)
    assert found.sets.precision is not None
    assert found.sets.precision.value == 1.0


def test_pairs_are_not_assumed_of_files_of_others(tmp_path: Path) -> None:
    x, y, *_ = pair(tmp_path)
    paths = [saved(tmp_path / f"{index}.npz", arr_0=each) for index, each in enumerate((x, y))]
    assert judged(*paths).pairs is None
    assert any("say --paired" in note for note in judged(*paths).notes)
    assert judged(*paths, paired=True).pairs is not None


def test_pairs_are_left_out_if_asked(tmp_path: Path) -> None:
    *_, samples, reference = pair(tmp_path)
    found = judged(samples, reference, paired=False)
    assert found.pairs is None
    assert found.notes[0] == "no pairs, as asked"


def test_small_images_have_no_ssim(tmp_path: Path) -> None:
    x = images(9, side=8)
    paths = [
        saved(tmp_path / f"{index}.npz", arr_0=each, features=SAMPLES[:9])
        for index, each in enumerate((x, noisy(x)))
    ]
    found = judged(*paths, paired=True)
    assert found.pairs is not None
    assert found.pairs.ssim is None
    assert "no SSIM: its windows are of 11 pixels, the images 8×8" in found.notes


def test_pairs_are_drawn_together(tmp_path: Path) -> None:
    """The figures of equal sets are the same in every resample: FID 0, the pairs' too."""
    _, _, _, path = pair(tmp_path)
    other = tmp_path / "other.npz"
    other.write_bytes(path.read_bytes())
    together, apart = judged(path, other), judged(path, other, paired=False)
    assert together.sets.fid.interval == pytest.approx((0, 0), abs=1e-9)
    assert apart.sets.fid.interval is not None
    assert apart.sets.fid.interval[1] > 1e-3


def test_a_seed_gives_the_same_intervals(tmp_path: Path) -> None:
    *_, samples, reference = pair(tmp_path)
    first, again, other = (judged(samples, reference, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.figures != other.figures
    assert values(first) == values(other)
    none = judged(samples, reference, resamples=0)
    assert all(each.interval is None for each in none.figures.values() if each)
    assert values(none) == values(first)


def test_few_images_are_noted(tmp_path: Path) -> None:
    paths = [
        saved(tmp_path / f"{index}.npz", features=features(8, 8, seed=index)) for index in (0, 1)
    ]
    assert any("8 images and 8 features: FID is far above" in note for note in judged(*paths).notes)


def test_the_report_is_what_was_found(tmp_path: Path) -> None:
    *_, samples, reference = pair(tmp_path)
    options = EvaluateOptions(samples=samples, reference=reference, resamples=3)
    stages: dict[str, list[int]] = {}

    def follow(stage: str, done: int, total: int) -> None:
        stages.setdefault(stage, []).append(done)
        assert done <= total
        totals[stage] = total

    totals: dict[str, int] = {}
    found = evaluate(options, report=tmp_path / "out.json", on_progress=follow)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == {"format": evaluation.FORMAT, **json.loads(json.dumps(found.to_dict()))}
    assert written["figures"]["fid"]["value"] == pytest.approx(found.sets.fid.value, rel=1e-5)
    assert written["figures"]["sfid"] is None
    assert list(stages) == [
        "Comparing pairs", "Features of samples", "Features of reference", "Resampling FID",
        "Kernel distances", "Precision and recall",
    ]  # fmt: skip
    assert {stage: done[-1] for stage, done in stages.items()} == totals
    evaluate(options, report=tmp_path / "out.json")  # an earlier one is replaced
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no earlier evaluation of ditas-export"):
        evaluate(options, report=tmp_path / "mine.json")
    with pytest.raises(ArtifactError, match=r"it is the input SAMPLES\.npz"):
        evaluate(options, report=samples)


class StandInLpips(torch.nn.Module):
    """As the package's class is called: RGB from −1 to 1, a distance per pair."""

    def __init__(self, net: str, *, verbose: bool) -> None:
        super().__init__()
        assert (net, verbose) == ("alex", False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        assert x.shape[1] == 3
        assert max(x.abs().max(), y.abs().max()) <= 1
        return (x - y).abs().mean((1, 2, 3), keepdim=True)


def test_lpips_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    module = ModuleType("lpips")
    module.__spec__ = ModuleSpec("lpips", None)
    module.LPIPS = StandInLpips  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    x = images(70, side=32)
    y = noisy(x)
    paths = [
        saved(tmp_path / f"{index}.npz", arr_0=each, features=features(70, 3, seed=index))
        for index, each in enumerate((x, y))
    ]
    missing = judged(*paths, paired=True)
    assert any(f"put torchvision's {perceptual_distance.WEIGHTS} into" in n for n in missing.notes)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / perceptual_distance.WEIGHTS).write_bytes(b"")
    found = judged(*paths, paired=True)
    assert found.pairs is not None
    assert found.pairs.lpips is not None
    wanted = np.abs(x.astype(np.float64) - y).mean() / 127.5
    assert found.pairs.lpips.value == pytest.approx(wanted, rel=1e-5)


GOOD, OK, NINE = {"features": SAMPLES}, {"features": REFERENCE}, {"arr_0": images(9)}

BAD: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "nothing": ({"other": SAMPLES}, OK, {}, "has none of arr_0, features, mu"),
    "whole numbers": ({"features": SAMPLES.astype(int)}, OK, {}, "features is int64"),
    "one dimension": ({"features": SAMPLES[:, 0]}, OK, {}, r"features is float32 \(60,\)"),
    "float images": ({"arr_0": images(9) / 255}, OK, {}, "arr_0 is float64"),
    "four channels": ({"arr_0": images(9, channels=4)}, OK, {}, "arr_0 is uint8"),
    "channels first": ({"arr_0": images(9).transpose(0, 3, 1, 2).copy()}, OK, {}, "1 or 3"),
    "turned images": ({"arr_0": np.asfortranarray(images(9))}, OK, {}, "C's order"),
    "mu alone": (GOOD, {"mu": np.ones(8)}, {}, "has no sigma; expected mu with sigma"),
    "a sigma of others": (GOOD, {"mu": np.ones(8), "sigma": np.eye(9)}, {}, "moments of the same"),
    "a crooked sigma": (
        GOOD,
        {"mu": np.ones(8), "sigma": np.triu(np.ones((8, 8)))},
        {},
        "is no covariance",
    ),
    "a negative sigma": (GOOD, {"mu": np.ones(8), "sigma": -np.eye(8)}, {}, "is no covariance"),
    "NaN": (GOOD, {"features": REFERENCE * np.float32("nan")}, {}, "not finite or beyond 1e.09"),
    "1e30": ({"features": SAMPLES * np.float32(1e30)}, OK, {}, "not finite or beyond 1e.09"),
    "an infinite sigma": (
        GOOD,
        {"mu": np.ones(8), "sigma": np.full((8, 8), np.inf)},
        {},
        "not finite",
    ),
    "other widths": (GOOD, {"features": REFERENCE[:, :5]}, {}, "FID: 8 features of the samples, 5"),
    "spatial widths": (
        {"features": SAMPLES, "spatial": SPATIAL[0]},
        {"features": REFERENCE, "spatial": REFERENCE},
        {},
        "sFID: 5",
    ),
    "three images": ({"features": SAMPLES[:3]}, OK, {}, "has 3 images; expected 4 to"),
    "rows apart": ({"features": SAMPLES, "spatial": SPATIAL[0][:9]}, OK, {}, "as many of each"),
    "given without": (NINE, OK, {"features": "given"}, "has neither features nor mu"),
    "no images": (GOOD, NINE, {"features": "digits"}, "features given"),
    "no digits": (
        {"arr_0": images(9, side=32)},
        NINE,
        {"features": "digits"},
        r"has images of \(32, 32, 1\)",
    ),
    "moments of others": (
        NINE,
        {"arr_0": images(9), "mu": np.ones(8), "sigma": np.eye(8)},
        {"features": "digits"},
        "mu is of 8 features",
    ),
    "no pairs": (NINE, {"arr_0": images(8)}, {"paired": True}, "the same shape for --paired"),
    "no inception": (
        {"arr_0": images(9, side=32)},
        {"arr_0": images(9, side=32)},
        {},
        r"pip install 'ditas-export\[fid\]'",
    ),
    "no GPU": (GOOD, OK, {"device": "cuda"}, "no GPU that PyTorch can use"),
}


@pytest.mark.parametrize(("samples", "reference", "options", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_judged(
    tmp_path: Path,
    samples: dict[str, Any],
    reference: dict[str, Any],
    options: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = saved(tmp_path / "a.npz", **samples), saved(tmp_path / "b.npz", **reference)
    with pytest.raises(EvaluationError, match=message) as refused:
        judged(*paths, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": "vgg"}, "one of auto, given, digits, inception"),
        ({"resamples": -1}, "0 to 10000"),
        ({"seed": -1}, "a whole number"),
        ({"device": "tpu"}, "one of cpu, cuda"),
    ],
)
def test_options_that_nothing_takes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        EvaluateOptions(samples=Path("a"), reference=Path("b"), **options)
