"""Measure qsnapd beside what it cannot do without: bare commands to QEMU, plain writing.

python -m tests.bench           all of it, some minutes
python -m tests.bench --quick   a small guest and few rounds: does it work, not how well

Absolute numbers belong to the machine; what counts are ratios of things that were measured
in turns. A missed target is said loudly and is no error.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console

from tests.bench.measuring import Scale, measure
from tests.bench.notebook import FLOOR, HASHED, STRATEGIES, Notebook
from tests.bench.report import print_table, write_json, write_plot
from tests.bench.summary import Results, summarize
from tests.parts import PartMissing, qemu_versions
from tests.program import run_program

RESULTS = Path(__file__).parent / "results"

FULL = Scale(rounds=6, ram_mib=1024, dirtied_mib=640, sized_rounds=1)
QUICK = Scale(rounds=2, ram_mib=192, dirtied_mib=32, sized_rounds=1)


async def bench(scale: Scale, folder: Path, log: IO[bytes]) -> None:
    """Measure, print, and leave the results in *folder*; the daemons write to *log*."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    notebook = Notebook(partial(console.print, soft_wrap=True), log)
    for qemu in reversed(qemu_versions()):
        hashed = (HASHED,) if qemu is qemu_versions()[-1] else ()
        await measure(qemu, (FLOOR, *STRATEGIES, *hashed), scale, notebook)
    measurements = notebook.measurements
    lines = [line for results in Results.by_qemu(measurements) for line in summarize(results)]
    write_json(folder / "bench.jsonl", measurements, lines)
    write_plot(folder / "bench.png", lines)
    print_table(lines, console)
    load, cpus = os.getloadavg()[2], os.cpu_count()
    console.print(f"load average {load:.1f} on {cpus} CPUs; the bench alone makes about 2")
    console.print(f"see also {folder}/bench.jsonl and bench.png", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short, to try it")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    scale = QUICK if options.quick else FULL
    with (options.results / "qsnapd.log").open("wb") as log:
        return run_program("bench", partial(bench, scale, options.results, log), PartMissing)


if __name__ == "__main__":
    sys.exit(main())
