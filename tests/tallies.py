"""What tests count, told at the end of the run as tables: how much was tried, what was wrong.

A number may be counted in many places, also in other processes: those of one row are added up.
Of a list it is told how many different things are in all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, cast

from rich.console import Console
from rich.table import Table

PROPERTY = "counted"
"""Of a test's report; that is how it gets here from the process that has run the test."""

Number = int | float | list[int]
Record = Callable[[str, object], None]


class Report(Protocol):
    """One of pytest's."""

    user_properties: list[tuple[str, object]]


class Sums:
    """All that was counted: tables of rows of numbers."""

    def __init__(self) -> None:
        self.tables: dict[str, dict[str, dict[str, Number]]] = {}

    def add(self, table: str, row: str, numbers: Mapping[str, Number]) -> None:
        sums = self.tables.setdefault(table, {}).setdefault(row, {})
        for name, number in numbers.items():
            sums[name] = _sum(sums[name], number) if name in sums else number

    def in_all(self, table: str) -> dict[str, Number]:
        """Its rows, added up."""
        sums = Sums()
        for numbers in self.tables[table].values():
            sums.add(table, "", numbers)
        return sums.tables[table][""]


def count(record: Record, table: str, row: str, numbers: Mapping[str, Number]) -> None:
    """Have this test's *numbers* in the tables; *record*: pytest's record_property."""
    record(PROPERTY, [table, row, dict(numbers)])


def sum_up(reports: Iterable[Report]) -> Sums:
    """What the tests of these reports have counted."""
    sums = Sums()
    for report in reports:
        for name, value in report.user_properties:
            if name == PROPERTY:
                table, row, numbers = cast(tuple[str, str, dict[str, Number]], value)
                sums.add(table, row, numbers)
    return sums


def show(sums: Sums, console: Console) -> None:
    """Print every table, each with a last row for all of it."""
    for title, rows in sums.tables.items():
        in_all = sums.in_all(title)
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column("")
        for name in in_all:
            table.add_column(name, justify="right")
        for row, numbers in rows.items():
            table.add_row(row, *_texts(in_all, numbers))
        table.add_section()
        table.add_row("in all", *_texts(in_all, in_all))
        console.print(table)


def _sum(a: Number, b: Number) -> Number:
    if isinstance(a, list):
        assert isinstance(b, list)
        return sorted({*a, *b})
    assert not isinstance(b, list)
    return a + b


def _texts(names: Iterable[str], numbers: Mapping[str, Number]) -> Iterator[str]:
    for name in names:
        yield _text(numbers[name]) if name in numbers else ""


def _text(number: Number) -> str:
    if isinstance(number, list):
        return f"{len(number):,}"
    return f"{number:,.1f}" if isinstance(number, float) else f"{number:,}"
