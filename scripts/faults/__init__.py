"""The faults of `fault_matrix.py`, one module each, and their common code."""

import os

# Set before torch is imported, for the small runs in forked processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
