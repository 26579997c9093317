"""Train the in-context-recall transformer from a seed, and cache the trained models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from harness.errors import InputError
from harness.files import user_cache
from harness.models.recall import RecallForCausalLM, load_recall, quiet, recall_config
from harness.models.recall_data import TRAINING_STREAM, recall_process, sample
from harness.models.settings import RecallModelSettings

# Increase this number when a change of the code changes the trained weights: cached models are then trained anew.
TRAINING_VERSION = 1
COMPLETE = "complete.json"  # holds the digests of the files beside it, and is written last
OPTIMIZER_STATE = "optimizer.pt"  # beside the weights of a checkpoint before the last step


def initial_model(config: RecallModelSettings) -> RecallForCausalLM:
    """Return the model before training, on the CPU, drawn from `config.seed`; torch's global generator is not used."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return RecallForCausalLM(recall_config(config))


def _optimizer(config: RecallModelSettings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    raise InputError(f"model.recall.optimizer is {config.optimizer!r}: must be adamw or sgd")


def _learning_rate(config: RecallModelSettings, step: int) -> float:
    """Return the learning rate of a step: constant for SGD, as published; for AdamW it falls linearly to zero.

    With AdamW at a constant rate the accuracy would depend on the step at which training stops: with noise 0.5 the
    noise token and the recalled token are equally probable, and now one and now the other has the larger logit.
    """
    return config.learning_rate * (1 - step / config.steps if config.optimizer == "adamw" else 1)


def scored_logits(model: RecallForCausalLM, tokens: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Return the logits [n, vocabulary] at the n positions where `scored` (bool [B, T]) is True.

    tokens: int64 [B, T]. The logits are those of the model's forward, but the last feed-forward layer and the output
    matrix are applied at the scored positions only.
    """
    hidden_states = model.embed(tokens)
    for block in model.blocks[:-1]:
        hidden_states = block(hidden_states)
    last = model.blocks[-1]
    hidden_states = (hidden_states + last.self_attn(hidden_states))[scored]
    return model.lm_head(last.feed_forward(hidden_states))


def train(
    config: RecallModelSettings,
    device: str | torch.device = "cpu",
    progress: bool = True,
    resume_from: Path | None = None,
    optimizer_file: Path | None = None,
) -> RecallForCausalLM:
    """Train a model from `config.seed` for the first `config.checkpoint` of `config.steps` steps (None: all steps).

    The result is in evaluation mode, on `device`. The loss is the mean cross-entropy of the labels, noise included, at
    scored positions (see RecallBatch). The data depend on the seed and the step alone, and not on the device. On the
    same CPU with the same number of threads the weights repeat bit for bit, even if training is resumed.

    resume_from: the folder of an earlier checkpoint of this training, with the state of its optimizer. optimizer_file:
    where that state is written for later checkpoints. Raises InputError for wrong settings.
    """
    last = steps_trained(config)
    process = recall_process(config)
    model = initial_model(config) if resume_from is None else load_recall(resume_from)
    model = model.to(device).train()  # type: ignore[arg-type]  # transformers' wrapper of `to` loses `self`
    optimizer = _optimizer(config, [p for p in model.parameters() if p.requires_grad])
    first = 0
    if resume_from is not None:
        state = torch.load(resume_from / OPTIMIZER_STATE, map_location=device, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(range(first, last), desc="training the recall model", unit="step",
               disable=None if progress else True)  # None: no bar where there is no terminal
    for step in bar:
        rng = np.random.default_rng([TRAINING_STREAM, config.seed, step])
        batch = sample(process, config.batch_size, config.context_length, rng)
        tokens, labels, scored = (
            torch.from_numpy(array).to(device) for array in (batch.tokens, batch.labels, batch.scored)
        )
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        logits = scored_logits(model, tokens, scored)
        # A tiny batch may have no scored position. Its gradient is then zero and not NaN.
        loss = F.cross_entropy(logits, labels[scored], reduction="sum") / max(1, len(logits))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress and step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if optimizer_file is not None:
        torch.save({"step": last, "optimizer": optimizer.state_dict()}, optimizer_file)
    return model.eval()


def steps_trained(config: RecallModelSettings) -> int:
    """Return after how many steps the model of these settings is taken. Raises InputError for a wrong checkpoint."""
    if config.checkpoint is None:
        return config.steps
    if not 0 <= config.checkpoint <= config.steps:
        raise InputError(f"model.recall.checkpoint is {config.checkpoint}: must be within 0..{config.steps} (steps)")
    return config.checkpoint


def training_digest(config: RecallModelSettings) -> str:
    """Return 16 hexadecimal digits that identify the trained model.

    They are a hash over TRAINING_VERSION and every setting on which the weights depend. Raises InputError as
    `steps_trained` does.
    """
    unused = {"cache_dir"}
    if steps_trained(config) == config.steps:
        unused.add("checkpoint")
    if config.optimizer != "sgd":
        unused.add("momentum")
    if config.feed_forward != "mlp":
        unused.add("hidden_dim")
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in unused}
    for name in ("noise", "learning_rate", "momentum", "weight_decay"):
        if name in settings:
            settings[name] = float(settings[name])  # 0 and 0.0 are one setting
    settings["training_version"] = TRAINING_VERSION
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder(config: RecallModelSettings) -> Path:
    """Return the folder in which `ensure_trained` keeps this model."""
    if config.cache_dir is not None:
        root = Path(config.cache_dir).expanduser()
    else:
        root = user_cache()
    return root / "recall" / training_digest(config)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != COMPLETE)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _is_complete(folder: Path) -> bool:
    try:
        recorded = json.loads((folder / COMPLETE).read_text())
        return "model.safetensors" in recorded and recorded == _digests(folder)
    except (OSError, ValueError, TypeError):
        return False


def _nearest_checkpoint(config: RecallModelSettings) -> Path | None:
    """Return the folder of the latest cached checkpoint of the same training that is earlier than this one."""
    for step in range(steps_trained(config) - 1, 0, -1):
        folder = cache_folder(replace(config, checkpoint=step))
        if folder.exists() and _is_complete(folder):
            return folder
    return None


def ensure_trained(config: RecallModelSettings, device: str | torch.device = "cpu", progress: bool = True) -> Path:
    """Return the folder of the trained model. The model is trained now if the cache does not hold it intact.

    Training starts from the latest earlier checkpoint that the cache holds. The folder appears complete or not at all.
    Several processes may train the same model at once: the first to finish wins, and all return the same folder. Raises
    InputError if the cache cannot be written, and for wrong settings.
    """
    folder = cache_folder(config)
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise InputError(f"model.recall.cache_dir: cannot write {folder.parent} ({error.strerror})") from error
    try:
        finished = work / folder.name
        finished.mkdir()
        state = finished / OPTIMIZER_STATE if steps_trained(config) < config.steps else None
        model = train(config, device, progress, _nearest_checkpoint(config), state)
        with quiet():
            model.save_pretrained(finished)
        (finished / COMPLETE).write_text(json.dumps(_digests(finished)))
        _install(finished, folder, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _install(finished: Path, folder: Path, work: Path) -> None:
    """Rename `finished` to `folder`. A folder that is already there stays if it is complete, else moves into `work`."""
    for attempt in range(10):
        try:
            os.rename(finished, folder)
            return
        except OSError:
            if _is_complete(folder):
                return
            if not folder.exists():
                raise
        try:
            os.rename(folder, work / f"broken-{attempt}")
        except FileNotFoundError:
            pass  # another process has moved it
    raise InputError(f"model.recall.cache_dir: cannot replace {folder}; remove it")
