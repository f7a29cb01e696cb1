"""The root of the running daemon.

Four nurseries, because they end differently: accepting ends at once, jobs get time to end
or to undo themselves, their clients a moment to hear how, and the supervisors, which hold
the sessions that jobs need for undoing, end last.
"""

import logging
import os
import resource
import signal
import socket
from functools import partial

import trio

from qsnapd import faults
from qsnapd.config import Config, VmConfig
from qsnapd.control.authorization import Access
from qsnapd.control.listening import open_listener
from qsnapd.control.server import Server
from qsnapd.daemon.events import EventHub
from qsnapd.daemon.fleet import Fleet
from qsnapd.daemon.host import LocalHost
from qsnapd.daemon.launchers import launcher_for, launcher_for_clone
from qsnapd.daemon.limits import Limits
from qsnapd.qmp.agent import GuestAgent
from qsnapd.store.layout import Store
from qsnapd.vm.launcher import Launcher
from qsnapd.vm.provisions import Provisions
from qsnapd.vm.spawn import Spawn

DRAIN_LIMIT_S = 20.0
"""How long a running job may go on after SIGTERM before it is cancelled and undone."""
LAST_WORDS_LIMIT_S = 0.5
"""How long clients may take to read the last replies."""
FILES_WANTED = 4096
"""Open at once: some hundred clients, and about ten for each VM. Not more than that, because the
QEMUs that are started inherit it, and close each that there might be when they run a script."""

_log = logging.getLogger(__name__)


async def serve(config: Config) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    On return: no job is running, no guest is held, nobody is served.
    Raises: StoreError: the state directory cannot be used. ControlError: the socket cannot.
    """
    _allow_files()
    settings = config.daemon
    faults.plant_from_environment()
    access = Access.of_groups(operator=settings.operator_group, reader=settings.reader_group)
    events = EventHub()
    with Store(settings.state_dir) as store:
        async with trio.open_nursery() as watching:
            fleet = Fleet(
                *(store, events.publish, watching),
                qemu_img=settings.qemu_img,
                clone_launcher=partial(_clone_launcher, config),
                limits=Limits.of(settings),
            )
            for name, vm in config.vm.items():
                fleet.add(
                    *(name, vm.qmp, launcher_for(name, config)),
                    instead=vm.instead,
                    provisions=_provisions(vm),
                    configured=True,
                )
            await fleet.open_clones()
            async with trio.open_nursery() as talking:
                async with trio.open_nursery() as jobs:
                    host = LocalHost(fleet, events, jobs, qemu_img=settings.qemu_img)
                    await _accept_until_told(config, Server(host, access), access, talking)
                    jobs.cancel_scope.deadline = trio.current_time() + DRAIN_LIMIT_S
                talking.cancel_scope.deadline = trio.current_time() + LAST_WORDS_LIMIT_S
            watching.cancel_scope.cancel()


def _allow_files() -> None:
    """Raise our own limit of open files, as far as the host lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < FILES_WANTED:
        wanted = FILES_WANTED if hard == resource.RLIM_INFINITY else min(hard, FILES_WANTED)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _provisions(vm: VmConfig) -> Provisions:
    return Provisions(
        agent=GuestAgent(vm.agent) if vm.agent is not None else None,
        freeze_limit_s=vm.freeze_limit_s,
        hook=vm.hook or (),
        hold_limit_s=vm.hold_limit_s,
        quota_bytes=vm.quota_bytes,
    )


def _clone_launcher(config: Config, source: str, clone: str) -> Launcher:
    return launcher_for_clone(source, clone, config) if source in config.vm else Spawn()


async def _accept_until_told(
    config: Config, server: Server, access: Access, talking: trio.Nursery
) -> None:
    async with trio.open_nursery() as accepting:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            listener = open_listener(config.daemon.socket, access)
            accepting.start_soon(
                partial(
                    trio.serve_listeners, server.handle, [listener], handler_nursery=talking
                )
            )
            notify("READY=1")
            _log.info("serving %d VMs on %s", len(config.vm), config.daemon.socket)
            async for number in signals:
                _log.info("%s: ending", signal.Signals(number).name)
                break
        notify("STOPPING=1")
        accepting.cancel_scope.cancel()


def notify(state: str) -> None:
    """Tell the service manager, if there is one (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(state.encode())
        except OSError as exc:
            _log.warning("cannot notify %s: %s", address, exc.strerror)
