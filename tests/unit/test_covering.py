"""The cases that a matrix is tested with really have every pair."""

from itertools import product
from math import prod

from hypothesis import given, settings
from hypothesis import strategies as some

from tests.real.covering import covering_cases, pairs_of

sizes = some.lists(some.integers(1, 4), min_size=2, max_size=5)


@settings(deadline=None)  # a busy machine is no reason to fail
@given(sizes)
def test_every_pair_and_few_cases(sizes: list[int]) -> None:
    choices = [range(size) for size in sizes]
    cases = covering_cases(choices)
    wanted = {pair for case in product(*choices) for pair in pairs_of(case)}
    assert {pair for case in cases for pair in pairs_of(case)} == wanted
    assert len(cases) <= min(prod(sizes), 2 * sorted(sizes)[-1] * sorted(sizes)[-2])


def test_impossible_cases_are_left_out() -> None:
    cases = covering_cases(("ab", "cd", "ef"), lambda case: case[:2] != ("a", "c"))
    assert all(case[:2] != ("a", "c") for case in cases)
    assert {case[:2] for case in cases} == {("a", "d"), ("b", "c"), ("b", "d")}
