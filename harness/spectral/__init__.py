"""Tensors in, tensors out: decomposition, regions, random matrix theory, ablation; imports torch, nothing of ours."""
