"""One training run: its loop, what happens beside the steps, and what it leaves on the disk."""
