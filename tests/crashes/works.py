"""All jobs that power may fail in."""

from tests.crashes import deleting, moving, records, restoring, taking

WORKS = taking.WORKS | deleting.WORKS | records.WORKS | moving.WORKS | restoring.WORKS
