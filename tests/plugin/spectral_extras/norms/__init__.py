"""A measurement: the norms of every matrix. `harness norms model=...`"""

from harness.engine.measurement import Measurement

NORMS = Measurement("norms", "spectral_extras.norms")
