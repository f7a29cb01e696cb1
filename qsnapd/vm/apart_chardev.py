"""Character devices of a second VM: sockets, files, pipes and ports of its own."""

from qsnapd.errors import Blocked
from qsnapd.vm.argv import Option
from qsnapd.vm.members import Members
from qsnapd.vm.own_names import Wishes

_STREAMS = ("tcp", "telnet", "tn3270", "websocket")
_HOST_DEVICES = frozenset({"serial", "tty", "parallel", "parport"})


def chardev(option: Option, wishes: Wishes) -> list[Option]:
    """`-chardev BACKEND,id=...`. Raises: Blocked."""
    members = Members.of(option, "backend")
    names = wishes.names
    members.rewrite("logfile", names.file)
    match members.get("backend"):
        case "socket" if "path" in members:
            _unix_socket(members, option, wishes)
        case "socket" if members.is_on("server"):
            members.set("port", own_port(members.get("port"), option, wishes))
            members.drop("to")
            _do_not_wait(members)
        case "socket":
            wishes.notes.append(f"{option}: connects to the same address as the original's")
        case "file":
            members.rewrite("path", names.file)
        case "pty":
            members.rewrite("path", names.file)
        case "pipe":
            members.rewrite("path", lambda path: _pipe(path, wishes))
        case "udp" if members.get("localport") not in ("", "0"):
            members.set("localport", own_port(members.get("localport"), option, wishes))
        case backend if backend in _HOST_DEVICES:
            members.rewrite("path", lambda path: _host_device(path, option, wishes))
    return [Option(option.name, str(members), option.dashes)]


def character_device(option: Option, wishes: Wishes) -> list[Option]:
    """`-serial unix:PATH,...` and all that are written like it. Raises: Blocked."""
    return [Option(option.name, device_text(option.value or "", option, wishes), option.dashes)]


def device_text(text: str, option: Option, wishes: Wishes) -> str:
    """Change what stands after `-serial` or the like. Raises: Blocked."""
    kind, colon, rest = text.partition(":")
    if kind == "mon":
        return f"mon:{device_text(rest, option, wishes)}"
    if kind == "unix":
        members = Members.parse(rest, "path")
        _unix_socket(members, option, wishes)
        return f"unix:{members}"
    if kind in ("file", "pty") and colon:
        return f"{kind}:{wishes.names.file(rest)}"
    if kind == "pipe":
        return f"pipe:{_pipe(rest, wishes)}"
    if kind in _STREAMS:
        return f"{kind}:{_stream_text(rest, option, wishes)}"
    if kind == "udp":
        remote, at, local = rest.partition("@")
        host, _, port = local.rpartition(":")
        return f"udp:{remote}@{host}:{own_port(port, option, wishes)}" if at else text
    if text.startswith("/dev/"):
        return _host_device(text, option, wishes)
    return text  # null, none, stdio, vc, pty, chardev:ID ...


def debugger(option: Option, wishes: Wishes) -> list[Option]:
    """`-s` is short for `-gdb tcp::1234`."""
    return [Option("gdb", device_text("tcp::1234", option, wishes))]


def own_port(port: str, what: object, wishes: Wishes) -> str:
    """A port to listen on: the substitute, or 0, so that the kernel chooses one."""
    substitute = wishes.names.substitute(port)
    if substitute is not None:
        wishes.notes.append(f"{what}: port {substitute} instead of {port}")
        return substitute
    if port not in ("", "0"):
        wishes.notes.append(f"{what}: a free port, which QEMU chooses, instead of {port}")
    return "0"


def _stream_text(rest: str, option: Option, wishes: Wishes) -> str:
    address, comma, more = rest.partition(",")
    members = Members.parse(more)
    # A debugger is waited for; everybody else says so.
    if option.name not in ("gdb", "s") and not members.is_on("server"):
        wishes.notes.append(f"{option}: connects to the same address as the original's")
        return rest
    if members.is_on("server"):
        members.drop("to")
        _do_not_wait(members)
    host, _, port = address.rpartition(":")
    return f"{host}:{own_port(port, option, wishes)}{comma}{members}"


def _unix_socket(members: Members, option: Option, wishes: Wishes) -> None:
    names = wishes.names
    if members.is_on("server"):
        members.rewrite("path", lambda path: names.socket(path, option))
        _do_not_wait(members)
        return
    path = members.get("path")
    substitute = names.substitute(path)
    if substitute is not None:
        members.set("path", substitute)
    else:
        wishes.notes.append(f"{option}: connects to {path} like the original's")


def _do_not_wait(members: Members) -> None:
    """A clone starts by itself: nobody may be there yet to connect."""
    if "nowait" not in members:
        members.set("wait", value=False)


def _pipe(path: str, wishes: Wishes) -> str:
    new = wishes.names.file(path)
    own = wishes.names.absolute(new)
    wishes.pipes += [f"{own}.in", f"{own}.out"]
    return new


def _host_device(path: str, option: Option, wishes: Wishes) -> str:
    if path == "/dev/null":
        return path
    substitute = wishes.names.substitute(path)
    if substitute is None:
        raise Blocked(
            f"{option}: the host's device {path} is the original's; say which one the clone "
            f"shall use in place of {path}"
        )
    return substitute
