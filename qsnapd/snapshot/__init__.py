"""Taking checkpoints and putting VMs back to them: plans first, then steps, then the commit."""
