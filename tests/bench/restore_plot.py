"""Restores drawn: times over the size of RAM, memory over the number of clones."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.bench.notebook import Measurement
from tests.bench.restore_summary import LAZY_LOAD_MS, Values, values_by_clones, values_by_ram
from tests.bench.restoring import MODES, name_of

COLOURS = {"eager": "C1", "lazy": "C0"}


def write_restore_plot(path: Path, measurements: Sequence[Measurement]) -> None:
    """Draw every value as a dot and medians as lines."""
    import matplotlib as mpl  # takes a second: only where it is needed

    mpl.use("Agg")  # no display is needed
    from matplotlib import pyplot

    figure, (word, load, clones) = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    for mode in MODES:
        for half in (True, False):
            subject = name_of(mode, half=half)
            style = {"color": COLOURS[mode], "linestyle": "-" if half else ":"}
            _draw(word, values_by_ram(measurements, subject, "word_ms"), subject, style)
            _draw(load, values_by_ram(measurements, subject, "load_ms"), subject, style)
        subject, colour = name_of(mode, half=True), COLOURS[mode]
        starts = values_by_ram(measurements, subject, "start_ms")
        style = {"color": colour, "linestyle": "--"}
        _draw(word, starts, f"QEMU's own start, {mode}", style)
        for measure, what, line in (
            ("resident_mib", "resident", "-"),
            ("own_mib", "of their own", ":"),
        ):
            values = values_by_clones(measurements, subject, measure)
            _draw(clones, values, f"{mode}, {what}", {"color": colour, "linestyle": line})
    load.axhline(LAZY_LOAD_MS, color="C3", linestyle="dashed")
    word.set_title("from request to the guest's first word, ms")
    load.set_title("load alone, ms (dashed: target of lazy)")
    clones.set_title("memory of clones of one checkpoint, MiB")
    for axes in (word, load):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda mib, _: f"{mib / 1024:g}")
        axes.set_xlabel("RAM, GiB")
    clones.set_xlabel("clones")
    clones.set_ylim(bottom=0)
    for axes in (word, load, clones):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle("restores by qsnapd")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axes: Any, values: Values, label: str, style: dict[str, str]) -> None:  # noqa: ANN401
    if values:
        medians = [statistics.median(of_one) for of_one in values.values()]
        axes.plot(list(values), medians, label=label, **style)
        for at, of_one in values.items():
            axes.plot([at] * len(of_one), of_one, "o", alpha=0.4, color=style["color"], ms=4)
