"""Turning this process into a VM's QEMU: the one that is planned, or the one it was told of.

`qsnapd exec` is the same process before and after, so that what its service manager gave it
(main process, cgroup, descriptors, credentials) is QEMU's. Everything here blocks.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from qsnapd.errors import Blocked, QsnapError, VmError
from qsnapd.model.plan import Launch
from qsnapd.store.pending import NewestDisk, Pending
from qsnapd.vm.argv import parse_options, words_of
from qsnapd.vm.disk_options import DiskOptions, Mention
from qsnapd.vm.identity import key_of
from qsnapd.vm.proc import FileKey


def become_qemu(pending: Pending, words: Sequence[str], tell: Callable[[str], None]) -> NoReturn:
    """Run the pending plan, if there is one, else *words* on the newest images of the VM's disks.

    *tell* hears what is done in place of what the words say.
    On failure: nothing is started, and the plan is pending still.
    Raises: StoreError: a plan may be pending that cannot be had. Blocked: the words would
      write to an image that belongs to a snapshot. VmError: the program cannot be executed.
    """
    plan = pending.take()
    if plan is None:
        newest = on_newest_images(words, pending.newest_disks(), cwd=os.getcwd(), tell=tell)
        _execute(newest[0], newest, os.environ, search=True)
    launch = plan.launch
    tell(f"running what qsnapd has planned for VM {plan.vm} (plan {launch.token}), once")
    try:
        os.chdir(launch.cwd)
        _change_user(launch)
        environment = {**os.environ, **dict(launch.environment), "PWD": launch.cwd}
        _execute(launch.executable, launch.argv, environment)
    except OSError as exc:
        failure = VmError(f"cannot start in {launch.cwd} what is planned: {exc.strerror}")
        _put_back(pending)
        raise failure from exc
    except QsnapError:
        _put_back(pending)
        raise


def on_newest_images(
    words: Sequence[str],
    disks: Sequence[NewestDisk],
    *,
    cwd: str,
    tell: Callable[[str], None] = lambda _: None,
    identify: Callable[[str], FileKey | None] = key_of,
) -> tuple[str, ...]:
    """*words*, with the newest image of a disk where an older one of its chain is named.

    A service's command line names the image that the disk was on before the first snapshot:
    to write to that would destroy the snapshot. Images that are gone, and disks of which the
    words name nothing that is known, are left to whoever wrote the words.

    Raises: Blocked: the words name several images of one disk, or in a way that an overlay
      cannot take on.
    """
    options = DiskOptions(parse_options(words[1:]))
    changed = False
    for disk in disks:
        newest, *older = disk.chain
        if identify(newest.path) is None:
            continue
        mentions = list(options.mentions())
        keys = {mention: _key(mention, cwd, identify) for mention in mentions}
        if any(identify(newest.path) == key for key in keys.values()):
            continue
        for image in older:
            meant = identify(image.path) or (image.device, image.inode)
            named = [mention for mention, key in keys.items() if key == meant]
            if len(named) > 1:
                raise Blocked(
                    f"disk {disk.target}: the command line names {image.path} more than once, "
                    f"and a snapshot needs it as it is. Name {newest.path} for the disk instead"
                )
            if named:
                tell(f"disk {disk.target}: using {newest.path} in place of {image.path}")
                options.replace(named[0], newest.path)
                changed = True
                break
    return (words[0], *words_of(options.options())) if changed else tuple(words)


def _key(
    mention: Mention, cwd: str, identify: Callable[[str], FileKey | None]
) -> FileKey | None:
    return identify(os.path.normpath(os.path.join(cwd, mention.filename)))


def _change_user(launch: Launch) -> None:
    """Be who the plan's QEMU is to be. Raises: VmError: this user cannot."""
    uid = os.geteuid()
    if uid == launch.uid:
        return
    if uid != 0:
        raise VmError(
            f"what is planned is to run as user {launch.uid}, and this is user {uid}: set User= "
            "of the unit to the user that the VM's QEMU runs as"
        )
    # Never as root what ran as somebody else: a command line is what its process says it is.
    os.setgroups(launch.groups)
    os.setresgid(launch.gid, launch.gid, launch.gid)
    os.setresuid(launch.uid, launch.uid, launch.uid)


def _execute(
    program: str, words: Sequence[str], environment: Mapping[str, str], *, search: bool = False
) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]  # by Python, and that would be inherited
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        if search:
            os.execvpe(program, list(words), environment)
        os.execve(program, list(words), environment)
    except OSError as exc:
        raise VmError(f"cannot execute {program}: {exc.strerror}") from exc
    raise AssertionError("exec does not return")


def _put_back(pending: Pending) -> None:
    with suppress(QsnapError):  # the failure that is on its way tells more
        pending.put_back()
