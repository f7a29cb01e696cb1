"""The architecture as a test: imports go down, without cycles, and asyncio stays home."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qsnapd"

LAYERS = (
    {"errors"},
    {"faults"},
    {"patience"},
    {"threads"},
    {"model"},
    {"config", "xml"},
    {"qmp", "image"},
    {"store"},
    {"vm"},
    {"snapshot"},
    {"control"},
    {"daemon"},
    {"cli"},
)
"""Lowest first; what stands side by side does not know each other."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

CLIENT_MAY_IMPORT = (
    *("qsnapd.errors", "qsnapd.model", "qsnapd.xml", "qsnapd.control.client", "qsnapd.cli"),
)
"""What qsnapctl consists of: it knows the daemon by its socket only."""
DAEMON_COMMAND = "qsnapd.cli.daemon"
"""The one module of the command line that starts the daemon instead of talking to it."""

ISLAND = "qsnapd.qmp.bridge"
"""The one module that may know asyncio."""
ISLANDERS = {"asyncio", "trio_asyncio", "qemu"}

LINES_LIMIT = 400

MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
modules = pytest.mark.parametrize("module", MODULES)


def layer_of(module: str) -> str:
    """Return the part of qsnapd that *module* belongs to, e.g. "qmp" for qsnapd.qmp.bridge."""
    return module.split(".")[1]


def imports(module: str) -> Iterator[str]:
    """Yield the full name of every module that *module* imports, anywhere in its text."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def own_imports(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "qsnapd"} - {"qsnapd"}


@modules
def test_has_a_place_in_the_layers(module: str) -> None:
    assert module == "qsnapd" or layer_of(module) in RANK, "place the new part in LAYERS"


@modules
def test_imports_only_what_lies_below(module: str) -> None:
    for target in own_imports(module):
        mine, theirs = layer_of(module), layer_of(target)
        assert mine == theirs or RANK[theirs] < RANK[mine], f"{module} imports {target}"


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("qsnapd.cli")])
def test_the_command_line_knows_only_the_socket(module: str) -> None:
    if module == DAEMON_COMMAND:
        return
    strangers = {t for t in own_imports(module) if not t.startswith(CLIENT_MAY_IMPORT)}
    assert strangers == set()
    assert DAEMON_COMMAND not in own_imports(module)


@modules
def test_asyncio_stays_home(module: str) -> None:
    if module != ISLAND:
        assert ISLANDERS.isdisjoint(name.split(".")[0] for name in imports(module))


@modules
def test_is_not_too_long(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= LINES_LIMIT, "split it by purpose"


def test_no_module_imports_itself_round_a_corner() -> None:
    graph = graphlib.TopologicalSorter({module: own_imports(module) for module in MODULES})
    graph.prepare()  # CycleError names the modules
    assert graph.is_active()
