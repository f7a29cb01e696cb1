"""Does the bench work? How well qsnapd does is for people to judge, on a quiet machine."""

import json
import subprocess
import sys
from pathlib import Path

from tests.bench.notebook import BACKGROUND, FLOOR, Measurement
from tests.bench.summary import PAUSE_OVER_FLOOR, Line, Results, summarize
from tests.parts import BACKPORTS_QEMU, ROOT, SYSTEM_QEMU

QUICK_LIMIT_S = 240.0


def test_a_quick_bench_measures_everything(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.bench", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=QUICK_LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    summary = {
        (row["qemu"], row["quantity"], row["subject"]): row
        for row in rows
        if row["kind"] == "summary"
    }
    # not every host lets a user have userfaultfd; the bench then says so
    strategies = ["precopy", "stopped"]
    if "neither background nor floor" not in done.stdout:
        strategies.append("background")
    for qemu in (BACKPORTS_QEMU, SYSTEM_QEMU):
        if "background" in strategies:
            assert summary[qemu, "pause / floor", "background"]["n"] == 2
        assert summary[qemu, "time", "qsnapctl list"]["median"] > 0
        for strategy in strategies:
            assert summary[qemu, "pause", strategy]["median"] > 0
            assert summary[qemu, "total / dd", strategy]["median"] > 0
            assert summary[qemu, "daemon's CPU / total", strategy]["median"] > 0
            # what is not written cannot be restored: this one holds on any machine
            assert summary[qemu, "image / RAM in use", strategy]["median"] >= 0.99
    missed = sum(row["met"] is False for row in summary.values())
    assert done.stdout.count("TARGET MISSED") == missed
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def pauses(subject: str, *values_ms: float) -> list[Measurement]:
    return [Measurement("9.9", subject, n, "pause_ms", v) for n, v in enumerate(values_ms)]


def summary_of(*measurements: Measurement) -> dict[tuple[str, str], Line]:
    [results] = Results.by_qemu(measurements)
    return {(line.quantity, line.subject): line for line in summarize(results)}


def test_ratios_are_of_the_same_round() -> None:
    lines = summary_of(*pauses(FLOOR.name, 10, 100, 20), *pauses(BACKGROUND.name, 20, 110, 24))
    ratio = lines["pause / floor", BACKGROUND.name]
    assert ratio.values == (2.0, 1.1, 1.2)
    assert ratio.median == 1.2
    assert not ratio.missed
    assert lines["pause", FLOOR.name].median == 20


def test_a_missed_target_is_known_as_such() -> None:
    lines = summary_of(*pauses(FLOOR.name, 10), *pauses(BACKGROUND.name, 16))
    ratio = lines["pause / floor", BACKGROUND.name]
    assert ratio.target == PAUSE_OVER_FLOOR
    assert ratio.missed
    assert ratio.as_json()["met"] is False
