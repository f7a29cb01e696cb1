"""Verbs that look at VMs, pause them and let them run."""

from collections.abc import Callable
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import print_json, print_labels, print_table

_RUNNING, _PAUSED, _SHUT_OFF = 1, 3, 5  # virDomainState

_LIST_FLAGS = (
    ("all", "Also VMs that are shut off."),
    ("inactive", "Only VMs that are shut off."),
    ("state-running", "Those that run."),
    ("state-paused", "Those that are paused."),
    ("state-shutoff", "Those that are shut off."),
    ("state-other", "Those in other states."),
    ("with-snapshot", "Those that have snapshots."),
    ("without-snapshot", "Those that have none."),
    ("persistent", "All: what is kept of a VM outlives its QEMU."),
    ("transient", "None, for the same reason."),
)


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "list")
    @_list_flags
    @click.option("--table", is_flag=True, help="As a table; the default.")
    @click.option("--name", is_flag=True, help="Names only.")
    @click.option("--uuid", is_flag=True, help="UUIDs only, or before the names.")
    @click.option("--id", "ids", is_flag=True, help="Ids only: those of the QEMU processes.")
    def list_vms(
        cli: Cli, table: bool, name: bool, uuid: bool, ids: bool, **flags: bool
    ) -> None:
        """List VMs that run, or those asked for."""
        for flag, given in (("name", name), ("uuid", uuid), ("id", ids)):
            if table and given:
                raise click.UsageError(f"Options --table and --{flag} are mutually exclusive")
        with cli.connect() as client:
            vms = client.call("ListVms")["vms"]
        vms = [vm for vm in vms if _is_listed(vm, flags)]
        vms.sort(key=lambda vm: vm["pid"] is None)
        columns = [key for key, given in (("pid", ids), ("uuid", uuid), ("name", name)) if given]
        if cli.json:
            print_json(vms)
        elif columns:
            for vm in vms:
                click.echo(" ".join(str(vm[key] or "-") for key in columns))
        else:
            rows = ((vm["pid"] or "-", vm["name"], vm["state"]) for vm in vms)
            print_table(("Id", "Name", "State"), rows, quiet=cli.quiet)

    @verb(group, "domstate", "domain")
    @click.option("--reason", is_flag=True, help="Also say why.")
    def domstate(cli: Cli, domain: str, reason: bool) -> None:
        """Print a VM's state."""
        vm = _vm(cli, "GetVm", domain)
        if cli.json:
            keys = ("name", "state", "state_number", "reason", "reason_number")
            print_json({key: vm[key] for key in keys})
        else:
            click.echo(f"{vm['state']} ({vm['reason']})" if reason else vm["state"])

    @verb(group, "dominfo", "domain")
    def dominfo(cli: Cli, domain: str) -> None:
        """Print what is known about a VM."""
        vm = _vm(cli, "GetVm", domain)
        if cli.json:
            print_json(vm)
            return
        ram_bytes = vm["ram_bytes"]
        print_labels(
            {
                "Id": vm["pid"] or "-",
                "Name": vm["name"],
                "UUID": vm["uuid"],
                "State": vm["state"],
                "CPU(s)": vm["vcpus"],
                "Max memory": f"{ram_bytes // 1024} KiB" if ram_bytes is not None else None,
                "Machine": vm["machine"],
                "QEMU": vm["qemu_version"],
                "Monitor": vm["qmp"],
                "Snapshots": vm["snapshots"],
                "Current": vm["current_snapshot"] or "-",
                "Problem": vm["problem"],
            }
        )

    for one, key, text in (
        ("domid", "pid", "Print a VM's id: that of its QEMU process."),
        ("domuuid", "uuid", "Print a VM's UUID."),
        ("domname", "name", "Print a VM's name."),
    ):
        _add_lookup(group, one, key, text)

    @verb(group, "suspend", "domain")
    def suspend(cli: Cli, domain: str) -> None:
        """Pause a VM."""
        vm = _vm(cli, "Suspend", domain)
        print_json(vm) if cli.json else click.echo(f"Domain '{vm['name']}' suspended")

    @verb(group, "resume", "domain")
    def resume(cli: Cli, domain: str) -> None:
        """Let a paused VM run."""
        vm = _vm(cli, "Resume", domain)
        print_json(vm) if cli.json else click.echo(f"Domain '{vm['name']}' resumed")


def _list_flags(function: Callable[..., None]) -> Callable[..., None]:
    for flag, text in reversed(_LIST_FLAGS):
        function = click.option(f"--{flag}", is_flag=True, help=text)(function)
    return function


def _is_listed(vm: dict[str, Any], flags: dict[str, bool]) -> bool:
    """Virsh's rules: those that run, unless told otherwise; of what is asked for twice, both."""
    state = vm["state_number"]
    shut_off = state == _SHUT_OFF
    if not flags["all"] and shut_off != (flags["inactive"] or flags["state_shutoff"]):
        return False
    states = {
        "state_running": state == _RUNNING,
        "state_paused": state == _PAUSED,
        "state_shutoff": shut_off,
        "state_other": state not in (_RUNNING, _PAUSED, _SHUT_OFF),
    }
    snapshots = {"with_snapshot": bool(vm["snapshots"]), "without_snapshot": not vm["snapshots"]}
    lasting = {"persistent": True, "transient": False}
    return all(
        any(is_so for flag, is_so in group.items() if flags[flag])
        for group in (states, snapshots, lasting)
        if any(flags[flag] for flag in group)
    )


def _add_lookup(group: click.Group, name: str, key: str, text: str) -> None:
    @verb(group, name, "domain")
    def look_up(cli: Cli, domain: str) -> None:
        vm = _vm(cli, "GetVm", domain)
        print_json({key: vm[key]}) if cli.json else click.echo(vm[key] or "-")

    look_up.help = text


def _vm(cli: Cli, method: str, name: str) -> dict[str, Any]:
    with cli.connect() as client:
        vm: dict[str, Any] = client.call(method, vm=name)["vm"]
        return vm
