"""Networks of a second VM: its own interfaces, ports and MAC addresses.

MAC addresses are what a card has when the guest resets it. What was loaded, and the guest
uses until then, is the original's (see `apart`).
"""

import hashlib
import re

from qsnapd.errors import Blocked
from qsnapd.model.request import Identity
from qsnapd.vm.apart_chardev import device_text, own_port
from qsnapd.vm.argv import Option
from qsnapd.vm.members import Members
from qsnapd.vm.own_names import Wishes

_FORWARD = re.compile(r"((?:tcp|udp)?:[^:]*:)(\d+)(-.*)", re.DOTALL)
_GUEST_FORWARD = re.compile(r"((?:tcp)?:[^:]*:\d+)-(?!cmd:)(.*)", re.DOTALL)


def network(option: Option, wishes: Wishes) -> list[Option]:
    """`-netdev`, `-nic` and `-net`. Raises: Blocked."""
    members = Members.of(option, "type")
    kind = members.get("type")
    if option.name == "nic" and kind != "none":
        renew_mac(members, "mac", wishes, is_nic=True)
    elif option.name == "net" and kind == "nic":
        renew_mac(members, "macaddr", wishes, is_nic=True)
    match kind:
        case "user":
            _forwards(members, option, wishes)
        case "tap":
            members.rewrite("ifname", lambda name: _interface(name, option, wishes))
        case "socket":
            _socket(members, option, wishes)
        case "stream" | "dgram":
            _addresses(members, option, wishes)
    return [Option(option.name, str(members), option.dashes)]


def renew_mac(members: Members, key: str, wishes: Wishes, *, is_nic: bool) -> None:
    """Give a network card an address of its own; one that had QEMU's default, too."""
    old = members.get(key)
    if wishes.mac is Identity.KEEP or not (old or is_nic):
        return
    which = members.get("id") or members.get("netdev") or f"{members}"
    new = own_mac(wishes.seed, f"{which} {old}")
    members.set(key, new)
    card = f"network card {members.get('id') or members.get('netdev')}".removesuffix(" ")
    wishes.notes.append(
        f"{card}: MAC address {new} instead of {old or 'the default'}, once the guest "
        "has been reset: until then it uses what it has in memory"
    )


def own_mac(seed: str, which: str) -> str:
    """A MAC address for one card: unicast and locally administered, the rest random.

    52 is how QEMU's own begin; no bridge takes it for one of its ports' (fe).
    """
    digest = hashlib.sha256(f"{seed} mac {which}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x52, *digest[:5]))


def _forwards(members: Members, option: Option, wishes: Wishes) -> None:
    name = f"{option.name} {members.get('id')}".strip()

    def forward(rule: str) -> str:
        found = _FORWARD.fullmatch(rule)
        if not found:
            return rule
        return f"{found[1]}{own_port(found[2], f'{name}, hostfwd {rule}', wishes)}{found[3]}"

    def guest_forward(rule: str) -> str:
        found = _GUEST_FORWARD.fullmatch(rule)
        return f"{found[1]}-{device_text(found[2], option, wishes)}" if found else rule

    members.rewrite(r"hostfwd(\.\d+\.str)?", forward)
    members.rewrite(r"guestfwd(\.\d+\.str)?", guest_forward)


def _interface(name: str, option: Option, wishes: Wishes) -> str:
    if "%d" in name:  # the kernel puts a free number there
        return name
    substitute = wishes.names.substitute(name)
    if substitute is None:
        raise Blocked(
            f"{option}: the network interface {name} is the original's; say which one the "
            f"clone shall use in place of {name}"
        )
    wishes.notes.append(f"network interface {substitute} instead of {name}")
    return substitute


def _socket(members: Members, option: Option, wishes: Wishes) -> None:
    for key in ("listen", "localaddr"):
        if key in members and "mcast" not in members:
            host, _, port = members.get(key).rpartition(":")
            members.set(key, f"{host}:{own_port(port, option, wishes)}")
    for key in ("connect", "udp", "mcast"):
        if key in members:
            wishes.notes.append(f"{option}: on the same network as the original's")


def _addresses(members: Members, option: Option, wishes: Wishes) -> None:
    """A stream that is served has an address of its own; so has each end of datagrams."""
    for address in ("addr", "local"):
        if address == "addr" and not members.is_on("server"):
            if "addr.type" in members:
                wishes.notes.append(f"{option}: connects to the same address as the original's")
            continue
        members.rewrite(rf"{address}\.path", lambda path: wishes.names.socket(path, option))
        members.rewrite(rf"{address}\.port", lambda port: own_port(port, option, wishes))
