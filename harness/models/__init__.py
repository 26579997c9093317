"""Loading, and the map from any known architecture to matrices."""
