"""From measurements of restores and clones to what counts: how long, how much, and how flat."""

import statistics
from collections.abc import Mapping, Sequence

from tests.bench.notebook import Measurement
from tests.bench.restoring import MODES, name_of
from tests.bench.summary import Line

LAZY_LOAD_MS = 20.0
"""What a lazy restore may take beyond QEMU's own start."""
FLAT_MS = 5.0
"""How much longer a lazy load may take for the largest VM than for the smallest."""

MEASURES = (
    ("request to first word", "word_ms"),
    ("load alone", "load_ms"),
    ("QEMU's own start", "start_ms"),
)

Values = Mapping[int, tuple[float, ...]]
"""What was measured, one value a round, by size."""


def values_by_ram(measurements: Sequence[Measurement], subject: str, measure: str) -> Values:
    """Return the values of one measure of one subject, by MiB of RAM, smallest first."""
    found: dict[int, list[float]] = {}
    for m in measurements:
        if (m.subject, m.measure) == (subject, measure) and m.ram_mib is not None:
            found.setdefault(m.ram_mib, []).append(m.value)
    return {mib: tuple(found[mib]) for mib in sorted(found)}


def values_by_clones(measurements: Sequence[Measurement], subject: str, measure: str) -> Values:
    """Return the values of one measure of one subject, by how many clones there were."""
    found: dict[int, list[float]] = {}
    for m in measurements:
        if (m.subject, m.measure) == (subject, measure) and m.clones is not None:
            found.setdefault(m.clones, []).append(m.value)
    return {number: tuple(found[number]) for number in sorted(found)}


def summarize_restores(measurements: Sequence[Measurement]) -> list[Line]:
    """Return the lines about restores, in the order in which they are read best."""
    lines: list[Line] = []
    for qemu in dict.fromkeys(m.qemu for m in measurements):
        of_qemu = [m for m in measurements if m.qemu == qemu]
        for quantity, measure in MEASURES:
            for half in (True, False):
                for mode in MODES:
                    lines += _by_size(of_qemu, quantity, measure, mode, half)
        for half in (True, False):
            lines += _flatness(of_qemu, name_of("lazy", half=half))
        lines += _clones(of_qemu)
    return lines


def _clones(measurements: Sequence[Measurement]) -> list[Line]:
    lines = []
    for quantity, measure in (("resident memory", "resident_mib"), ("of their own", "own_mib")):
        for mode in MODES:
            subject = name_of(mode, half=True)
            if values := values_by_clones(measurements, subject, measure):
                number = max(values)
                name = f"{quantity}, {number} clones"
                lines.append(Line(measurements[0].qemu, name, subject, values[number], "MiB"))
    return lines


def _by_size(
    measurements: Sequence[Measurement], quantity: str, measure: str, mode: str, half: bool
) -> list[Line]:
    found = values_by_ram(measurements, name_of(mode, half=half), measure)
    target = LAZY_LOAD_MS if (mode, measure) == ("lazy", "load_ms") else None
    rest = "" if half else ", nearly empty"
    return [
        Line(measurements[0].qemu, quantity, f"{mode}, {_gib(mib)}{rest}", values, "ms", target)
        for mib, values in found.items()
    ]


def _flatness(measurements: Sequence[Measurement], subject: str) -> list[Line]:
    loads = values_by_ram(measurements, subject, "load_ms")
    if len(loads) < 2:
        return []
    smallest, *_, largest = loads
    of_smallest = statistics.median(loads[smallest])
    more_ms = tuple(value - of_smallest for value in loads[largest])
    quantity = f"load, {_gib(largest)} less {_gib(smallest)}"
    return [Line(measurements[0].qemu, quantity, subject, more_ms, "ms", FLAT_MS)]


def _gib(mib: int) -> str:
    return f"{mib / 1024:g} GiB" if mib >= 512 else f"{mib} MiB"
