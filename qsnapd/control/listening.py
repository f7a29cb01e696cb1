"""The listening socket: systemd's, or one of our own."""

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import trio

from qsnapd.control.authorization import Access
from qsnapd.errors import ControlError

_FIRST_ACTIVATED_FD = 3  # sd_listen_fds(3)
_BACKLOG = 128


def open_listener(path: Path, access: Access) -> trio.SocketListener:
    """Return a socket that listens for clients: the one systemd passed, else one at *path*.

    On success: a socket of our own belongs to the reader group, or the operator group if
    there is no reader group (mode 0660), else to nobody but our user (0600).
    On failure: no file is left that was not there before.
    Raises:
      ControlError: another daemon answers at *path*, a file that is no socket lies there,
        or it cannot be created.
    """
    return trio.SocketListener(trio.socket.from_stdlib_socket(_activated() or _bound(path, access)))


def _activated() -> socket.socket | None:
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # not for the QEMUs we start
    if count != "1":
        raise ControlError(f"systemd passed {count or 'no'} sockets, one is expected")
    passed = socket.socket(fileno=_FIRST_ACTIVATED_FD)
    passed.set_inheritable(False)
    if passed.family != socket.AF_UNIX or not passed.getsockopt(
        socket.SOL_SOCKET, socket.SO_ACCEPTCONN
    ):
        raise ControlError("the socket systemd passed is not a listening unix socket")
    return passed


def _bound(path: Path, access: Access) -> socket.socket:
    with ExitStack() as undo:
        listener = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            _remove_stale(path)
            listener.bind(str(path))
            undo.callback(path.unlink)
            # Nobody gets in before listen(), so there is no moment with wrong rights.
            gid = access.reader_gid if access.reader_gid is not None else access.operator_gid
            path.chmod(0o600 if gid is None else 0o660)
            if gid is not None:
                os.chown(path, -1, gid)
            listener.listen(_BACKLOG)
        except OSError as exc:
            raise ControlError(f"cannot listen at {path}: {exc.strerror or exc}") from exc
        undo.pop_all()
        return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that is gone; one that answers is left alone."""
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise ControlError(f"cannot listen at {path}: a file that is no socket lies there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog answers EAGAIN: somebody listens
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        except BlockingIOError:
            raise ControlError(f"another daemon listens at {path}") from None
        else:
            raise ControlError(f"another daemon listens at {path}")
