"""One fine-tuning with the Trainer of transformers, which an interruption does not lose."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.files import replacing, write_text
from harness.measurements.tuning.settings import TuningSettings
from harness.models.identity import file_digest
from harness.models.loading import LoadedModel
from harness.tasks.generation import padding_of
from harness.tasks.labelled_texts import LabelledText

MODEL, RESULT, COMPLETE = "model.safetensors", "result.json", "complete"


@dataclass(frozen=True)
class Trained:
    """What a training says of itself. loss: the mean over all steps, in nats. n_trained: the number of weights."""

    loss: float
    steps: int
    n_trained: int
    seconds: float


def new_head(model: nn.Module, missing: Sequence[str], seed: int) -> None:
    """Draw the weights of a head that the checkpoint lacks: N(0, initializer_range^2), and zero for biases."""
    scale = getattr(getattr(model, "config", None), "initializer_range", None) or 0.02
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in missing:
            parameter = model.get_parameter(name)
            drawn = scale * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn if parameter.ndim > 1 else torch.zeros(parameter.shape))


def train(
    loaded: LoadedModel, examples: Sequence[LabelledText], settings: TuningSettings, seed: int, folder: Path,
    progress: bool = False,
) -> tuple[nn.Module, Trained]:
    """Train a model, and return it with its adapter merged. The module of `loaded` is changed.

    folder: of the checkpoints. If it holds some of the same training, the training goes on from the last one, and ends
    with the same weights as if it had not been interrupted.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    started = time.perf_counter()
    model, device = _trainable(loaded, settings), loaded.device
    n_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate, weight_decay=settings.weight_decay,
        warmup_steps=int(settings.warmup_share * settings.steps), lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.max_grad_norm, seed=seed, data_seed=seed, full_determinism=device.type == "cuda",
        bf16=settings.bf16, use_cpu=device.type == "cpu", save_steps=settings.checkpoint_every, save_total_limit=2,
        save_strategy="steps" if settings.checkpoint_every < settings.steps else "no", logging_strategy="no",
        report_to=[], disable_tqdm=not progress, dataloader_pin_memory=False, remove_unused_columns=False,
        train_sampling_strategy="group_by_length" if settings.group_by_length else "random",
    )  # fmt: skip

    class Marks(TrainerCallback):
        """Marks a checkpoint when all its files are written, because a process may be killed while it writes them."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            write_text(folder / f"checkpoint-{state.global_step}" / COMPLETE, "")

    class TunedTrainer(Trainer):
        """Takes the cross-entropy over the label words alone, if the answers are words."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return _loss(model, inputs)

    dataset = [{"input_ids": text.tokens.tolist(), "text": text} for text in examples]
    pad = padding_of(loaded.tokenizer, loaded.model)
    trainer = TunedTrainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Marks()],
                           data_collator=lambda rows: _batch([row["text"] for row in rows], pad))
    trainer.remove_callback(PrinterCallback)
    model.train()
    with warnings.catch_warnings():
        # peft looks for the config of the base on the hub; the embeddings, for which it asks, are not in an adapter.
        warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
        found = trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    merged = model.merge_and_unload() if settings.method == "lora" else model
    merged.eval().requires_grad_(False)
    return merged, Trained(found.training_loss, found.global_step, n_trained, time.perf_counter() - started)


def _trainable(loaded: LoadedModel, settings: TuningSettings) -> Any:
    """Return the module to train: the model itself, or an adapter around it."""
    model: Any = loaded.model
    if settings.method == "lora":
        from peft import LoraConfig, get_peft_model

        targets = sorted({matrix.parameter.removesuffix(".weight") for matrix in loaded.matrices})
        heads = sorted({name.rsplit(".", 1)[0] for name in loaded.missing})
        config = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
                            target_modules=targets, modules_to_save=heads or None, bias="none")
        return get_peft_model(model, config)
    model.requires_grad_(True)
    if not settings.embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model


def _batch(texts: Sequence[LabelledText], pad: int) -> dict[str, Tensor]:
    """Return the tensors of some texts: padded on the right for a classifier, on the left for a language model."""
    words = bool(texts[0].words)
    width = max(len(text.tokens) for text in texts)
    tokens = torch.full((len(texts), width), pad, dtype=torch.int64)
    mask, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, text in enumerate(texts):
        n = len(text.tokens)
        inside = slice(width - n, width) if words else slice(0, n)
        tokens[row, inside], mask[row, inside] = torch.as_tensor(text.tokens), 1
        if text.segments is not None:
            segments[row, inside] = torch.as_tensor(text.segments)
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": torch.tensor([text.label for text in texts])}
    if words:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {**batch, "position_ids": positions, "words": torch.tensor([text.words for text in texts])}
    return batch | ({} if texts[0].segments is None else {"token_type_ids": segments})


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean cross-entropy of the right answers among the classes, or among the words."""
    given = dict(inputs)
    labels, words = given.pop("labels"), given.pop("words", None)
    if words is None:
        return nn.functional.cross_entropy(model(**given).logits.float(), labels)
    logits = model(**given, logits_to_keep=1, use_cache=False).logits[:, -1].float()
    return nn.functional.cross_entropy(logits.gather(1, words), labels)


def _last_checkpoint(folder: Path) -> str | None:
    """Return the last complete checkpoint of a training, and remove all others; None if there is none."""
    there = sorted((path for path in folder.glob("checkpoint-*") if path.is_dir()),
                   key=lambda path: int(path.name.rsplit("-", 1)[1]))
    complete = [path for path in there if (path / COMPLETE).is_file()]
    for path in there:
        if path not in complete[-1:]:
            shutil.rmtree(path, ignore_errors=True)
    return str(complete[-1]) if complete else None


def save_trained(model: nn.Module, trained: Trained, folder: Path) -> None:
    """Write the weights of a training, then what it says of itself with a digest of them; remove its checkpoints."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: parameter.detach().cpu().contiguous().clone() for name, parameter in model.named_parameters()}
    with replacing(folder / MODEL) as temporary:
        save_file(state, temporary)
    write_text(folder / RESULT, json.dumps({**asdict(trained), "digest": file_digest(folder / MODEL)}))
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def load_trained(model: nn.Module, folder: Path) -> Trained | None:
    """Read the weights of a training into a model. Return None, and read nothing, if they are not there or damaged."""
    from safetensors.torch import load_file

    try:
        said = json.loads((folder / RESULT).read_text())
        if said.pop("digest") != file_digest(folder / MODEL):
            return None
        trained, state = Trained(**said), load_file(folder / MODEL)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    parameters = dict(model.named_parameters())
    if parameters.keys() != state.keys():
        return None
    with torch.no_grad():
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
    return trained
