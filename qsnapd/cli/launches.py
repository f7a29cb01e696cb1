"""Verbs that show how a VM is started, and start one that was left shut off."""

import shlex
from typing import Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.jobs import follow
from qsnapd.cli.output import print_json

_FD_LOAD = """\
# then, over QMP:
#   {{"execute": "migrate-set-capabilities", "arguments": {{"capabilities": [
#     {{"capability": "mapped-ram", "state": {mapped}}}]}}}}
#   {{"execute": "migrate-incoming", "arguments": {{"uri": "file:{file}"}}}}
# and once query-migrate says "completed":
#   {{"execute": "cont"}}"""


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "domlaunch", "domain", "snapshotname")
    @click.option("--print", "_print", is_flag=True, help="Print only; nothing else is done yet.")
    def domlaunch(cli: Cli, domain: str, snapshotname: str, _print: bool) -> None:
        """Print the commands by which a revert starts QEMU, for a shell."""
        with cli.connect() as client:
            request = {"name": snapshotname}
            launch = client.call("DescribeLaunch", vm=domain, request=request)["launch"]
        print_json(launch) if cli.json else click.echo(_script(launch))

    @verb(group, "start", "domain")
    def start(cli: Cli, domain: str) -> None:
        """Start a VM left shut off by reverting to a snapshot without memory, or a clone."""
        reply = follow(cli, "StartVm", domain)
        print_json(reply) if cli.json else click.echo(f"Domain '{domain}' started")


def _script(launch: dict[str, Any]) -> str:
    lines = [f"# VM {launch['vm']} at snapshot {launch['snapshot']}: a new overlay for each disk"]
    for overlay in launch["overlays"]:
        words = ["qemu-img", "create", "-f", "qcow2", "-F", overlay["backing_format"]]
        words += ["-b", overlay["backing"], overlay["path"]]
        lines.append(shlex.join(words))
    lines.append(f"# as user {launch['uid']}, group {launch['gid']}:")
    lines.append(f"cd {shlex.quote(launch['cwd'])}")
    lines += [f"export {shlex.join([f'{k}={v}'])}" for k, v in _worth_showing(launch)]
    lines.append(launch["command_line"])
    if loading := launch["loading"]:
        mapped = "true" if loading["image_format"] == "mapped-ram" else "false"
        lines.append(_FD_LOAD.format(mapped=mapped, file=loading["memory_file"]))
    return "\n".join(lines)


def _worth_showing(launch: dict[str, Any]) -> list[tuple[str, str]]:
    """Those that are qsnapd's own are for QEMUs that qsnapd waits for."""
    environment: dict[str, str] = launch["environment"]
    return [(name, value) for name, value in environment.items() if name[:7] != "QSNAPD_"]
