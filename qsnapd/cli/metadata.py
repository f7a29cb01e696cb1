"""Verbs that show what is kept of a snapshot as XML, and let people edit that."""

import os
import shlex
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import click

from qsnapd.cli.arguments import Cli, verb
from qsnapd.cli.creates import read_xml, redefine
from qsnapd.cli.looks import chosen
from qsnapd.cli.output import print_json, say
from qsnapd.errors import BadRequest, QsnapError, SnapshotExists, TargetRefused, UnknownSnapshot

if TYPE_CHECKING:
    from qsnapd.model.snapshot import Manifest

_EDITORS = ("VISUAL", "EDITOR")


def add_to(group: click.Group) -> None:
    """Add the verbs of this module."""

    @verb(group, "snapshot-dumpxml", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="Of the current snapshot.")
    @click.option(
        "--security-info",
        is_flag=True,
        help="Accepted: the recorded command line is always complete, with all that it says.",
    )
    @click.option("--xpath", metavar="EXPR", help="Only what this XPath expression finds.")
    @click.option("--wrap", is_flag=True, help="With --xpath: everything within one <nodes>.")
    def snapshot_dumpxml(
        cli: Cli,
        domain: str,
        snapshotname: str | None,
        current: bool,
        security_info: bool,
        xpath: str | None,
        wrap: bool,
    ) -> None:
        """Print a snapshot as XML; snapshot-create --redefine takes it back without loss."""
        xml = as_xml(chosen(cli, domain, snapshotname, current))
        if xpath is not None:
            from qsnapd.xml.xpath import select

            xml = "".join(f"{found}\n" for found in select(xml, xpath, wrapped=wrap))
        print_json({"xml": xml}) if cli.json else click.echo(xml, nl=False)

    @verb(group, "snapshot-edit", "domain", "snapshotname?")
    @click.option("--current", is_flag=True, help="Also make it the current one.")
    @click.option("--rename", is_flag=True, help="Allow to give it another name.")
    @click.option("--clone", is_flag=True, help="Allow to make a second one, of the same files.")
    def snapshot_edit(
        cli: Cli, domain: str, snapshotname: str | None, current: bool, rename: bool, clone: bool
    ) -> None:
        """Edit a snapshot's name, description, parent or time with $VISUAL, $EDITOR or vi.

        Without SNAPSHOTNAME, --current means the current one.
        """
        if rename and clone:
            raise click.UsageError("Options --rename and --clone are mutually exclusive")
        if snapshotname is None and not current:
            raise click.UsageError("--snapshotname or --current is required")
        snapshot = chosen(cli, domain, snapshotname, current=snapshotname is None)
        edit = _Edit(cli, domain, snapshot, rename=rename, clone=clone, current=current)
        message = _edited(edit, as_xml(snapshot))
        click.echo(message, err=cli.json)


def as_xml(snapshot: dict[str, Any]) -> str:
    """A snapshot of the daemon's replies as virsh would print it."""
    from qsnapd.xml.snapshot import write_snapshot

    return write_snapshot(_manifest(snapshot))


def _manifest(snapshot: dict[str, Any]) -> "Manifest":
    from qsnapd.model.snapshot import Manifest  # takes a while to import

    return Manifest.model_validate({name: snapshot[name] for name in Manifest.model_fields})


class _Edit:
    """What comes of the XML that an editor has left."""

    def __init__(
        self,
        cli: Cli,
        domain: str,
        snapshot: dict[str, Any],
        *,
        rename: bool,
        clone: bool,
        current: bool,
    ) -> None:
        self._cli = cli
        self._domain = domain
        self._before = _manifest(snapshot)
        self.name = self._before.name
        self._rename = rename
        self._clone = clone
        self._current = current

    def apply(self, data: bytes) -> str:
        """Have it done; returns what to say. Raises: QsnapError: it cannot be, and why."""
        from qsnapd.xml.snapshot import read_snapshot

        manifest = read_snapshot(data)
        if manifest.name == self.name:
            self._redefine(manifest.model_dump_json())
            return f"Snapshot {self.name} edited."
        if not (self._rename or self._clone):
            raise BadRequest(
                f"Must use --rename or --clone to change {self.name} to {manifest.name}"
            )
        self._require_free(manifest.name)
        as_before = manifest.model_copy(update={"name": self.name})
        is_edited = as_before != self._before
        if self._clone:
            if is_edited:
                self._redefine(manifest.model_dump_json())
            else:
                self._call("CopySnapshot", manifest.name)
            return f"Snapshot {self.name} cloned to {manifest.name}."
        if is_edited:
            redefine(self._cli, self._domain, as_before.model_dump_json())
        self._call("RenameSnapshot", manifest.name)
        return f"Snapshot {self.name} renamed to {manifest.name}."

    def _redefine(self, manifest: str) -> None:
        redefine(self._cli, self._domain, manifest, current=self._current)

    def _require_free(self, name: str) -> None:
        with self._cli.connect() as client:
            try:
                client.call("GetSnapshot", vm=self._domain, name=name)
            except UnknownSnapshot:
                return
        raise SnapshotExists(f"there is a snapshot {name} already")

    def _call(self, method: str, name: str) -> None:
        with self._cli.connect() as client:
            client.call(method, vm=self._domain, name=self.name, new_name=name)
            if self._current:
                client.call("SetCurrentSnapshot", vm=self._domain, name=name)


def _edited(edit: _Edit, xml: str) -> str:
    """Let the person edit until it can be done, or they give up; returns what to say."""
    directory = tempfile.mkdtemp(prefix="qsnapctl-")
    path = os.path.join(directory, f"{edit.name[:60]}.xml")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(xml)
        while True:
            _run_editor(path)
            data = read_xml(path)
            if data == xml.encode():
                return f"Snapshot {edit.name} XML configuration not changed."
            try:
                return edit.apply(data)
            except QsnapError as exc:
                if not _wants_to_go_on(exc):
                    raise
    finally:
        _remove_all(directory)


def _wants_to_go_on(exc: QsnapError) -> bool:
    """Ask, as far as there is somebody to ask."""
    if not sys.stdin.isatty():
        return False
    say(f"error: {exc}", err=True)
    return click.confirm("Failed. Try again?", default=True, err=True)


def _run_editor(path: str) -> None:
    """Raises: TargetRefused: there is no such editor, or it failed."""
    editor = next((words for name in _EDITORS if (words := os.environ.get(name))), "vi")
    try:
        argv = [*shlex.split(editor), path]
        status = subprocess.run(argv, check=False).returncode
    except (OSError, ValueError) as exc:
        raise TargetRefused(f"cannot run the editor {editor!r}: {exc}") from exc
    if status != 0:
        raise TargetRefused(f"the editor {editor!r} failed with status {status}; nothing changed")


def _remove_all(directory: str) -> None:
    """The editor may have left files of its own beside ours."""
    for entry in os.scandir(directory):
        os.unlink(entry.path)
    os.rmdir(directory)
