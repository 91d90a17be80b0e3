"""The errors of sparsefit: each names the cause and the way out."""


class SparsefitError(Exception):
    """Base of all errors that sparsefit raises on purpose."""


class ConfigError(SparsefitError, ValueError):
    """A setting that cannot work: found before anything is touched."""


class CalibrationError(SparsefitError, ValueError):
    """Calibration data that cannot be used, or activations that are not finite."""


class MaskError(SparsefitError, ValueError):
    """Masks that are damaged, do not fit a model, or do not hold."""


class BudgetError(SparsefitError, RuntimeError):
    """A budget that cannot pay for what must be done."""


class DivergenceError(SparsefitError, RuntimeError):
    """Training that went to NaN or infinity."""


class DataError(SparsefitError, ValueError):
    """Text or images that cannot be read, or of which there are too few."""


class RunFolderError(SparsefitError, OSError):
    """A run folder that cannot be used: it exists, cannot be written, or its disk is full."""


class MergeError(SparsefitError):
    """Merging would not give the model that was trained."""


class HubError(SparsefitError, OSError):
    """The Hugging Face hub cannot be used: there is no token, no network, or it refuses."""


class ExportError(SparsefitError):
    """An exported file that does not hold, or does not compute, what the model does."""
