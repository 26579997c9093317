"""Loading models, the map from architectures to matrices, and the editing of matrices."""
