"""What a shell can complete: the names that only the daemon knows, and the script for it.

Whatever goes wrong here is silent: nobody has pressed Enter yet.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from qsnapd.control.client import Client
from qsnapd.errors import QsnapError

ANSWER_LIMIT_S = 1.0
"""How long a person who pressed Tab waits for the daemon, at most."""
SHELLS = ("bash", "zsh", "fish")

Candidates = list[CompletionItem]
Completer = Callable[[click.Context, click.Parameter, str], Candidates]


def script(root: click.Command, shell: str) -> str:
    """What makes *shell* complete the command line of *root*; for its start-up file."""
    completion = get_completion_class(shell)
    assert completion is not None, "SHELLS are those that click knows"
    name = str(root.name)
    return completion(root, {}, name, f"_{name.upper()}_COMPLETE").source()


def complete_words(fields: Sequence[str], rest: str | None) -> Completer:
    """Complete the next positional of a verb, by what it is called."""

    def complete(context: click.Context, _parameter: click.Parameter, begun: str) -> Candidates:
        left = [field for field in fields if context.params.get(field) is None]
        placed = len(context.params.get("words") or ())
        field = left[placed] if placed < len(left) else rest
        return _candidates(field, context, fields, begun)

    return complete


def complete_field(field: str, fields: Sequence[str] = ("domain",)) -> Completer:
    """Complete the value of an option that means what the positional *field* means."""

    def complete(context: click.Context, _parameter: click.Parameter, begun: str) -> Candidates:
        return _candidates(field, context, fields, begun)

    return complete


def _candidates(
    field: str | None, context: click.Context, fields: Sequence[str], begun: str
) -> Candidates:
    if field in ("directory", "xmlfile", "memspec"):
        return [CompletionItem(begun, type="file")]
    root = context.find_root()
    if field == "command" and isinstance(root.command, click.Group):
        return _beginning(root.command.list_commands(root), begun)
    if field == "shell":
        return _beginning(SHELLS, begun)
    ask = _QUESTIONS.get(field or "")
    if ask is None:
        return []
    try:
        with Client(root.params["socket"], reply_limit_s=ANSWER_LIMIT_S) as client:
            return _beginning(ask(client, _domain(context, fields)), begun)
    except QsnapError:
        return []


def _beginning(names: Iterable[str], begun: str) -> Candidates:
    return [CompletionItem(name) for name in sorted(names) if name.startswith(begun)]


def _domain(context: click.Context, fields: Sequence[str]) -> str:
    """The VM that the line names so far."""
    if (named := context.params.get("domain")) is not None:
        return str(named)
    # An option that has no value yet keeps click from placing the words.
    words: Sequence[str] = context.params.get("words") or context.args
    left = [field for field in fields if context.params.get(field) is None]
    return words[left.index("domain")] if "domain" in left[: len(words)] else ""


def _vms(client: Client, _domain: str) -> Iterable[str]:
    return (vm["name"] for vm in client.call("ListVms")["vms"])


def _snapshots(client: Client, domain: str) -> Iterable[str]:
    return (s["name"] for s in client.call("ListSnapshots", vm=domain)["snapshots"])


def _disks(client: Client, domain: str) -> Iterable[str]:
    return (disk["target"] for disk in client.call("ListDisks", vm=domain)["disks"])


_QUESTIONS: dict[str, Callable[[Client, str], Iterable[Any]]] = {
    "domain": _vms,
    "snapshotname": _snapshots,
    "from": _snapshots,
    "diskspec": _disks,
    "device": _disks,
}
