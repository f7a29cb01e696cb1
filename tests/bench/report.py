"""The results for people and for programs: a table, JSON lines, a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.notebook import Measurement
from tests.bench.summary import Line

PANELS = (
    ("pause", "pause, ms"),
    ("total / dd", "total time / dd"),
    ("image / RAM in use", "image / RAM in use"),
    ("daemon's CPU / total", "daemon's CPU / total time"),
)


def write_json(path: Path, measurements: Sequence[Measurement], lines: Sequence[Line]) -> None:
    """Write one object per line: first what was measured, then the summary."""
    rows = [{"kind": "measurement", **asdict(measurement)} for measurement in measurements]
    rows += [line.as_json() for line in lines]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def print_table(lines: Sequence[Line], console: Console) -> None:
    """Print the summary, and say loudly which targets were missed."""
    table = Table("QEMU", "quantity", "of")
    for header in ("median", "lowest", "highest", "n", "target"):
        table.add_column(header, justify="right")
    previous: Line | None = None
    for line in lines:
        if previous is not None and previous.qemu != line.qemu:
            table.add_section()
        same = previous is not None and previous.quantity == line.quantity
        table.add_row(
            line.qemu,
            "" if same else line.quantity,
            line.subject,
            *(_figure(value, line.unit) for value in (line.median, *_range(line))),
            str(len(line.values)),
            _verdict(line),
            style="bold red" if line.missed else None,
        )
        previous = line
    console.print(table)
    missed = [line for line in lines if line.missed]
    promised = sum(line.target is not None for line in lines)
    for line in missed:
        console.print(
            f"TARGET MISSED on QEMU {line.qemu}: {line.quantity} of {line.subject} is "
            f"{_figure(line.median, line.unit)}, it should be at most "
            f"{_figure(line.target or 0, line.unit)}",
            style="bold red",
            soft_wrap=True,
        )
    console.print(f"{promised - len(missed)} of {promised} targets met")


def _range(line: Line) -> tuple[float, float]:
    return min(line.values), max(line.values)


def _figure(value: float, unit: str) -> str:
    return f"{value:.1f} {unit}" if unit else f"{value:.3f}"


def _verdict(line: Line) -> str:
    if line.target is None:
        return ""
    return f"{_figure(line.target, line.unit)} {'MISSED' if line.missed else 'met'}"


def write_plot(path: Path, lines: Sequence[Line]) -> None:
    """Draw every value as a dot, medians and targets as strokes; one panel per quantity."""
    import matplotlib as mpl  # takes a second: only where it is needed

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for axes, (quantity, title) in zip(panels.flat, PANELS, strict=True):
        shown = [line for line in lines if line.quantity == quantity]
        for at, line in enumerate(shown):
            axes.plot([at] * len(line.values), line.values, "o", alpha=0.5, color="C0")
            axes.hlines(line.median, at - 0.3, at + 0.3, colors="C0")
            if line.target is not None:
                axes.hlines(line.target, at - 0.45, at + 0.45, colors="C3", linestyles="dashed")
        names = [f"{line.subject.replace(', ', chr(10))}\n{line.qemu}" for line in shown]
        axes.set_xticks(range(len(shown)), names, fontsize=8)
        axes.set_title(f"{title} (dashed: target)" if any(x.target for x in shown) else title)
        if quantity == "pause":
            axes.set_yscale("log")
        elif quantity != "image / RAM in use":  # these differ by a hundredth
            axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("qsnapd, each dot one checkpoint")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
