"""Training the in-context-recall transformer from a seed, and the cache of trained models."""

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

from harness.cache import user_cache
from harness.config import RecallModelConfig
from harness.errors import InputError
from harness.models.recall import RecallForCausalLM, load_recall, quiet, recall_config
from harness.models.recall_data import TRAINING_STREAM, recall_process, sample

# Raise when a change of code changes the trained weights: models in caches are then trained anew.
TRAINING_VERSION = 1
COMPLETE = "complete.json"  # digests of the files beside it; written last
OPTIMIZER_STATE = "optimizer.pt"  # beside the weights of a checkpoint before the last step


def initial_model(config: RecallModelConfig) -> RecallForCausalLM:
    """The model before training, on the CPU, drawn from `config.seed`; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return RecallForCausalLM(recall_config(config))


def _optimizer(config: RecallModelConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
        )
    raise InputError(f"model.recall.optimizer is {config.optimizer!r}: must be adamw or sgd")


def _learning_rate(config: RecallModelConfig, step: int) -> float:
    """SGD: constant, as published. AdamW: falls linearly to zero; at a constant rate the noise and the recalled token,
    equally probable at noise 0.5, keep overtaking each other and accuracy depends on the step one stops at."""
    return config.learning_rate * (1 - step / config.steps if config.optimizer == "adamw" else 1)


def scored_logits(model: RecallForCausalLM, tokens: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] at the n positions where `scored` [B, T] is True; the same numbers as the model's forward,
    but the last feed-forward layer and the head run at those positions only."""
    hidden_states = model.embed(tokens)
    for block in model.layers[:-1]:
        hidden_states = block(hidden_states)
    last = model.layers[-1]
    hidden_states = (hidden_states + last.self_attn(hidden_states))[scored]
    return model.lm_head(last.feed_forward(hidden_states))


def train(
    config: RecallModelConfig,
    device: str | torch.device = "cpu",
    progress: bool = True,
    resume_from: Path | None = None,
    optimizer_file: Path | None = None,
) -> RecallForCausalLM:
    """Train from `config.seed` for `config.checkpoint` of `config.steps` steps (null: all of them); the result is in
    evaluation mode, on `device`.

    The loss is the mean cross-entropy over scored positions (see RecallBatch), labels with their noise. The data are a
    function of seed and step alone, so they do not depend on the device; weights on one CPU with one number of threads
    repeat bit for bit, also when training resumes. resume_from: the folder of an earlier checkpoint of this training
    with its optimizer state. optimizer_file: where to leave that state for later ones. InputError for settings that
    cannot be.
    """
    last = steps_trained(config)
    process = recall_process(config)
    model = initial_model(config) if resume_from is None else load_recall(resume_from)
    model = model.to(device).train()
    optimizer = _optimizer(config, [p for p in model.parameters() if p.requires_grad])
    first = 0
    if resume_from is not None:
        state = torch.load(resume_from / OPTIMIZER_STATE, map_location=device, weights_only=True)
        first = state["step"]
        optimizer.load_state_dict(state["optimizer"])
    bar = tqdm(range(first, last), desc="training the recall model", unit="step", disable=not progress)
    for step in bar:
        rng = np.random.default_rng([TRAINING_STREAM, config.seed, step])
        batch = sample(process, config.batch_size, config.context_length, rng)
        tokens, labels, scored = (
            torch.from_numpy(array).to(device) for array in (batch.tokens, batch.labels, batch.scored)
        )
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        logits = scored_logits(model, tokens, scored)
        # A tiny batch may have nothing to score: no gradient then, rather than 0 / 0.
        loss = F.cross_entropy(logits, labels[scored], reduction="sum") / max(1, len(logits))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if progress and step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if optimizer_file is not None:
        torch.save({"step": last, "optimizer": optimizer.state_dict()}, optimizer_file)
    return model.eval()


def steps_trained(config: RecallModelConfig) -> int:
    """How many of its steps the model of these settings has behind it. InputError for more than there are."""
    if config.checkpoint is None:
        return config.steps
    if not 0 <= config.checkpoint <= config.steps:
        raise InputError(f"model.recall.checkpoint is {config.checkpoint}: must be within 0..{config.steps} (steps)")
    return config.checkpoint


def training_digest(config: RecallModelConfig) -> str:
    """Names the trained model: 16 hex digits over every setting that it depends on and the version of this code."""
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


def cache_folder(config: RecallModelConfig) -> Path:
    """Where `ensure_trained` keeps this model."""
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


def _nearest_checkpoint(config: RecallModelConfig) -> Path | None:
    """The latest checkpoint in the cache of the same training before this one."""
    for step in range(steps_trained(config) - 1, 0, -1):
        folder = cache_folder(replace(config, checkpoint=step))
        if folder.exists() and _is_complete(folder):
            return folder
    return None


def ensure_trained(config: RecallModelConfig, device: str | torch.device = "cpu", progress: bool = True) -> Path:
    """The folder of the trained model: from the cache where it is there and intact, else trained now, from the latest
    earlier checkpoint that the cache holds.

    It appears under its name complete or not at all. Processes that train the same model at once are safe: the first to
    finish wins, and all return the same folder. InputError where the cache cannot be written.
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
    """Rename `finished` to `folder`; keep what is there if it is complete, and move it into `work` if it is not."""
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
            pass  # another process moved it away first
    raise InputError(f"model.recall.cache_dir: cannot replace {folder}; remove it")
