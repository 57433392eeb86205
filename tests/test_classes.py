import pytest
from quantized_fixture import TINY

from ditas_export.conditions.labels import ClassLabels
from ditas_export.diffusion.classes import parse_classes
from ditas_export.errors import RunnerError


def parsed(text: str, count: int | None = None, seed: int = 0) -> tuple[int, ...]:
    return parse_classes(text, conditions=ClassLabels(TINY), count=count, seed=seed)


def test_lists_and_ranges_start_over_when_they_are_short() -> None:
    assert parsed("3,7", 5) == (3, 7, 3, 7, 3)
    assert parsed("0-9", 4) == (0, 1, 2, 3)
    assert parsed("8-9, 1", 4) == (8, 9, 1, 8)


def test_without_a_count_every_named_class_is_one_image() -> None:
    assert parsed("3,7-9") == (3, 7, 8, 9)
    assert len(parsed("random")) == 8


def test_random_names_every_class_before_one_comes_again() -> None:
    many = parsed("random", 20)
    assert sorted(many[:10]) == list(range(10))
    assert many[10:] == many[:10]
    assert parsed("random") == parsed("random") != parsed("random", seed=1)
    assert parsed("random", 3) == many[:3]  # more images do not change the first


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("cat", None, r"classes='cat'; write 3,7 or 0-9 or random"),
        ("", None, "write 3,7"),
        ("-3", None, "write 3,7"),
        ("3-", None, "write 3,7"),
        ("10", None, r"names class 10; this model has 0 to 9"),
        ("0-99999999999", None, "names class 99999999999"),
        ("7-3", None, "names none by '7-3'; write ranges upwards"),
        ("3", 0, "0 images; ask for at least one"),
    ],
)
def test_what_names_no_class_is_refused(text: str, count: int | None, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        parsed(text, count)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes(seed: int) -> None:
    with pytest.raises(RunnerError, match=f"seed={seed}; for random classes pick 0 to"):
        parse_classes("random", conditions=ClassLabels(TINY), seed=seed)
