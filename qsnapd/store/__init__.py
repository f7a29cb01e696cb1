"""What qsnapd keeps on disk: snapshots, their tree, and what outlives the daemon."""
