"""Feed nonsense to the parsers and peers of qsnapd, guided by the branches that it takes.

python -m tests.fuzz                        some thousand inputs: a minute or so
python -m tests.fuzz --long                 more than a million
python -m tests.fuzz TARGET ... --runs N
python -m tests.fuzz TARGET --input FILE    once more, with its traceback

Each target is a process of its own. What breaks one is left in --failures; give it to --input.
Ends with status 1 if anything broke.
"""

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tests.fuzz.bounds import bounded

if TYPE_CHECKING:
    from tests.fuzz.running import Outcome


def table_of(outcomes: Sequence["Outcome"]) -> Table:
    table = Table("target", "inputs", "edges", "crashes", "peak MB", "CPU s")
    for column in table.columns[1:]:
        column.justify = "right"
    for each in outcomes:
        numbers = (each.inputs, each.edges, int(each.failure is not None), each.peak_mb)
        table.add_row(each.name, *(f"{number:,}" for number in numbers), f"{each.cpu_s:.0f}")
    table.add_section()
    crashes = sum(each.failure is not None for each in outcomes)
    inputs, cpu_s = sum(each.inputs for each in outcomes), sum(each.cpu_s for each in outcomes)
    table.add_row("all", f"{inputs:,}", "", str(crashes), "", f"{cpu_s:,.0f}")
    return table


def main(arguments: Sequence[str]) -> int:
    asked = _parser().parse_args(arguments)
    if asked.input is not None:
        feed_file(asked.targets[0], asked.input)
        return 0
    from tests.fuzz import running  # takes its time, and has to be the first to import qsnapd

    _require_known(asked.targets, running.TARGETS)
    targets = {name: running.TARGETS[name] for name in asked.targets or running.TARGETS}
    runs = {
        name: asked.runs or (target.runs_long if asked.long else target.runs_short)
        for name, target in targets.items()
    }
    seed = asked.seed or int.from_bytes(os.urandom(3), "big") + 1
    failures = asked.failures.absolute()
    failures.mkdir(parents=True, exist_ok=True)
    outcomes = sorted(
        running.run_all(runs, seed=seed, failures=failures, jobs=asked.jobs),
        key=lambda outcome: list(targets).index(outcome.name),
    )
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    console.print(table_of(outcomes))
    console.print(f"seed {seed}")
    failed = [each for each in outcomes if each.failure is not None]
    for each in failed:
        console.print(f"\n{each.name}:\n{each.failure}", markup=False)
    return 1 if failed else 0


def feed_file(name: str, file: Path) -> None:
    """Once more what has broken something: it raises."""
    from tests.fuzz.targets import TARGETS

    _require_known([name], TARGETS)
    data = file.read_bytes()
    with TARGETS[name].open() as feed, bounded(len(data)):
        feed(data)


def _require_known(names: Sequence[str], targets: Collection[str]) -> None:
    if strangers := [name for name in names if name not in targets]:
        sys.exit(f"there is no target {strangers[0]!r}; there are: {', '.join(targets)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="by default all")
    parser.add_argument("--runs", type=int, help="inputs for each target")
    parser.add_argument("--long", action="store_true", help="more than a million in all")
    parser.add_argument("--seed", type=int, help="by default another one each time")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--input", type=Path, help="feed this file once, instead")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
