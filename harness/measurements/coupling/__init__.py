"""The measurement of block coupling: how the residual Jacobians of different blocks share their singular vectors."""
