"""What the tests of the tasks need: an independent scorer, and a tiny tokenizer and model made on the spot."""

from __future__ import annotations

import numpy as np
import torch

from harness.evaluation.requests import Scores, TaskContext
from harness.models.description import generation_values

TEXT = (
    "Anna and Ben went to the park. Anna gave a ball to Ben. The sun was warm, and the two friends played all day.\n\n"
    "Once upon a time there was a little dog named Max.  He liked to run, jump and bark at the mailman!\n"
    "“Café crème, s'il vous plaît,” said Zoë — and paid 3½ € for it. 🎉 Then Ben gave the dog to Anna.\n"
) * 2


@torch.no_grad()
def score(model, requests) -> Scores:
    """Scores from a full forward pass of one request at a time and float64 arithmetic on its logits."""
    logprob, greedy, rank, offsets = [], [], [], [0]
    for request in requests:
        logits = model(torch.from_numpy(request.tokens)[None]).logits[0].double()
        rows, targets = logits[request.positions], torch.from_numpy(request.targets)
        chosen = rows.gather(1, targets[:, None])
        logprob += (chosen[:, 0] - torch.logsumexp(rows, 1)).tolist()
        greedy += (rows.argmax(1) == targets).tolist()
        rank += (rows > chosen).sum(1).tolist()
        offsets.append(len(logprob))
    return Scores(np.array(logprob), np.array(greedy), np.array(rank), np.array(offsets))


def tiny_tokenizer(bos: bool = False):
    """A byte-level BPE of 400 tokens learnt from TEXT; with `bos` it puts <s> (id 0) before what it encodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))
    tokenizer.post_processor = (
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]) if bos
        else processors.ByteLevel(trim_offsets=True)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def tiny_model(context_length: int = 64):
    """A random GPT-2 of two blocks in float32 with outputs far from uniform."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=400, n_positions=context_length, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    ))
    return model.eval()


def tiny(bos: bool = False, context_length: int = 64):
    """(model, TaskContext) of the tiny model and tokenizer."""
    model = tiny_model(context_length)
    generation = generation_values(model.generation_config)
    return model, TaskContext(tiny_tokenizer(bos), model.config, context_length, "causal", generation)


def real(folder):
    """(model, TaskContext) of a checkpoint on disk."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return model, TaskContext(tokenizer, model.config, model.config.max_position_embeddings, "causal")


def lm_eval_run(model, tokenizer, task_file, data_files, limit, max_length=None):
    """lm-eval's own results and samples of a stock task on local files: ({metric: value}, [sample, ...])."""
    from pathlib import Path

    import lm_eval
    import yaml
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM

    path = Path(lm_eval.__file__).parent / "tasks" / task_file
    settings = yaml.safe_load(path.read_text())
    settings.pop("tag", None)
    settings |= {
        "task": "stock", "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": data_files},
    }
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)
    task = ConfigurableTask(config=settings)
    found = lm_eval.evaluate(lm=lm, task_dict={"stock": task}, limit=limit, log_samples=True, bootstrap_iters=0)
    samples = sorted(found["samples"]["stock"], key=lambda sample: sample["doc_id"])
    return found["results"]["stock"], samples
