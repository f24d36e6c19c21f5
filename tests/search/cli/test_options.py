"""Texts of options as the numbers that they stand for."""

from fractions import Fraction

import click
import pytest

from lexi_adapter.model.variants import share_of_budget
from lexi_search.cli.options import SIZE, parse_budget
from lexi_search.errors import InputError


@pytest.mark.parametrize(
    ("text", "budget"),
    [("80", 80), ("50%", 64), ("62.5%", 80), ("100%", 128), ("62%", 79), ("k=4", 64), ("k=4.5", 72), ("k=8", 128)],
)
def test_a_budget_is_a_sum_a_share_or_an_average(text, budget):
    assert parse_budget(text, layers=16, top_k=8) == budget


@pytest.mark.parametrize("layers", [3, 16, 61])
def test_shares_are_rounded_as_the_adapter_rounds_them(layers):
    class Shape:  # of a model, as far as the adapter looks at it here
        top_k, moe_layers = 8, range(layers)

    for percent in range(1, 101):
        ours = parse_budget(f"{percent}%", layers=layers, top_k=8)
        assert ours == share_of_budget(Shape, percent / 100)
        assert abs(ours - Fraction(percent, 100) * layers * 8) <= Fraction(1, 2)


@pytest.mark.parametrize("text", ["", "-3", "1e3", "50 %", "%", "k=", "k=x", "4.5", "k=-1", "٨", "nan%", "50%%"])
def test_other_budgets_are_refused(text):
    with pytest.raises(InputError, match="write a sum over layers such as 80, a share such as 50%, or an average"):
        parse_budget(text, layers=16, top_k=8)


def test_budgets_above_the_models_own_are_refused_by_name():
    with pytest.raises(InputError, match=r"--budget 101%: .* 128, and at most 100%"):
        parse_budget("101%", layers=16, top_k=8)
    with pytest.raises(InputError, match=r"--budgets k=9: an average is at most 8"):
        parse_budget("k=9", layers=16, top_k=8, option="--budgets")


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("500MB", 5 * 10**8), ("1.5 TB", 1500 * 10**9), ("0GB", 0), ("64kB", 64_000)],
)
def test_a_size_is_a_number_of_bytes_with_a_unit(text, size):
    assert SIZE.convert(text, None, None) == size


@pytest.mark.parametrize("text", ["20", "GB", "-1GB", "20GiB", "1e3GB", "nanGB", "20 G"])
def test_other_sizes_are_refused(text):
    with pytest.raises(click.BadParameter, match="take a number and a unit, such as 20GB"):
        SIZE.convert(text, None, None)
