"""The errors of sparsefit. Each message names the cause and what to do."""


class SparsefitError(Exception):
    """Base of all errors that sparsefit raises on purpose."""


class ConfigError(SparsefitError, ValueError):
    """An invalid setting, found before anything is changed."""


class CalibrationError(SparsefitError, ValueError):
    """Calibration data that cannot be used, or activations that are not finite."""


class MaskError(SparsefitError, ValueError):
    """Masks that are damaged, do not fit a model, or whose pruned weights are not zero."""


class BudgetError(SparsefitError, RuntimeError):
    """A GPU-hour budget that is too small for the next stage."""


class DivergenceError(SparsefitError, RuntimeError):
    """Training that reached NaN or infinity."""


class DataError(SparsefitError, ValueError):
    """Text or images that cannot be read, or too few of them."""


class RunFolderError(SparsefitError, OSError):
    """A run folder that cannot be used: it exists, cannot be written, or its disk is full."""


class MergeError(SparsefitError):
    """Adapters that cannot be merged without changing the trained model."""


class HubError(SparsefitError, OSError):
    """The Hugging Face hub cannot be used: no token, no network, or the request was refused."""


class ExportError(SparsefitError):
    """An exported file whose weights or outputs differ from those of the model."""
