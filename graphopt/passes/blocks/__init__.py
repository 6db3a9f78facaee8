"""Residual blocks: finding them, fitting one convolution to each, putting it in its place."""
