"""Snapshots on their way in and out of the store: export, import, redefine, scan."""
