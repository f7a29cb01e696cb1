"""What a guest can see that makes its VM that VM: UUID, generation id, context id."""

import hashlib
import uuid
from collections.abc import Sequence

from qsnapd.model.request import Identity
from qsnapd.vm.argv import Option
from qsnapd.vm.members import Members
from qsnapd.vm.own_names import Wishes

_LOWEST_CID = 1 << 30
"""Far from the small numbers that people give."""


def renew_generation_id(options: Sequence[Option]) -> list[Option]:
    """Let a guest that is put back, or copied, see by its generation id that it was.

    The load writes it into the guest's memory and tells the guest by an ACPI event.
    """
    return [_with_new_generation(option) for option in options]


def _with_new_generation(option: Option) -> Option:
    if option.name != "device" or "vmgenid" not in (option.value or ""):
        return option
    members = Members.of(option, "driver")
    if members.get("driver") != "vmgenid" or members.get("guid") == "auto":
        return option  # "auto": QEMU takes a new one at each start
    members.set("guid", str(uuid.uuid4()))
    return Option(option.name, str(members), option.dashes)


def renew_uuid(options: Sequence[Option], wishes: Wishes) -> list[Option]:
    """Give the VM a UUID of its own wherever it has one; a VM without stays without."""
    if wishes.uuid is Identity.KEEP:
        return list(options)
    digest = hashlib.sha256(f"{wishes.seed} uuid".encode()).digest()
    new = str(uuid.UUID(bytes=digest[:16], version=4))
    renewed = []
    for option in options:
        if option.name == "uuid":
            renewed.append(Option(option.name, new, option.dashes))
        elif option.name == "smbios" and "uuid" in (members := Members.of(option)):
            members.set("uuid", new)
            renewed.append(Option(option.name, str(members), option.dashes))
        else:
            renewed.append(option)
            continue
        wishes.notes.append(
            f"UUID {new}: the guest finds it in its SMBIOS tables once it has been reset"
        )
    return renewed


def own_cid(seed: str) -> str:
    """A context id for vsock, which must be another for each VM on a host; random.

    The guest asks for it again after a load.
    """
    digest = hashlib.sha256(f"{seed} cid".encode()).digest()
    return str(_LOWEST_CID + int.from_bytes(digest[:4], "big") % _LOWEST_CID)
