"""The journal: one entry, whole or absent, of one job at a time."""

from pathlib import Path

import pytest

from qsnapd.errors import ManifestInvalid, StoreError
from qsnapd.model.plan import JournalEntry
from qsnapd.model.request import CreateRequest
from qsnapd.model.snapshot import FileIdentity
from qsnapd.snapshot.taking.plan import plan_checkpoint
from qsnapd.store.journal import Journal
from tests.unit.situations import situation

FILE = FileIdentity(path="/images/root.after-s1.qcow2", device=1, inode=7)


def new_entry() -> JournalEntry:
    plan = plan_checkpoint(CreateRequest(name="s1", live=True), situation())
    return JournalEntry(plan=plan, pid=42, start_time_ticks=4242)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / ".journal.json")


def test_what_is_written_is_read_to_the_last_field(journal: Journal, tmp_path: Path) -> None:
    entry = new_entry().model_copy(update={"made": (FILE,)})
    assert journal.read() is None
    journal.write(entry)
    assert Journal(tmp_path / ".journal.json").read() == entry
    assert [path.name for path in tmp_path.iterdir()] == [".journal.json"]
    assert (tmp_path / ".journal.json").stat().st_mode & 0o777 == 0o600


def test_a_later_entry_of_the_same_job_replaces_it(journal: Journal) -> None:
    entry = new_entry()
    later = entry.model_copy(update={"made": (FILE,)})
    journal.write(entry)
    journal.write(later)
    assert journal.read() == later


def test_another_jobs_entry_is_never_overwritten(journal: Journal) -> None:
    entry = new_entry()
    journal.write(entry)
    with pytest.raises(StoreError, match="unfinished job on s1"):
        journal.write(new_entry())
    assert journal.read() == entry


def test_cleared_twice(journal: Journal) -> None:
    journal.write(new_entry())
    journal.clear()
    journal.clear()
    assert journal.read() is None


@pytest.mark.parametrize("text", ["", "{", '{"plan": {"kind": "create"}}', '{"kind": "later"}'])
def test_an_entry_that_is_not_understood_is_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".journal.json"
    path.write_text(text)
    with pytest.raises(ManifestInvalid, match="the journal of an unfinished job"):
        Journal(path).read()
    with pytest.raises(ManifestInvalid):
        Journal(path).write(new_entry())
    assert path.read_text() == text


def test_a_journal_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot write the journal"):
        Journal(tmp_path / "missing" / ".journal.json").write(new_entry())
