"""Verbs that look at VMs, pause them and let them run."""

from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.output import print_json, print_labels, print_table

_SHUT_OFF = 5  # virDomainState


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "list")
    @click.option("--all", "show_all", is_flag=True, help="Also VMs that are shut off.")
    @click.option("--name", "only_names", is_flag=True, help="Names only.")
    def list_vms(cli: Cli, show_all: bool, only_names: bool) -> None:
        """List VMs."""
        with cli.connect() as client:
            vms = client.call("ListVms")["vms"]
        vms = [vm for vm in vms if show_all or vm["state_number"] != _SHUT_OFF]
        if cli.json:
            print_json(vms)
        elif only_names:
            click.echo("".join(f"{vm['name']}\n" for vm in vms), nl=False)
        else:
            rows = ((vm["pid"] or "-", vm["name"], vm["state"]) for vm in vms)
            print_table(("Id", "Name", "State"), rows)

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

    @verb(group, "domblklist", "domain")
    @click.option("--details", is_flag=True, help="Also type, format and why one is left out.")
    def domblklist(cli: Cli, domain: str, details: bool) -> None:
        """List a VM's disks and the files behind them."""
        with cli.connect() as client:
            disks = client.call("ListDisks", vm=domain)["disks"]
        if cli.json:
            print_json(disks)
        elif details:
            print_table(
                ("Target", "Format", "Chain", "Snapshot", "Source"),
                (
                    (
                        disk["target"],
                        disk["format"],
                        disk["chain_depth"],
                        disk["left_out"] or "external",
                        disk["path"] or "-",
                    )
                    for disk in disks
                ),
            )
        else:
            rows = ((disk["target"], disk["path"] or "-") for disk in disks)
            print_table(("Target", "Source"), rows)

    @verb(group, "suspend", "domain")
    def suspend(cli: Cli, domain: str) -> None:
        """Pause a VM."""
        vm = _vm(cli, "Suspend", domain)
        print_json(vm) if cli.json else click.echo(f"Domain '{domain}' suspended")

    @verb(group, "resume", "domain")
    def resume(cli: Cli, domain: str) -> None:
        """Let a paused VM run."""
        vm = _vm(cli, "Resume", domain)
        print_json(vm) if cli.json else click.echo(f"Domain '{domain}' resumed")


def _vm(cli: Cli, method: str, name: str) -> dict[str, Any]:
    with cli.connect() as client:
        vm: dict[str, Any] = client.call(method, vm=name)["vm"]
        return vm
