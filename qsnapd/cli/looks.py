"""Verbs that show snapshots."""

from collections.abc import Callable
from typing import Any

import click

from qsnapd.cli import listing
from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import local_time, print_json, print_labels, print_table, print_tree, size
from qsnapd.errors import UnknownSnapshot

_LIST_FLAGS = (
    ("tree", "Show which one was taken on top of which."),
    ("name", "Names only."),
    ("parent", "Also the parent's name."),
    ("roots", "Those without a parent."),
    ("topological", "None before its parent."),
    ("current", "Those taken on top of the current snapshot."),
    ("descendants", "With --from or --current: also what came from these."),
    ("leaves", "Those without children."),
    ("no-leaves", "Those with children."),
    ("metadata", "All: qsnapd keeps what it knows of each."),
    ("no-metadata", "None, for the same reason."),
    ("inactive", "None: only VMs that run are taken snapshots of."),
    ("active", "Those with memory."),
    ("disk-only", "Those without."),
    ("internal", "None: every snapshot has files of its own."),
    ("external", "All, for the same reason."),
)


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-list", "domain", "from?")
    @_list_flags
    def snapshot_list(cli: Cli, domain: str, **options: Any) -> None:  # noqa: ANN401
        """List a VM's snapshots, by name.

        --from NAME or --current list those taken directly on top of one.
        """
        given = {flag.replace("_", "-"): bool(value) for flag, value in options.items()}
        listing.require_sense(given)
        with cli.connect() as client:
            snapshots = client.call("ListSnapshots", vm=domain)["snapshots"]
        start = _start(domain, snapshots, options["from"], options["current"])
        _print_list(cli, listing.listed(snapshots, given, start), given)

    @verb(group, "snapshot-info", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="Of the current snapshot.")
    def snapshot_info(cli: Cli, domain: str, snapshotname: str | None, current: bool) -> None:
        """Print what is known about a snapshot."""
        snapshot = chosen(cli, domain, snapshotname, current)
        print_json(snapshot) if cli.json else print_labels(_labels(snapshot))

    @verb(group, "snapshot-parent", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="Of the current snapshot.")
    def snapshot_parent(cli: Cli, domain: str, snapshotname: str | None, current: bool) -> None:
        """Print the name of a snapshot's parent."""
        snapshot = chosen(cli, domain, snapshotname, current)
        if snapshot["parent"] is None:
            raise UnknownSnapshot(f"snapshot '{snapshot['name']}' has no parent")
        print_json({"parent": snapshot["parent"]}) if cli.json else click.echo(snapshot["parent"])


def chosen(cli: Cli, vm: str, name: str | None, current: bool) -> dict[str, Any]:
    """Return the one snapshot that a name or --current means.

    Raises: UsageError: both or none are given. UnknownSnapshot, UnknownVm.
    """
    if name is not None and current:
        raise click.UsageError("--snapshotname and --current are mutually exclusive")
    if current:
        return current_of(cli, vm)
    if name is None:
        raise click.UsageError("--snapshotname or --current is required")
    with cli.connect() as client:
        snapshot: dict[str, Any] = client.call("GetSnapshot", vm=vm, name=name)["snapshot"]
        return snapshot


def current_of(cli: Cli, vm: str) -> dict[str, Any]:
    """Return a VM's current snapshot. Raises: UnknownSnapshot: it has none. UnknownVm."""
    with cli.connect() as client:
        snapshot: dict[str, Any] | None = client.call("GetCurrentSnapshot", vm=vm)["snapshot"]
    if snapshot is None:
        raise UnknownSnapshot(f"domain '{vm}' has no current snapshot")
    return snapshot


def _list_flags(function: Callable[..., None]) -> Callable[..., None]:
    for flag, text in reversed(_LIST_FLAGS):
        function = click.option(f"--{flag}", is_flag=True, help=text)(function)
    return function


def _start(
    vm: str, snapshots: list[listing.Snapshot], name: str | None, current: bool
) -> str | None:
    """The snapshot to list from. Raises: UnknownSnapshot: there is no such one."""
    if name is not None and all(snapshot["name"] != name for snapshot in snapshots):
        raise UnknownSnapshot(f"VM {vm!r} has no snapshot {name!r}")
    if current:
        name = next((snapshot["name"] for snapshot in snapshots if snapshot["current"]), None)
        if name is None:
            raise UnknownSnapshot(f"domain '{vm}' has no current snapshot")
    return name


def _print_list(cli: Cli, snapshots: list[listing.Snapshot], given: listing.Flags) -> None:
    if cli.json:
        print_json(snapshots)
    elif given["tree"]:
        print_tree(listing.parents_within(snapshots))
    elif given["name"]:
        for snapshot in snapshots:
            tail = f"\t{snapshot['parent'] or '-'}" if given["parent"] else ""
            click.echo(f"{snapshot['name']}{tail}")
    else:
        header = ["Name", "Creation Time", "State"]
        rows = [[s["name"], local_time(s["created_at"]), listing.state_of(s)] for s in snapshots]
        if given["parent"]:
            header.append("Parent")
            for row, snapshot in zip(rows, snapshots, strict=True):
                row.append(snapshot["parent"] or "")
        print_table(header, rows, quiet=cli.quiet)


def _labels(snapshot: dict[str, Any]) -> dict[str, object]:
    """Virsh's labels first, in its order, then what virsh cannot tell."""
    memory, manual = snapshot["memory"] or {}, snapshot["manual_disks"]
    left_out = [d["target"] for d in snapshot["left_out"] if d["target"] not in manual]
    labels: dict[str, object] = {
        "Name": snapshot["name"],
        "Domain": snapshot["vm"],
        "Current": "yes" if snapshot["current"] else "no",
        "State": listing.state_of(snapshot),
        "Location": "external",
        "Parent": snapshot["parent"] or "-",
        "Children": snapshot["children"],
        "Descendants": snapshot["descendants"],
        "Metadata": "yes",
        "In use by": ", ".join(snapshot["used_by"]) or None,
        "Description": snapshot["description"] or None,
        "Created": local_time(snapshot["created_at"]),
        "Consistency": snapshot["consistency"],
        "Strategy": snapshot["strategy"],
        "Image format": snapshot["image_format"],
        "Paused": f"{snapshot['paused_ms']:.1f} ms",
        "Took": f"{snapshot['total_ms']:.1f} ms",
        "Memory": memory.get("path", "-"),
        "Memory size": size(memory["size_bytes"]) if memory else None,
        "Allocated": size(memory["allocated_bytes"]) if memory else None,
        "SHA-256": memory.get("sha256"),
        "QEMU": snapshot["qemu_version"],
        "Manual disks": ", ".join(manual) or None,
        "Left out": ", ".join(left_out) or None,
    }
    disks = {f"Disk {disk['target']}": disk["frozen"] for disk in snapshot["disks"]}
    return labels | disks
