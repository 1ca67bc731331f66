"""Trying the kernels on a device: are they right, which launch settings are fastest, who computes attention."""
