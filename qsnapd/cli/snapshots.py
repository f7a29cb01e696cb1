"""Verbs that take and show snapshots."""

from typing import Any

import click

from qsnapd.cli.arguments import Cli, parse_diskspec, parse_memspec, verb
from qsnapd.cli.jobs import follow
from qsnapd.cli.output import local_time, print_json, print_labels, print_table, print_tree, size
from qsnapd.errors import UnknownSnapshot

_STRATEGIES = click.Choice(["stopped", "precopy", "background"])
_FORMATS = click.Choice(["stream", "mapped-ram"])
_POSITIVE = click.FloatRange(min=0, min_open=True)


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-create-as", "domain", "name?", "description?", rest="diskspec")
    @click.option("--live", is_flag=True, help="Let the guest run while its memory is saved.")
    @click.option("--strategy", type=_STRATEGIES, help="How, instead of --live.")
    @click.option("--image-format", type=_FORMATS, help="Layout of the memory image.")
    @click.option("--memspec", metavar="[file=]PATH", help="Where the memory image goes.")
    @click.option(
        "--diskspec",
        metavar="TARGET[,snapshot=no|external][,file=PATH]",
        multiple=True,
        help="Leave a disk out, or say where its overlay goes. Repeatable.",
    )
    @click.option(
        "--hash/--no-hash", "hashed", default=True, help="Record the memory image's SHA-256."
    )
    @click.option("--timeout", metavar="S", type=_POSITIVE, help="Time limit of a precopy.")
    @click.option(
        "--max-size", metavar="BYTES", type=click.IntRange(min=1), help="Size limit of a precopy."
    )
    @click.option(
        "--on-limit", type=click.Choice(["stop", "abort"]), help="What a precopy does at a limit."
    )
    @click.option("--atomic", is_flag=True, help="Accepted, as snapshots always are.")
    def snapshot_create_as(
        cli: Cli,
        domain: str,
        name: str | None,
        description: str | None,
        live: bool,
        strategy: str | None,
        image_format: str | None,
        memspec: str | None,
        diskspec: tuple[str, ...],
        hashed: bool,
        timeout: float | None,
        max_size: int | None,
        on_limit: str | None,
        atomic: bool,
    ) -> None:
        """Take a checkpoint: memory and disks of one instant."""
        request: dict[str, object] = {
            "name": name,
            "description": description,
            "live": live,
            "strategy": strategy,
            "image_format": image_format,
            "memory_file": parse_memspec(memspec) if memspec is not None else None,
            "disks": [parse_diskspec(spec) for spec in diskspec],
            "hash_memory": hashed,
            "precopy_limit_s": timeout,
            "precopy_limit_bytes": max_size,
            "on_limit": on_limit,
        }
        snapshot = follow(cli, "CreateSnapshot", domain, request)["snapshot"]
        if cli.json:
            print_json(snapshot)
        else:
            click.echo(f"Domain snapshot {snapshot['name']} created")

    @verb(group, "snapshot-list", "domain")
    @click.option("--tree", is_flag=True, help="Show which one was taken on top of which.")
    @click.option("--name", "only_names", is_flag=True, help="Names only.")
    @click.option("--parent", is_flag=True, help="Also the parent's name.")
    def snapshot_list(cli: Cli, domain: str, tree: bool, only_names: bool, parent: bool) -> None:
        """List a VM's snapshots."""
        for flag, given in (("name", only_names), ("parent", parent)):
            if tree and given:
                raise click.UsageError(f"--{flag} and --tree are mutually exclusive")
        with cli.connect() as client:
            snapshots = client.call("ListSnapshots", vm=domain)["snapshots"]
        if cli.json:
            print_json(snapshots)
            return
        snapshots.sort(key=lambda snapshot: snapshot["name"].lower())
        if tree:
            print_tree({snapshot["name"]: snapshot["parent"] for snapshot in snapshots})
        elif only_names:
            for snapshot in snapshots:
                tail = f"\t{snapshot['parent'] or '-'}" if parent else ""
                click.echo(f"{snapshot['name']}{tail}")
        else:
            header = ["Name", "Creation Time", "State"] + (["Parent"] if parent else [])
            rows = ((s["name"], local_time(s["created_at"]), s["state"]) for s in snapshots)
            parents = ((s["parent"] or "",) if parent else () for s in snapshots)
            pairs = zip(rows, parents, strict=True)
            print_table(header, ((*row, *more) for row, more in pairs))

    @verb(group, "snapshot-info", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="Of the current snapshot.")
    def snapshot_info(cli: Cli, domain: str, snapshotname: str | None, current: bool) -> None:
        """Print what is known about a snapshot."""
        snapshot = chosen(cli, domain, snapshotname, current)
        print_json(snapshot) if cli.json else print_labels(_labels(snapshot))

    @verb(group, "snapshot-current", "domain")
    @click.option("--name", "only_name", is_flag=True, help="Its name only.")
    def snapshot_current(cli: Cli, domain: str, only_name: bool) -> None:
        """Print the snapshot that a VM descends from."""
        snapshot = _current(cli, domain)
        if cli.json:
            print_json(snapshot)
        elif only_name:
            click.echo(snapshot["name"])
        else:
            print_labels(_labels(snapshot))

    @verb(group, "snapshot-parent", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="Of the current snapshot.")
    def snapshot_parent(cli: Cli, domain: str, snapshotname: str | None, current: bool) -> None:
        """Print the name of a snapshot's parent."""
        snapshot = chosen(cli, domain, snapshotname, current)
        if snapshot["parent"] is None:
            raise UnknownSnapshot(f"snapshot '{snapshot['name']}' has no parent")
        print_json({"parent": snapshot["parent"]}) if cli.json else click.echo(snapshot["parent"])


def chosen(cli: Cli, vm: str, name: str | None, current: bool) -> dict[str, Any]:
    if name is not None and current:
        raise click.UsageError("--current and a snapshot name are mutually exclusive")
    if current:
        return _current(cli, vm)
    if name is None:
        raise click.UsageError("--snapshotname or --current is required")
    with cli.connect() as client:
        snapshot: dict[str, Any] = client.call("GetSnapshot", vm=vm, name=name)["snapshot"]
        return snapshot


def _current(cli: Cli, vm: str) -> dict[str, Any]:
    with cli.connect() as client:
        snapshot: dict[str, Any] | None = client.call("GetCurrentSnapshot", vm=vm)["snapshot"]
    if snapshot is None:
        raise UnknownSnapshot(f"domain '{vm}' has no current snapshot")
    return snapshot


def _labels(snapshot: dict[str, Any]) -> dict[str, object]:
    """Virsh's labels first, in its order, then what virsh cannot tell."""
    memory = snapshot["memory"] or {}
    labels: dict[str, object] = {
        "Name": snapshot["name"],
        "Domain": snapshot["vm"],
        "Current": "yes" if snapshot["current"] else "no",
        "State": snapshot["state"],
        "Location": "external",
        "Parent": snapshot["parent"] or "-",
        "Children": snapshot["children"],
        "Descendants": snapshot["descendants"],
        "Metadata": "yes",
        "In use by": ", ".join(snapshot["used_by"]) or None,
        "Description": snapshot["description"] or None,
        "Created": local_time(snapshot["created_at"]),
        "Strategy": snapshot["strategy"],
        "Image format": snapshot["image_format"],
        "Paused": f"{snapshot['paused_ms']:.1f} ms",
        "Took": f"{snapshot['total_ms']:.1f} ms",
        "Memory": memory.get("path", "-"),
        "Memory size": size(memory["size_bytes"]) if memory else None,
        "Allocated": size(memory["allocated_bytes"]) if memory else None,
        "SHA-256": memory.get("sha256"),
        "QEMU": snapshot["qemu_version"],
    }
    disks = {f"Disk {disk['target']}": disk["frozen"] for disk in snapshot["disks"]}
    return labels | disks
