"""Passes over rows in another order: what stands before and behind a layer whose tokens are reordered."""
