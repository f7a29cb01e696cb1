"""The targets under atheris, which watches the branches that inputs take: each in its own process.

To be imported before anything of qsnapd is, which it instruments for that. One process does so
and forks the others, because it takes seconds.
"""

import hashlib
import io
import logging
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from random import Random

import atheris

with (
    redirect_stderr(io.StringIO()),  # it names each module
    atheris.instrument_imports(include=["qsnapd", "qemu.qmp"]),
):
    from tests.fuzz.bounds import bounded
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.targets.target import Target

INPUT_LIMIT_S = 60
"""By the clock: longer than any deadline that a target waits for."""
RSS_LIMIT_MB = 1024
LINES_SHOWN = 40
_DONE = 0

__all__ = ["TARGETS", "Outcome", "run_all"]


@dataclass(frozen=True)
class Outcome:
    """What became of one target."""

    name: str
    inputs: int
    edges: int
    peak_mb: int
    cpu_s: float
    failure: str | None
    """The end of what it said, if something broke."""


@dataclass
class _Running:
    name: str
    folder: Path
    """For what it writes; gone when it has ended."""

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def outcome(self, status: int, used: resource.struct_rusage) -> Outcome:
        said = self.log.read_text(errors="replace")
        return Outcome(
            name=self.name,
            inputs=_last(r"number_of_executed_units:\s+(\d+)", said),
            edges=_last(r"cov: (\d+)", said),
            peak_mb=_last(r"peak_rss_mb:\s+(\d+)", said),
            cpu_s=used.ru_utime + used.ru_stime,
            failure=None if status == _DONE else "\n".join(said.splitlines()[-LINES_SHOWN:]),
        )


def run_all(
    runs: Mapping[str, int], *, seed: int, failures: Path, jobs: int
) -> Iterator[Outcome]:
    """Feed each target as many inputs as *runs* says, or until something breaks.

    What broke it is left in *failures*. Up to *jobs* targets at once; yields them as they end.
    """
    waiting = list(runs)
    running: dict[int, _Running] = {}
    with _scratch() as above:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                child = _Running(name, above / name)
                child.folder.mkdir()
                if (pid := os.fork()) == 0:
                    _become(child, runs[name], seed, failures)
                running[pid] = child
            pid, status, used = os.wait3(0)
            child = running.pop(pid)
            yield child.outcome(status, used)
            shutil.rmtree(child.folder)


@contextmanager
def _scratch() -> Iterator[Path]:
    """In memory, where there is such a place: all of it is written and removed many times."""
    above = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=above) as folder:
        yield Path(folder)


def _become(child: _Running, runs: int, seed: int, failures: Path) -> None:
    """Never returns."""
    status = 1
    try:
        log = os.open(child.log, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.dup2(log, 1)
        os.dup2(log, 2)
        logging.disable(logging.CRITICAL)
        tempfile.tempdir = str(child.folder)
        options = [
            f"-runs={runs}",
            f"-seed={seed}",
            f"-max_len={TARGETS[child.name].max_bytes}",
            f"-timeout={INPUT_LIMIT_S}",
            f"-report_slow_units={INPUT_LIMIT_S}",
            f"-rss_limit_mb={RSS_LIMIT_MB}",
            f"-artifact_prefix={failures}/{child.name}-",
            "-print_final_stats=1",
        ]
        fuzz(TARGETS[child.name], child.folder / "corpus", failures, options)
        status = _DONE
    finally:
        os._exit(status)


def fuzz(target: Target, corpus: Path, failures: Path, options: list[str]) -> None:
    """Hand *target* over to libFuzzer, which ends the process if something breaks.

    An input that does so is left in *failures*, as those are that libFuzzer itself gives up.
    """
    corpus.mkdir()
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)

    def spoil(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.randrange(2):
            mutated: bytes = atheris.Mutate(data, max_size)
            return mutated
        return target.spoil(bytes(data), random)[:max_size]

    with target.open() as feed:

        def feed_once(data: bytes) -> None:
            try:
                with bounded(len(data)):
                    feed(data)
            except BaseException:
                digest = hashlib.sha256(data).hexdigest()
                (failures / f"{target.name}-{digest[:16]}").write_bytes(data)
                raise

        atheris.Setup([target.name, *options, str(corpus)], feed_once, custom_mutator=spoil)
        atheris.Fuzz()


def _last(pattern: str, said: str) -> int:
    found = re.findall(pattern, said)
    return int(found[-1]) if found else 0
