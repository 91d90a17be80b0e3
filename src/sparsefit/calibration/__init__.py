"""Calibration data: the samples of any batch, in micro-batches, and what in them is padding."""
