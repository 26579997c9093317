"""Where the edits of a study take spectra and operands from: caches of decompositions, and the calibration text."""

from __future__ import annotations

from harness.evaluation.calibration import Calibration, CalibrationText
from harness.evaluation.derived import DerivedTask
from harness.evaluation.settings import RuntimeSettings
from harness.models.decompositions import DecompositionCache, disk_cache
from harness.models.loading import LoadedModel
from harness.models.memory import decomposition_bytes
from harness.models.reference import Reference
from harness.models.reference_matrices import ComparedMatrices
from harness.models.treatment import Sources


def sources_of(
    loaded: LoadedModel, runtime: RuntimeSettings, text: CalibrationText | None = None, stream: float = 0.0,
    reference: Reference | None = None,
) -> Sources:
    """Return the sources of a loaded model, which must hold its unedited weights.

    runtime: the sizes and the folder of the caches. text: the calibration text, or None. stream: the bytes that the
    stream at the frontier will take of the device's memory. reference: the reference model, or None.
    """
    disk = disk_cache(runtime.cache_gib, runtime.cache_dir)
    budget = decomposition_bytes(runtime.decomposition_gib, loaded.device, stream)
    weights = DecompositionCache(loaded, budget, disk)
    if reference is not None:
        derived = None if text is None or text.task is None else DerivedTask(loaded, text.task)
        return Sources(weights, reference=ComparedMatrices(loaded, reference, budget, disk), derived=derived)
    if text is None:
        return Sources(weights)
    budget //= 2  # the factors of the inputs take the other half
    calibrated = Calibration(loaded, text, disk, budget)
    return Sources(weights, DecompositionCache(loaded, budget, disk, calibrated=calibrated), calibrated)
