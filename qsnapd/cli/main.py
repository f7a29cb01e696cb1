"""`qsnapctl`: virsh's verbs for VMs that run without libvirt.

Exit status: 0 done, 1 it failed, 2 the command line makes no sense.
"""

import json
import sys
from typing import NoReturn

import click

import qsnapd
from qsnapd.cli import clones, events, jobs, launches, restores, snapshots, transfer, verify, vms
from qsnapd.cli.arguments import Cli
from qsnapd.errors import QsnapError

DEFAULT_SOCKET = "/run/qsnapd/io.qsnapd"


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--socket",
    metavar="PATH",
    envvar="QSNAPD_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Where the daemon listens; QSNAPD_SOCKET sets the default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, errors included.")
@click.version_option(qsnapd.__version__)
@click.pass_context
def qsnapctl(context: click.Context, socket: str, as_json: bool) -> None:
    """Take checkpoints of running QEMU VMs and put them back.

    Verbs, flags and output are those of virsh. With --json a verb prints the objects that
    the interface text describes (ask the socket for org.varlink.service
    GetInterfaceDescription), an error is {code, message, effect} on stderr.
    """
    context.obj = Cli(socket=socket, json=as_json)


for module in (vms, snapshots, restores, clones, launches, jobs, events, transfer, verify):
    module.add_to(qsnapctl)


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        status = qsnapctl.main(prog_name="qsnapctl", standalone_mode=False)
    except click.UsageError as exc:
        _complain("usage", exc.format_message(), "none")
        if exc.ctx is not None and not _json_wanted():
            click.echo(f"see: {exc.ctx.command_path} --help", err=True)
        sys.exit(2)
    except QsnapError as exc:
        _complain(exc.code, str(exc), exc.effect)
        sys.exit(1)
    except click.Abort:
        _complain("interrupted", "interrupted", "unknown")
        sys.exit(1)
    sys.exit(status or 0)  # a verb that is done may still bring bad news


def _complain(code: str, message: str, effect: str) -> None:
    if _json_wanted():
        line = json.dumps({"code": code, "message": message, "effect": effect})
    else:
        line = f"error: {message}"
        if effect not in ("none", "rolled-back"):
            line += f" (effect: {effect})"
    click.echo(line, err=True)


def _json_wanted() -> bool:
    # Also when the command line could not be read: then nothing else knows.
    return "--json" in sys.argv[1:]
