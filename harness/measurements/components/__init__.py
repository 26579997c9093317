"""Single components: what every singular value of a model does to first order, and what its directions are."""
