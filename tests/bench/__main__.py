"""Measure qsnapd beside what it cannot do without: bare commands to QEMU, plain writing.

python -m tests.bench                 all of it, some ten minutes
python -m tests.bench --only PART     checkpoints, restores or clones
python -m tests.bench --quick         small guests and few rounds: does it work, not how well

Absolute numbers belong to the machine; what counts are ratios of things that were measured
in turns. A missed target is said loudly and is no error.
"""

import argparse
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console

from tests.bench.cloning import measure_clones
from tests.bench.measuring import Scale, measure
from tests.bench.notebook import FLOOR, HASHED, STRATEGIES, Notebook
from tests.bench.report import print_table, write_json, write_plot
from tests.bench.restore_plot import write_restore_plot
from tests.bench.restore_summary import summarize_restores
from tests.bench.restoring import RestoreScale, measure_restores
from tests.bench.summary import Results, summarize
from tests.parts import PartMissing, qemu_versions
from tests.program import run_program

RESULTS = Path(__file__).parent / "results"

PARTS = ("checkpoints", "restores", "clones")


@dataclass(frozen=True)
class Scales:
    """How much is measured, of each part."""

    checkpoints: Scale
    restores: RestoreScale


FULL = Scales(
    Scale(rounds=6, ram_mib=1024, dirtied_mib=640, sized_rounds=1),
    RestoreScale(rounds=5, ram_mib=(512, 1024, 2048, 4096, 8192), clones=10, clone_ram_mib=512),
)
QUICK = Scales(
    Scale(rounds=2, ram_mib=192, dirtied_mib=32, sized_rounds=1),
    RestoreScale(rounds=1, ram_mib=(192, 384), clones=2, clone_ram_mib=192),
)


async def bench(scales: Scales, parts: Collection[str], folder: Path, log: IO[bytes]) -> None:
    """Measure, print, and leave the results in *folder*; the daemons write to *log*."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    notebook = Notebook(partial(console.print, soft_wrap=True), log)
    *_, newest = qemu_versions()
    if "checkpoints" in parts:
        for qemu in reversed(qemu_versions()):
            hashed = (HASHED,) if qemu is newest else ()
            await measure(qemu, (FLOOR, *STRATEGIES, *hashed), scales.checkpoints, notebook)
    if "restores" in parts:
        await measure_restores(newest, scales.restores, notebook)
    if "clones" in parts:
        await measure_clones(newest, scales.restores, notebook)
    measurements = notebook.measurements
    checkpoints = [line for results in Results.by_qemu(measurements) for line in summarize(results)]
    lines = checkpoints + summarize_restores(measurements)
    write_json(folder / "bench.jsonl", measurements, lines)
    if checkpoints:
        write_plot(folder / "bench.png", checkpoints)
    if len(lines) > len(checkpoints):
        write_restore_plot(folder / "restores.png", measurements)
    print_table(lines, console)
    load, cpus = os.getloadavg()[2], os.cpu_count()
    console.print(f"load average {load:.1f} on {cpus} CPUs; the bench alone makes about 2")
    console.print(f"see also what is in {folder}", soft_wrap=True)


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small and short, to try it")
    parser.add_argument("--only", choices=PARTS, action="append", help="just this part")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    scales = QUICK if options.quick else FULL
    parts = options.only or PARTS
    with (options.results / "qsnapd.log").open("wb") as log:
        return run_program(
            "bench", partial(bench, scales, parts, options.results, log), PartMissing
        )


if __name__ == "__main__":
    sys.exit(main())
