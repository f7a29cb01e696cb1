"""`qsnapd`: the daemon's command line."""

import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import click
import trio

import qsnapd
from qsnapd import config
from qsnapd.errors import ConfigError, QsnapError

T = TypeVar("T")

_CONFIG = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    default=Path("/etc/qsnapd/qsnapd.toml"),
    show_default=True,
    help="The configuration file.",
)


@click.group(no_args_is_help=False)
@click.version_option(qsnapd.__version__)
def cli() -> None:
    """Take external checkpoints of running QEMU VMs, over QMP."""


@cli.command()
@_CONFIG
def serve(config_file: Path) -> None:
    """Run in the foreground until SIGTERM; the log goes to stderr."""
    from qsnapd import daemon

    _run(daemon.serve, config_file)


@cli.command()
@_CONFIG
@click.option(
    "--resume-only",
    is_flag=True,
    required=True,
    help="Only let guests run again that a killed daemon left paused.",
)
def reconcile(config_file: Path, resume_only: bool) -> None:
    """Repair what a daemon that was killed left behind; for ExecStopPost=."""
    from qsnapd import daemon

    if _run(daemon.reconcile, config_file):
        raise click.exceptions.Exit(1)  # the log says which guests could not be resumed


@cli.command("faults")
def list_faults() -> None:
    """List the points at which a fault can be planted, to see what it leaves.

    QSNAPD_FAULT=NUMBER:error, :hang, :kill or :stop, in the environment of `qsnapd serve`, makes a
    job fail there, never come further, or the daemon die, or stop until SIGCONT. Several go behind
    commas.
    """
    from qsnapd.faults import Point

    for point in Point:
        click.echo(f"{point.number:4}  {point.name.lower().replace('_', '-'):26}  {point.words}")


@cli.command("exec")
@_CONFIG
@click.argument("vm")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(config_file: Path, vm: str, words: tuple[str, ...]) -> None:
    """Become the QEMU of VM: what qsnapd has planned for it, else WORDS.

    For the ExecStart= of a VM's own unit: qsnapd exec web -- qemu-system-x86_64 ...

    A plan is run once. WORDS run as they are, but on the newest images of the VM's disks.
    """
    from qsnapd.store.pending import Pending
    from qsnapd.vm.become import become_qemu

    settings = config.load(config_file)
    if vm not in settings.vm:
        raise ConfigError(f"{config_file} has no [vm.{vm}]: qsnapd exec takes the name from there")
    pending = Pending.of(settings.daemon.pending_dir, vm)
    become_qemu(pending, words, lambda said: click.echo(f"qsnapd: {said}", err=True))


def main() -> NoReturn:
    """Run the command line and exit: 0 done, else 1."""
    try:
        sys.exit(cli.main(prog_name="qsnapd", standalone_mode=False))
    except click.UsageError as exc:
        click.echo(f"qsnapd: {exc.format_message()}", err=True)
        sys.exit(1)
    except QsnapError as exc:
        click.echo(f"qsnapd: {exc}", err=True)
        sys.exit(1)
    except click.Abort:
        sys.exit(1)


def _run(task: Callable[[config.Config], Awaitable[T]], config_file: Path) -> T:
    settings = config.load(config_file)
    logging.basicConfig(
        stream=sys.stderr,
        level=settings.daemon.log_level.upper(),
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return trio.run(task, settings)
    except BaseExceptionGroup as group:
        foreseen, bugs = group.split(QsnapError)
        if foreseen is None or bugs is not None:
            raise  # a bug: with its traceback
        raise _first(foreseen) from None


def _first(group: BaseExceptionGroup[QsnapError]) -> QsnapError:
    """Return the failure in the nurseries' wrapping; of several, the first."""
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
