"""What only shows after long, or with many: what grows, and who has to wait for whom."""
