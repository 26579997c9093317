"""The mathematics of singular values: decomposition, regions, random matrix theory and ablation.

Every function takes tensors and returns tensors or numbers. This folder knows nothing of models, tasks or studies.
"""
