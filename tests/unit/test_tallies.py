"""Numbers from many tests, in one table."""

import io
from dataclasses import dataclass, field

from rich.console import Console

from tests.tallies import Sums, count, show, sum_up


@dataclass
class Report:
    user_properties: list[tuple[str, object]] = field(default_factory=list)

    def record(self, name: str, value: object) -> None:
        self.user_properties.append((name, value))


def test_numbers_of_one_row_are_added_up_and_things_are_told_apart() -> None:
    first, second = Report([("other", 1)]), Report()
    count(first.record, "attacks", "creating", {"points": [1, 2], "cases": 3, "violations": 0})
    count(second.record, "attacks", "creating", {"points": [2, 5], "cases": 4, "violations": 1})
    count(second.record, "attacks", "deleting", {"points": [1], "cases": 1, "violations": 0})
    sums = sum_up([first, second])
    rows = sums.tables["attacks"]
    assert rows["creating"] == {"points": [1, 2, 5], "cases": 7, "violations": 1}
    assert sums.in_all("attacks") == {"points": [1, 2, 5], "cases": 8, "violations": 1}


def test_they_are_shown_with_a_row_for_all() -> None:
    sums = Sums()
    sums.add("attacks", "creating", {"points": [1, 2], "cases": 1200})
    sums.add("attacks", "killing", {"cases": 1, "took_s": 2.25})
    text = io.StringIO()
    show(sums, Console(file=text, width=100))
    cells = [line.split("│")[1:-1] for line in text.getvalue().split("\n")]
    lines = [[cell.strip() for cell in line] for line in cells]
    assert ["creating", "2", "1,200", ""] in lines
    assert ["killing", "", "1", "2.2"] in lines
    assert ["in all", "2", "1,201", "2.2"] in lines
