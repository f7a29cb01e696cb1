"""Taking snapshots: plan, prepare, capture (a module per strategy), finish, commit."""
