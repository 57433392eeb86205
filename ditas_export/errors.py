"""Every refusal of this package: what was found, what was expected, what to do."""


class DitasExportError(Exception):
    """Base of all errors that a user can cause and mend; the message is one clear line."""


class CheckpointError(DitasExportError):
    """A model file is missing, damaged, unsafe, or of no known family."""


class UnrecognizedError(CheckpointError):
    """A checkpoint that shows no sign of any family of this package."""


class ConditionsError(DitasExportError):
    """Embeddings of prompts are missing, damaged, or do not fit the model."""


class CalibrationError(DitasExportError):
    """Calibration settings or states do not fit the model."""


class QuantizationError(DitasExportError):
    """A tensor or setting that the quantizer cannot represent."""


class ArtifactError(DitasExportError):
    """A saved artefact is damaged, of another kind or version, or made from another model."""


class OtherModelError(ArtifactError):
    """Something was made from another model than the one at hand."""


class OnnxExportError(DitasExportError):
    """A graph that cannot be written, or breaks a rule of the runtimes."""


class RunnerError(DitasExportError):
    """A backend is missing, refuses the model, or was fed inputs that do not fit."""


class NonFiniteError(RunnerError):
    """A model put out NaN or infinity; `rows` are those of its batch."""

    rows: tuple[int, ...] = ()


class EngineError(DitasExportError):
    """An engine builder is missing, refuses a graph, or crashes on it."""


class VerificationError(DitasExportError):
    """An exported file does not compute what was calibrated."""


class EvaluationError(DitasExportError):
    """Images or features that cannot be read or judged."""


class DistributedError(DitasExportError):
    """Ranks that cannot start together, or one that the others have lost."""


class OutputError(DitasExportError):
    """The standard output takes nothing."""


class CancelledError(DitasExportError):
    """Sampling was stopped by its caller, between two steps."""


class ReportError(DitasExportError):
    """A report cannot be made here."""
