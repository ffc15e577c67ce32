"""Task files for the lm-evaluation-harness."""
