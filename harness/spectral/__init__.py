"""Tensors in, tensors out: decomposition, regions, random matrix theory, ablation. Imports torch and nothing of ours."""
