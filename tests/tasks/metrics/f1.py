"""F1 of scikit-learn as a metric script of Hugging Face evaluate, for tests that have no hub."""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import f1_score


class F1(evaluate.Metric):
    """compute(predictions, references, average) -> {"f1": ...}."""

    def _info(self):
        number = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="F1", citation="", inputs_description="",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions, references, average="binary"):
        value = f1_score(references, predictions, average=average)
        return {"f1": float(value) if np.ndim(value) == 0 else value}
