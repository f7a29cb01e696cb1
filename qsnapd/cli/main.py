"""`qsnapctl`: virsh's verbs for VMs that run without libvirt.

Exit status, as virsh's: 0 done, 1 it failed or the command line makes no sense.
"""

import json
import sys
from typing import NoReturn

import click

import qsnapd
from qsnapd.cli import (
    clones,
    creates,
    current,
    deletes,
    disks,
    events,
    filesystems,
    fsck,
    jobs,
    launches,
    looks,
    metadata,
    prunes,
    restores,
    shells,
    transfer,
    verify,
    vms,
)
from qsnapd.cli.arguments import Cli
from qsnapd.cli.output import say
from qsnapd.errors import QsnapError

DEFAULT_SOCKET = "/run/qsnapd/io.qsnapd"


class _UnknownVerb(QsnapError):
    code = "unknown-verb"


class _Verbs(click.Group):
    """A verb that does not exist is an error like any other, as with virsh."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            raise _UnknownVerb(f"unknown command: '{args[0]}'")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--socket",
    metavar="PATH",
    envvar="QSNAPD_SOCKET",
    default=DEFAULT_SOCKET,
    show_default=True,
    help="Where the daemon listens; QSNAPD_SOCKET sets the default.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, errors included.")
@click.option("-q", "--quiet", is_flag=True, help="Tables without their header.")
@click.option("-c", "--connect", metavar="URI", hidden=True)
@click.version_option(qsnapd.__version__)
@click.pass_context
def qsnapctl(
    context: click.Context, socket: str, as_json: bool, quiet: bool, connect: str | None
) -> None:
    """Take checkpoints of running QEMU VMs and put them back.

    Verbs, flags and output are those of virsh. With --json a verb prints the objects that
    the interface text describes (ask the socket for org.varlink.service
    GetInterfaceDescription), an error is {code, message, effect} on stderr.
    """
    if connect is not None and not connect.startswith("qemu:///"):
        raise click.UsageError(f"--connect {connect}: only the VMs of this host can be reached")
    context.obj = Cli(socket=socket, json=as_json, quiet=quiet)


for module in (
    vms,
    disks,
    creates,
    current,
    looks,
    metadata,
    restores,
    deletes,
    prunes,
    clones,
    launches,
    filesystems,
    jobs,
    events,
    transfer,
    verify,
    fsck,
    shells,
):
    module.add_to(qsnapctl)


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        status = qsnapctl.main(prog_name="qsnapctl", standalone_mode=False)
    except click.UsageError as exc:
        _complain("usage", exc.format_message(), "none")
        if exc.ctx is not None and not _json_wanted():
            click.echo(f"see: {exc.ctx.command_path} --help", err=True)
        sys.exit(1)
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
    say(line, err=True)


def _json_wanted() -> bool:
    # Also when the command line could not be read: then nothing else knows.
    return "--json" in sys.argv[1:]
