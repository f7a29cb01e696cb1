"""The interface text of io.qsnapd, generated from the methods, the model and the errors.

`io.qsnapd.varlink` beside this file is a stored copy of what `generate()` returns, for the
daemon to serve and for people to read; a test compares the two.
"""

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, StrEnum
from importlib import resources

from pydantic import AwareDatetime

from qsnapd import errors
from qsnapd.control.methods import METHODS
from qsnapd.control.methods.base import Method
from qsnapd.model.base import Frozen

NAME = "io.qsnapd"
SERVICE = "org.varlink.service"
_COLUMNS = 92
_IDENTIFIER = re.compile(r"[A-Za-z](_?[A-Za-z0-9])*")
_SCALARS: dict[object, str] = {
    bool: "bool",
    int: "int",
    float: "float",
    str: "string",
    AwareDatetime: "string",
}
_HEADER = """\
Checkpoints of running QEMU VMs.

Times are ISO 8601 in UTC. The unit of a number is the end of its name. A field marked with
"?" may be null; in a request, null means the default.

Every error carries: code, stable like its name; message, a sentence for people; effect,
what is true now whatever the cause was:
"""


def text(name: str = NAME) -> str | None:
    """Return the stored text of the interface called *name*, if it is one of ours."""
    if name not in (NAME, SERVICE):
        return None
    return resources.files(__package__).joinpath(f"{name}.varlink").read_text("utf-8")


def generate() -> str:
    """Write the interface text. Needs the sources: their comments become its comments."""
    writer = _Writer()
    methods = [writer.method(method) for method in METHODS.values()]
    failures = [writer.error(error) for error in error_classes()]
    effects = _member_docs(errors.Effect)
    header = _HEADER + "\n".join(f"{e.value}: {effects[e.name]}" for e in errors.Effect)
    return "\n".join([f"{_comment(header)}interface {NAME}\n", *methods, *writer.types, *failures])


def error_classes() -> Iterator[type[errors.QsnapError]]:
    """All classes of the error tree, each before those below it."""
    pending: list[type[errors.QsnapError]] = [errors.QsnapError]
    while pending:
        error = pending.pop(0)
        if error.__module__ == errors.__name__:
            yield error
            pending[:0] = error.__subclasses__()


def error_fields(error: type[errors.QsnapError]) -> dict[str, object]:
    """The types of what an error says besides code and message, by name."""
    return {
        name: hint
        for name, hint in typing.get_type_hints(error).items()
        if typing.get_origin(hint) is not typing.ClassVar
    }


class _Writer:
    """Collects the named types that it meets on the way, each one once."""

    def __init__(self) -> None:
        self._named: dict[str, str] = {}

    @property
    def types(self) -> list[str]:
        return list(self._named.values())

    def method(self, method: type[Method]) -> str:
        reply = typing.get_type_hints(method.answer)["return"]
        takes, gives = self._fields(method, request=True), self._fields(reply, request=False)
        head = f"method {method.__name__}"
        signature = f"{head}{_struct(takes)} -> {_struct(gives)}\n"
        if len(signature) > _COLUMNS or any(comment for _, comment in takes):
            signature = f"{head}{_struct(takes, broken=True)} -> {_struct(gives)}\n"
        return _comment(_doc(method)) + signature

    def error(self, error: type[errors.QsnapError]) -> str:
        fields = {"code": str, "message": str, **error_fields(error)}
        struct = _struct([(f"{name}: {self._type(t, False)}", "") for name, t in fields.items()])
        return f"{_comment(_doc(error))}error {error.__name__} {struct}\n"

    def _fields(self, model: type[Frozen], *, request: bool) -> list[tuple[str, str]]:
        hints, docs = typing.get_type_hints(model), _member_docs(model)
        fields = []
        for name, field in model.model_fields.items():
            written = self._type(hints[name], request)
            if request and not field.is_required() and not written.startswith("?"):
                written = f"?{written}"
            comment = " ".join(filter(None, [docs.get(name), _choices(hints[name])]))
            fields.append((f"{name}: {written}", comment))
        return fields

    def _type(self, hint: object, request: bool) -> str:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            (inner,) = (a for a in arguments if a is not types.NoneType)
            return f"?{self._type(inner, request)}"
        if origin is tuple:
            return f"[]{self._type(arguments[0], request)}"
        if origin is dict:
            return f"[string]{self._type(arguments[1], request)}"
        if origin is typing.Literal:
            return _literal(arguments)
        if isinstance(hint, type) and issubclass(hint, Frozen):
            return self._struct_type(hint, request)
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            return self._enum_type(hint)
        return _SCALARS[hint]

    def _struct_type(self, model: type[Frozen], request: bool) -> str:
        if model.__name__ not in self._named:
            self._named[model.__name__] = ""  # keeps its place before the types it uses
            struct = _struct(self._fields(model, request=request), broken=True)
            self._named[model.__name__] = f"{_comment(_doc(model))}type {model.__name__} {struct}\n"
        return model.__name__

    def _enum_type(self, enum: type[StrEnum]) -> str:
        if not _writable(enum):
            return "string"
        docs = _member_docs(enum)
        members = [(member.value, docs.get(member.name, "")) for member in enum]
        struct = _struct(members, broken=any(docs.values()))
        self._named[enum.__name__] = f"{_comment(_doc(enum))}type {enum.__name__} {struct}\n"
        return enum.__name__


def _writable(enum: type[StrEnum]) -> bool:
    """Whether an interface text has a way to write all values; not so "mapped-ram"."""
    return all(_IDENTIFIER.fullmatch(member) for member in enum)


def _choices(hint: object) -> str:
    """The values of an enum that had to become a string."""
    for choice in (hint, *typing.get_args(hint)):
        if isinstance(choice, type) and issubclass(choice, StrEnum) and not _writable(choice):
            return f"One of: {', '.join(choice)}."
    return ""


def _literal(values: tuple[object, ...]) -> str:
    if all(isinstance(value, str) for value in values):
        return f"({', '.join(map(str, values))})"
    return _SCALARS[type(values[0])]


def _struct(members: Sequence[tuple[str, str]], *, broken: bool = False) -> str:
    if not broken:
        return f"({', '.join(member for member, _ in members)})"
    last = len(members) - 1
    lines = [
        f"{_comment(comment, indent='  ')}  {member}{',' if number < last else ''}\n"
        for number, (member, comment) in enumerate(members)
    ]
    return f"(\n{''.join(lines)})"


def _comment(words: str, indent: str = "") -> str:
    lines = []
    for paragraph in words.strip().splitlines():
        lines += textwrap.wrap(paragraph, _COLUMNS - len(indent)) or [""]
    return "".join(f"{indent}# {line}".rstrip() + "\n" for line in lines)


def _doc(owner: type) -> str:
    # Not inspect.getdoc(): that would give a class its parent's words.
    return inspect.cleandoc(owner.__doc__ or "").replace("`", "")


def _member_docs(owner: type) -> Mapping[str, str]:
    """The string under each field or enum member, as written in the source."""
    docs: dict[str, str] = {}
    for base in reversed(owner.__mro__):
        if not issubclass(base, (Frozen, Enum)) or not base.__module__.startswith("qsnapd."):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for member, below in zip(definition.body, definition.body[1:], strict=False):
            match member, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name))
                    | ast.Assign(targets=[ast.Name(id=name)]),
                    ast.Expr(value=ast.Constant(value=str(words))),
                ):
                    docs[name] = " ".join(words.replace("`", "").split())
    return docs
