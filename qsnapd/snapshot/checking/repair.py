"""Putting right what is safe to put right: nothing that anybody could still need.

Everything here blocks. Each step looks once more at what it removes, so that doing it twice,
or beside another daemon's job, removes nothing else.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from qsnapd.errors import StoreError
from qsnapd.image.files import remove_if_ours
from qsnapd.model.findings import Finding
from qsnapd.snapshot.checking.facts import (
    Facts,
    abandoned_files,
    abandoned_partials,
    abandoned_views,
)
from qsnapd.snapshot.moving import imported
from qsnapd.store.snapshots import VmStore

Step = tuple[str, str, Callable[[], object]]
"""The code of the findings that it mends, the path they begin with, and what it does."""

_log = logging.getLogger(__name__)


def repair(
    store: VmStore, facts: Facts, findings: Sequence[Finding], *, before_s: float
) -> tuple[Finding, ...]:
    """Mend what can be; returns all findings, marked. *before_s*: when this daemon began.

    Preconditions: no job changes the VM. A step that fails leaves its finding unmarked.
    """
    mended: list[tuple[str, str]] = []
    for code, path, step in _steps(store, facts, before_s):
        if not any(_is_about(finding, code, path) for finding in findings):
            continue
        try:
            step()
            mended.append((code, path))
        except (StoreError, OSError) as exc:
            _log.warning("VM %s: %s is not repaired: %s", store.vm, code, exc)
    return tuple(
        finding.model_copy(update={"repaired": True})
        if any(_is_about(finding, code, path) for code, path in mended)
        else finding
        for finding in findings
    )


def _is_about(finding: Finding, code: str, path: str) -> bool:
    return finding.code == code and finding.what.startswith(path)


def _steps(store: VmStore, facts: Facts, before_s: float) -> Iterator[Step]:
    yield "current-unknown", "", partial(_forget_current, store, facts.current)
    yield "leases-unreadable", "", store.leases.prune
    yield "lease-stale", "", store.leases.prune
    for part in abandoned_partials(facts):
        path = str(store.partial_path(part.name))
        yield "partial-abandoned", path, partial(_unstage, store, part.name, before_s)
    for name in abandoned_views(facts):
        view = store.directory / name
        yield "view-abandoned", str(view), partial(view.unlink, missing_ok=True)
    for leftover in abandoned_files(facts):
        if leftover.is_old:
            step = partial(remove_if_ours, Path(leftover.path), leftover.key[1])
            yield "file-abandoned", leftover.path, step


def _forget_current(store: VmStore, name: str) -> None:
    if store.current_as_written() == name and not store.path(name).exists():
        store.set_current(None)


def _unstage(store: VmStore, name: str, before_s: float) -> None:
    imported.remove_leftovers(store, before_s)  # also what an import has put elsewhere
    if not store.unstage(name):
        raise StoreError(f"{store.partial_path(name)} holds what qsnapd has not put there")
