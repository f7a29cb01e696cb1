"""Verbs for running jobs, and how a verb that starts one follows it."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any, Protocol

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import print_json, print_labels, size
from qsnapd.control.client import Client
from qsnapd.errors import QsnapError

_OPERATIONS = {
    "create": "Snapshot",
    "revert": "Snapshot revert",
    "clone": "Snapshot clone",
    "start": "Start",
    "delete": "Snapshot delete",
    "repair": "Snapshot repair",
    "edit": "Snapshot edit",
}
_START = "Start QEMU now, by this command line:"
_TO_DO = {
    "holding": "The guest stands still for the storage to take its own snapshot; then say:"
}
"""What a job that waits for a person wants, by its phase."""
_ENDS = {"done": "Completed", "failed": "Failed", "cancelled": "Cancelled"}


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "domjobinfo", "domain")
    @click.option("--completed", is_flag=True, help="The job that ended last.")
    @click.option("--keep-completed", is_flag=True, help="Accepted: it is always kept.")
    @click.option("--anystats", is_flag=True, help="Accepted: failed jobs are always told of.")
    def domjobinfo(
        cli: Cli, domain: str, completed: bool, keep_completed: bool, anystats: bool
    ) -> None:
        """Print how far a VM's job has come."""
        with cli.connect() as client:
            job = client.call("GetJob", vm=domain, completed=completed)["job"]
            if cli.json:
                print_json(job)
                return
            labels: dict[str, object] = _labels(job) if job else {"Job type": "None"}
            if job and job["kind"] == "create" and job["phase"] == "done":
                labels["Total downtime"] = _downtime(client, job)
        print_labels(labels, width=17)

    @verb(group, "domjobabort", "domain")
    @click.option("--postcopy", is_flag=True, hidden=True)
    def domjobabort(cli: Cli, domain: str, postcopy: bool) -> None:
        """Abort a VM's job; it undoes what it did."""
        with cli.connect() as client:
            job = client.call("AbortJob", vm=domain)["job"]
        if cli.json:
            print_json(job)


class Meter(Protocol):
    """Shows a job."""

    def show(self, job: dict[str, Any]) -> None: ...


def follow(
    cli: Cli, method: str, vm: str, request: dict[str, object] | None = None
) -> dict[str, Any]:
    """Start a job, show its progress on a terminal, and return the last reply.

    If the job waits for a person, say what it wants them to do. Ctrl-C aborts the job and
    waits until it is undone; a second one leaves at once.
    Raises: the QsnapError that ended the job.
    """
    reply: dict[str, Any] = {}
    told: str | None = None
    with (
        cli.connect() as client,
        _abort_on_interrupt(cli) as running,
        open_meter(cli, (request or {}).get("name")) as meter,
    ):
        parameters: dict[str, Any] = {} if request is None else {"request": request}
        for reply in client.stream(method, vm=vm, **parameters):
            if job := reply["job"]:
                running.update(id=job["id"], vm=job["vm"])
                meter.show(job)
                if job["instruction"] not in (None, told):
                    told = job["instruction"]
                    click.echo(f"{_TO_DO.get(job['phase'], _START)}\n{told}", err=True)
    return reply


@contextmanager
def _abort_on_interrupt(cli: Cli) -> Iterator[dict[str, Any]]:
    """Turn Ctrl-C into an abort of the job whose id and VM the block notes."""
    running: dict[str, Any] = {}

    def abort(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if "id" not in running:
            raise KeyboardInterrupt
        # Not click.echo(): the interrupted code may be within it. The job may just have ended.
        os.write(2, b"\naborting the job, undoing what it did (Ctrl-C again: do not wait)\n")
        with suppress(QsnapError), cli.connect() as client:
            client.call("AbortJob", vm=running["vm"], id=running["id"])

    previous = signal.signal(signal.SIGINT, abort)
    try:
        yield running
    finally:
        signal.signal(signal.SIGINT, previous)


class _Silent:
    def show(self, job: dict[str, Any]) -> None:
        pass


def open_meter(cli: Cli, name: object) -> AbstractContextManager[Meter]:
    """A bar on the terminal, if there is one and a person looks at it."""
    if cli.json or not sys.stderr.isatty():
        return nullcontext(_Silent())
    from qsnapd.cli.progress import Bar  # rich takes a while to import

    return Bar(str(name or "snapshot"))


def _downtime(client: Client, job: dict[str, Any]) -> str | None:
    """How long the guest stood still for a snapshot, if that is still there."""
    with suppress(QsnapError):
        snapshot = client.call("GetSnapshot", vm=job["vm"], name=job["snapshot"])["snapshot"]
        return f"{snapshot['paused_ms']:<12.0f} ms"
    return None


def _labels(job: dict[str, Any]) -> dict[str, object]:
    """Virsh's labels first, in its order, then what virsh cannot tell."""
    left_s = job["left_s"]
    data = {
        "processed": size(job["done_bytes"]),
        "remaining": size(max(0, job["total_bytes"] - job["done_bytes"])),
        "total": size(job["total_bytes"]),
    }
    labels: dict[str, object] = {
        "Job type": _ENDS.get(job["phase"], "Unbounded"),
        "Operation": _OPERATIONS[job["kind"]],
        "Time elapsed": f"{job['elapsed_ms']:<12.0f} ms",
        "Time remaining": f"{left_s * 1000:<12.0f} ms" if left_s is not None else None,
        **{f"Data {what}": value for what, value in data.items()},
    }
    if job["kind"] != "delete":
        labels |= {f"Memory {what}": value for what, value in data.items()}
        labels["Memory bandwidth"] = f"{size(job['rate_bytes_per_s'])}/s"
    return labels | {
        "Total downtime": None,
        "Snapshot": job["snapshot"],
        "Phase": job["phase"],
        "Progress": f"{job['percent']:.1f} %",
        "State kept as": job["kept"],
        "Waits for": job["instruction"],
        "Error": job["error"],
    }
