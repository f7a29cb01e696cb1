"""The call that looks whether a snapshot is sound."""

from qsnapd.control.authorization import Role
from qsnapd.control.host import Host
from qsnapd.control.methods.base import Method, More
from qsnapd.model.base import Frozen
from qsnapd.model.names import SnapshotName, VmName
from qsnapd.model.verification import Verification


class VerificationReply(Frozen):
    verification: Verification


class VerifySnapshot(Method):
    """Look whether a snapshot is what it was when it was taken; lists all that is wrong.

    The VM is not touched. There is one reply; with "more", a client that leaves ends the
    verification.
    """

    role = Role.OPERATOR
    vm: VmName
    name: SnapshotName
    deep: bool = False
    """Also load the memory into a QEMU that never runs: would it restore?"""

    async def answer(self, host: Host, more: More | None) -> VerificationReply:
        verification = await host.verify(self.vm, self.name, deep=self.deep)
        return VerificationReply(verification=verification)
