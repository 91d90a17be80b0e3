"""The same names as in `sparsefit.recovery.sparse_base`."""

from sparsefit.recovery.sparse_base import checksum

__all__ = ["checksum"]
