"""Who gets which role."""

import grp
import os

import pytest
import trio

from qsnapd.control.authorization import Access, Peer, Role, require
from qsnapd.errors import AccessDenied, ConfigError

ACCESS = Access(operator_gid=70, reader_gid=71)


@pytest.mark.parametrize(
    ("uid", "groups", "role"),
    [
        (0, {0}, Role.ADMIN),
        (1234, {100}, Role.NONE),
        (1234, {100, 71}, Role.READER),
        (1234, {70, 71}, Role.OPERATOR),
        (1234, {70}, Role.OPERATOR),
    ],
)
def test_groups_give_roles(uid: int, groups: set[int], role: Role) -> None:
    assert ACCESS.role(Peer(pid=1, uid=uid, groups=frozenset(groups))) is role


def test_the_daemons_own_user_is_admin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert Access().role(Peer(1, 1234, frozenset({100}))) is Role.ADMIN
    assert Access().role(Peer(1, 1235, frozenset({100}))) is Role.NONE


def test_the_kernel_tells_who_it_is() -> None:
    ours, theirs = trio.socket.socketpair()
    with ours, theirs:
        peer = Peer.of(ours)
    assert (peer.pid, peer.uid) == (os.getpid(), os.getuid())
    assert peer.groups == {os.getgid(), *os.getgroups()}


def test_groups_are_looked_up_by_name() -> None:
    group = grp.getgrall()[0]
    assert Access.of_groups(operator=group.gr_name, reader=None) == Access(group.gr_gid, None)
    with pytest.raises(ConfigError, match=r"daemon\.reader_group: there is no group 'no such'"):
        Access.of_groups(operator=None, reader="no such")


def test_a_refusal_says_who_may() -> None:
    require(Role.OPERATOR, Role.READER, "ListVms")
    with pytest.raises(AccessDenied, match="AbortJob is for members of the operator group"):
        require(Role.READER, Role.OPERATOR, "AbortJob")
