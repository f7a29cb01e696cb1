"""Putting VMs back to snapshots, and starting others from them: look, plan, start, load."""
