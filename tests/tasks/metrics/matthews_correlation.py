"""Matthews correlation of scikit-learn as a metric script of Hugging Face evaluate, for tests that have no hub."""

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


class MatthewsCorrelation(evaluate.Metric):
    """compute(predictions, references) -> {"matthews_correlation": ...}."""

    def _info(self):
        number = datasets.Value("int32")
        return evaluate.MetricInfo(
            description="Matthews correlation", citation="", inputs_description="",
            features=datasets.Features({"predictions": number, "references": number}),
        )

    def _compute(self, predictions, references):
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
