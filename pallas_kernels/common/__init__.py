"""What the kernels of several formats share."""
