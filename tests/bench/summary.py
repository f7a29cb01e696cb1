"""From measurements to the ratios that matter, and whether they are what was promised."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from tests.bench.notebook import (
    BACKGROUND,
    FLOOR,
    HASHED,
    QSNAPCTL,
    STRATEGIES,
    Measurement,
    Subject,
)

PAUSE_OVER_FLOOR = 1.5
IMAGE_OVER_RAM = 1.02
CPU_OVER_TOTAL = 0.05
LIST_MS = 200.0

Values = dict[str, float]
"""What was measured of one subject in one round, by measure."""


@dataclass(frozen=True)
class Line:
    """One line of the summary: a quantity of one subject over all rounds."""

    qemu: str
    quantity: str
    subject: str
    values: tuple[float, ...]
    unit: str = ""
    """Empty for a ratio."""
    target: float | None = None
    """The median must not be above it."""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def missed(self) -> bool:
        return self.target is not None and self.median > self.target

    def as_json(self) -> dict[str, object]:
        return {
            "kind": "summary",
            "qemu": self.qemu,
            "quantity": self.quantity,
            "subject": self.subject,
            "unit": self.unit,
            "median": self.median,
            "lowest": min(self.values),
            "highest": max(self.values),
            "n": len(self.values),
            "target": self.target,
            "met": None if self.target is None else not self.missed,
        }


class Results:
    """The measurements on one QEMU, put together again by subject and round."""

    def __init__(self, qemu: str, measurements: Iterable[Measurement]) -> None:
        self.qemu = qemu
        self._rounds: dict[str, dict[int, Values]] = {}
        for measurement in measurements:
            if measurement.qemu == qemu:
                rounds = self._rounds.setdefault(measurement.subject, {})
                rounds.setdefault(measurement.round, {})[measurement.measure] = measurement.value

    @classmethod
    def by_qemu(cls, measurements: Sequence[Measurement]) -> list[Self]:
        return [cls(qemu, measurements) for qemu in dict.fromkeys(m.qemu for m in measurements)]

    def values(self, subject: Subject, value: Callable[[Values], float]) -> tuple[float, ...]:
        """Return *value* of each round of *subject* in which all that it takes was measured."""
        found = []
        for values in self._rounds.get(subject.name, {}).values():
            try:
                found.append(value(values))
            except KeyError:
                continue
        return tuple(found)

    def over(self, subject: Subject, other: Subject, measure: str) -> tuple[float, ...]:
        """Return the ratios of *subject* to *other* in the same round."""
        others = self._rounds.get(other.name, {})
        return tuple(
            values[measure] / others[number][measure]
            for number, values in self._rounds.get(subject.name, {}).items()
            if number in others
        )


def image_over_ram(values: Values) -> float:
    return values["image_bytes"] / values["ram_bytes"]


def cpu_over_total(values: Values) -> float:
    return values["cpu_s"] / values["total_s"]


def summarize(results: Results) -> list[Line]:
    """Return the lines about one QEMU, in the order in which they are read best."""
    lines: list[Line] = []

    def add(
        quantity: str,
        subjects: Iterable[Subject],
        value: Callable[[Values], float],
        *,
        unit: str = "",
        target: float | None = None,
    ) -> None:
        for subject in subjects:
            values = results.values(subject, value)
            lines.append(Line(results.qemu, quantity, subject.name, values, unit, target))

    add("pause", (FLOOR, *STRATEGIES), lambda v: v["pause_ms"], unit="ms")
    over_floor = results.over(BACKGROUND, FLOOR, "pause_ms")
    lines.append(
        Line(results.qemu, "pause / floor", BACKGROUND.name, over_floor, target=PAUSE_OVER_FLOOR)
    )
    add("total / dd", STRATEGIES, lambda v: v["total_s"] / v["dd_s"])
    add("image / RAM in use", STRATEGIES, image_over_ram, target=IMAGE_OVER_RAM)
    add("daemon's CPU / total", STRATEGIES, cpu_over_total, target=CPU_OVER_TOTAL)
    # a hash is paid for by whoever asks for it
    add("daemon's CPU / total", (HASHED,), cpu_over_total)
    add("daemon's CPU", STRATEGIES, lambda v: v["cpu_s"] * 1000, unit="ms")
    add("qemu-img's CPU", STRATEGIES, lambda v: v["qemu_img_s"] * 1000, unit="ms")
    add("time", (QSNAPCTL,), lambda v: v["list_s"] * 1000, unit="ms", target=LIST_MS)
    return [line for line in lines if line.values]
