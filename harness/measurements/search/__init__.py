"""The search, a measurement that finds the best ablations of a grid on some examples and judges them on the others."""
