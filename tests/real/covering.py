"""Few cases that have every pair of choices: what breaks, mostly breaks for a pair."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

Case = tuple[Any, ...]
Pair = tuple[int, Any, int, Any]


def covering_cases(
    choices: Sequence[Sequence[Any]], is_possible: Callable[[Case], bool] = lambda _: True
) -> list[Case]:
    """Return cases of one choice each, in which every pair occurs that is possible at all.

    Not the fewest there are, but about; always the same ones.
    """
    possible = [case for case in product(*choices) if is_possible(case)]
    missing = {pair for case in possible for pair in pairs_of(case)}
    cases: list[Case] = []
    taken: Counter[tuple[int, Any]] = Counter()

    def worth(case: Case) -> tuple[int, int]:
        # among equals, the one whose choices have been taken least: nothing is tried too often
        fresh = sum(pair in missing for pair in pairs_of(case))
        return fresh, -sum(taken[choice] for choice in enumerate(case))

    while missing:
        best = max(possible, key=worth)
        missing.difference_update(pairs_of(best))
        taken.update(enumerate(best))
        cases.append(best)
    return cases


def pairs_of(case: Case) -> Iterator[Pair]:
    """Yield every two choices of *case*, each with its place."""
    for (place, choice), (other_place, other) in combinations(enumerate(case), 2):
        yield place, choice, other_place, other
