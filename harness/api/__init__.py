"""The Python door: the functions and classes that `import harness as sh` offers.

    import harness as sh
    model = sh.wrap(my_module, tokenizer)              # or sh.load("openai-community/gpt2")
    with model.ablated("mlp", sh.regions.small(0.1), blocks=[3]) as removed:
        print(removed.energy_removed, removed.realised_removal)
        logits = my_module(tokens).logits

The tests run each example.
"""

from harness.api.model import MatrixView, Model, load, wrap
from harness.api.runs import Run, compare, measure, open, run
from harness.api.scores import Score, paired
from harness.api.tasks import NamedTask, task
from harness.measurements.comparison.report import Comparison

__all__ = [
    "Comparison",
    "MatrixView",
    "Model",
    "NamedTask",
    "Run",
    "Score",
    "compare",
    "load",
    "measure",
    "open",
    "paired",
    "run",
    "task",
    "wrap",
]
