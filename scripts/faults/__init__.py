"""What `fault_matrix.py` does to runs, a module for each kind of fault, and what these share."""

import os

# For the runs, which are small and forked: set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
