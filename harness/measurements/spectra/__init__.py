"""The measurement of spectra: the singular values and vectors of every matrix, compared with random matrices."""
