"""BLEU of sacrebleu as a metric script of Hugging Face evaluate, for tests that have no hub; it returns two numbers."""

import datasets
import evaluate
from sacrebleu import corpus_bleu


class Sacrebleu(evaluate.Metric):
    """compute(predictions, references) -> {"score": ..., "sys_len": ...}."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="BLEU", citation="", inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references):
        found = corpus_bleu(predictions, [references])
        return {"score": found.score, "sys_len": found.sys_len}
