"""The spectral ablation harness: what do the small, the bulk and the large singular values of a model's weights do?"""

__version__ = "0.1.0"
