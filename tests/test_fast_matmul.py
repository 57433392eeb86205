from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ditas_export import fast_matmul
from ditas_export.fast_matmul import fast_float32_matmul, onednn_keeps_float32

SETTING = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def before() -> Iterator[str]:
    """The setting at the start of every test."""
    found = SETTING.fp32_precision
    SETTING.fp32_precision = "ieee"
    yield "ieee"
    SETTING.fp32_precision = found


def test_products_keep_float32_accuracy() -> None:
    """Against float64. Rounded to bfloat16 or TF32, factors alone would err by 1e-4 or more."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(300, 300, generator=generator) for _ in range(2))
    products: list[Callable[[Tensor, Tensor], Tensor]] = [
        torch.nn.functional.linear,
        lambda a, b: a.mT @ b,
    ]
    for product in products:
        wanted = product(x.double(), w.double())
        with fast_float32_matmul():
            got = product(x, w)
        assert (got - wanted).norm() < 2e-6 * wanted.norm()


def test_the_setting_is_on_inside_and_put_back_on_every_way_out(before: str) -> None:
    inside = "bf16" if onednn_keeps_float32() else before
    with fast_float32_matmul():
        with fast_float32_matmul():
            assert SETTING.fp32_precision == inside
        assert SETTING.fp32_precision == inside
    assert SETTING.fp32_precision == before
    with pytest.raises(KeyboardInterrupt), fast_float32_matmul():
        raise KeyboardInterrupt
    assert SETTING.fp32_precision == before


def test_nothing_changes_where_onednn_would_round(
    monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """A processor with AMX, played by products that round to bfloat16 where they may."""

    def rounding(a: Tensor, b: Tensor) -> Tensor:
        if SETTING.fp32_precision == "bf16":
            return a.bfloat16().mm(b.bfloat16()).float()
        return a.mm(b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    measure = onednn_keeps_float32.__wrapped__
    assert not measure()
    assert SETTING.fp32_precision == before
    monkeypatch.setattr(fast_matmul, "onednn_keeps_float32", measure)
    with fast_float32_matmul():
        assert SETTING.fp32_precision == before


def test_the_setting_is_put_back_when_the_last_thread_leaves(before: str) -> None:
    """Threads that overlap: the first to come is the first to go."""
    first, second = fast_float32_matmul(), fast_float32_matmul()
    inside = "bf16" if onednn_keeps_float32() else before
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert SETTING.fp32_precision == inside
    second.__exit__(None, None, None)
    assert SETTING.fp32_precision == before
