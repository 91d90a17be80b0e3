"""Calibration data: splitting any batch into samples, regrouping them in micro-batches, and finding their padding."""
