"""Screens of a second VM: VNC and SPICE servers at addresses of their own."""

from qsnapd.errors import Blocked
from qsnapd.vm.argv import Option
from qsnapd.vm.members import Members
from qsnapd.vm.own_names import Wishes

DISPLAYS_TRIED = 99
"""How many VNC displays QEMU tries from the one after the original's on."""


def vnc(option: Option, wishes: Wishes) -> list[Option]:
    """`-vnc HOST:DISPLAY,...`. Raises: Blocked."""
    return [Option(option.name, _vnc_text(option.value or "", option, wishes), option.dashes)]


def display(option: Option, wishes: Wishes) -> list[Option]:
    """`-display vnc=...` is the same; windows do not get in each other's way."""
    kind, equals, rest = (option.value or "").partition("=")
    if kind != "vnc" or not equals:
        return [option]
    return [Option(option.name, f"vnc={_vnc_text(rest, option, wishes)}", option.dashes)]


def _vnc_text(text: str, option: Option, wishes: Wishes) -> str:
    members = Members.parse(text, "vnc")
    where = members.get("vnc")
    if where == "none":
        return text
    if members.is_on("reverse"):
        wishes.notes.append(f"{option}: calls the same viewer as the original")
        return text
    if where.startswith("unix:"):
        path = wishes.names.socket(where.removeprefix("unix:"), option)
        members.set("vnc", f"unix:{path}")
        return str(members)
    host, _, number = where.rpartition(":")
    substitute = wishes.names.substitute(number)
    if substitute is not None:
        members.set("vnc", f"{host}:{substitute}")
        members.drop("to")
    elif number.isdecimal():
        # Not the original's own, even if that does not run now: it will want it back.
        first = int(number) + 1
        members.set("vnc", f"{host}:{first}")
        members.set("to", str(first + DISPLAYS_TRIED))
        wishes.notes.append(f"VNC: the first free display from {first} on instead of {number}")
    if members.get("websocket") not in ("", "off", "on"):
        members.set("websocket", value=True)  # a port that goes with the display
    return str(members)


def spice(option: Option, wishes: Wishes) -> list[Option]:
    """`-spice`: a unix socket of its own; ports only as they were given. Raises: Blocked."""
    members = Members.of(option)
    if members.is_on("unix"):
        members.rewrite("addr", lambda path: wishes.names.socket(path, option))
    for key in ("port", "tls-port"):
        port = members.get(key)
        if port in ("", "0"):
            continue
        substitute = wishes.names.substitute(port)
        if substitute is None:
            raise Blocked(
                f"{option}: QEMU cannot choose a free port for SPICE; say which one the clone "
                f"shall use in place of {port}"
            )
        members.set(key, substitute)
    return [Option(option.name, str(members), option.dashes)]
