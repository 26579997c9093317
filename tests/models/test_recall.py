"""The embedded model: its data against the counts they come from, its forward against the formula, its cache."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from harness.errors import InputError, SettingError
from harness.models import recall_training
from harness.models.recall import RecallForCausalLM, load_recall, process_of, recall_config
from harness.models.recall_data import COUNTS_FILE, bigram_counts, load_counts, recall_process, sample
from harness.models.recall_training import cache_folder, ensure_trained, initial_model, scored_logits, train
from harness.models.settings import RecallModelSettings

TINY = RecallModelSettings(dim=32, hidden_dim=48, context_length=32, batch_size=16, steps=8)


@pytest.fixture
def tiny(tmp_path):
    return replace(TINY, cache_dir=str(tmp_path))


def draw(config=TINY, n=4000, length=40, seed=0, noise=None):
    return sample(recall_process(config), n, length, np.random.default_rng(seed), noise)


# ---- data


def test_bigram_counts_of_a_text_small_enough_to_count_by_hand():
    counts = bigram_counts("abba\na")
    assert counts == {
        "vocabulary": "\nab",
        "unigram": [1, 3, 2],
        "bigram": [[0, 1, 0], [1, 0, 1], [0, 1, 1]],
    }


@pytest.mark.assets
def test_the_packaged_counts_are_those_of_tiny_shakespeare(assets):
    text = (assets / "data/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    assert bigram_counts(text) == json.loads(COUNTS_FILE.read_text(encoding="utf-8"))
    counts = load_counts()
    assert counts["vocabulary"] == "".join(sorted(set(text)))
    assert counts["bigram"][counts["vocabulary"].index("q")][counts["vocabulary"].index("u")] == text.count("qu")


def test_triggers_are_the_most_frequent_characters():
    process = recall_process(replace(TINY, n_triggers=3))
    assert "".join(process.vocabulary[i] for i in process.trigger_ids) == " et"
    assert (process.vocabulary_size, process.noise_token_id) == (66, 65)
    process = recall_process(replace(TINY, noise_token="!"))
    assert (process.vocabulary_size, process.vocabulary[process.noise_token_id]) == (65, "!")


def test_tokens_follow_the_counts():
    counts, batch = load_counts(), draw()
    first = np.bincount(batch.tokens[:, 0], minlength=65)
    unigram = np.asarray(counts["unigram"], dtype=float)
    common = unigram > 500
    observed, expected = first[common], unigram[common]
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3
    for character in "\neht,T":
        row = np.asarray(counts["bigram"][counts["vocabulary"].index(character)], dtype=float)
        followers = batch.labels[batch.tokens == counts["vocabulary"].index(character)]
        observed = np.bincount(followers, minlength=66)
        assert observed[65] == 0 and not observed[:65][row == 0].any(), "a pair that never occurs was drawn"
        common = row > row.sum() / 200
        expected = row[common] * observed[:65][common].sum() / row[common].sum()
        assert stats.chisquare(observed[:65][common], expected).pvalue > 1e-3


def test_the_noise_token_of_its_own_is_followed_by_unigrams():
    unigram, batch = np.asarray(load_counts()["unigram"], dtype=float), draw()
    observed = np.bincount(batch.labels[batch.tokens == 65], minlength=66)[:65]
    common = unigram > 5000
    expected = unigram[common] * observed[common].sum() / unigram[common].sum()
    assert stats.chisquare(observed[common], expected).pvalue > 1e-3


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_a_trigger_is_followed_by_noise_or_by_its_one_output(noise):
    config = replace(TINY, n_triggers=2, noise=noise)
    process, batch = recall_process(config), draw(config)
    n_noise = n_after = 0
    for trigger in process.trigger_ids:
        after = batch.tokens == trigger
        n_after += after.sum()
        n_noise += (after & (batch.labels == 65)).sum()
        for tokens, labels, scored, targets in zip(batch.tokens, batch.labels, batch.scored, batch.targets):
            at = np.flatnonzero(tokens == trigger)
            outputs = set(labels[at]) - {65}
            assert len(outputs) <= 1
            assert scored[at].tolist() == [False] * len(at[:1]) + [True] * len(at[1:])
            assert len(set(targets[at[1:]])) <= 1
            if outputs:
                assert set(targets[at[1:]]) <= outputs
    assert stats.binomtest(int(n_noise), int(n_after), noise).pvalue > 1e-3
    is_trigger = np.isin(batch.tokens, process.trigger_ids)
    assert not batch.scored[~is_trigger].any()
    assert (batch.targets[~batch.scored] == -100).all()
    if noise == 0:
        assert np.array_equal(batch.targets[batch.scored], batch.labels[batch.scored])


def test_outputs_are_uniform_over_the_characters():
    batch = draw(length=64)
    outputs = batch.targets.max(axis=1)
    counts = np.bincount(outputs[batch.scored.any(axis=1)], minlength=65)
    # a sequence whose output is the trigger itself shows its trigger oftener, so it is scored oftener
    counts = np.delete(counts, 1)
    assert len(counts) == 64 and stats.chisquare(counts).pvalue > 1e-3


def test_all_randomness_comes_from_the_generator():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    one = draw(n=50)
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    two, other = draw(n=50), draw(n=50, seed=1)
    for name in ("tokens", "labels", "scored", "targets"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.tokens, other.tokens)
    assert np.array_equal(one.tokens[:, 1:], one.labels[:, :-1])


@pytest.mark.parametrize(
    "change, key",
    [
        ({"n_triggers": 0}, "model.recall.n_triggers"),
        ({"n_triggers": 66}, "model.recall.n_triggers"),
        ({"noise": 1.5}, "model.recall.noise"),
        ({"noise_token": "?!"}, "model.recall.noise_token"),
        ({"noise_token": "é"}, "model.recall.noise_token"),
        ({"noise_token": " "}, "model.recall.noise_token"),
        ({"feed_forward": "gated"}, "model.recall.feed_forward"),
        ({"optimizer": "lion"}, "model.recall.optimizer"),
    ],
)
def test_settings_that_cannot_be(change, key):
    with pytest.raises(InputError, match=key):
        train(replace(TINY, **change), progress=False)


def test_a_checkpoint_beyond_the_training():
    with pytest.raises(SettingError, match=r"^checkpoint: 9 is wrong; it must be within 0\.\.8, model.recall.steps$"):
        replace(TINY, checkpoint=9)
    changed = replace(TINY)
    changed.checkpoint = 9
    with pytest.raises(InputError, match="model.recall.checkpoint"):
        train(changed, progress=False)


# ---- model


def reference_logits(model, tokens):
    """The forward in float64 numpy, from the equations."""
    w = {name: p.double().numpy() for name, p in model.state_dict().items()}
    x = w["embed_tokens.weight"][tokens] + w["embed_positions.weight"][: len(tokens)]
    for block in range(2):
        a = f"layers.{block}.self_attn"
        scores = x @ w[f"{a}.k_proj.weight"] @ x.T / np.sqrt(x.shape[1])
        scores[np.triu_indices(len(tokens), 1)] = -np.inf
        p = np.exp(scores - scores.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        x = x + p @ x @ w[f"{a}.v_proj.weight"].T @ w[f"{a}.o_proj.weight"].T
        up = f"layers.{block}.mlp.up_proj.weight"
        if up in w:
            h = x @ w[up].T
            down = f"layers.{block}.mlp.down_proj.weight"
            x = x + (np.maximum(h, 0) @ w[down].T if down in w else h)
    return x @ w["lm_head.weight"].T


@pytest.mark.parametrize("feed_forward", ["mlp", "linear", "none"])
def test_forward_follows_the_equations(feed_forward):
    config = replace(TINY, feed_forward=feed_forward)
    model = train(replace(config, steps=3), progress=False)
    tokens = draw(config, n=2, length=20).tokens
    logits = model(torch.from_numpy(tokens)).logits
    for row, expected in zip(logits.detach().numpy(), (reference_logits(model, t) for t in tokens)):
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    attention = {f"layers.{b}.self_attn.{x}_proj.weight" for b in (0, 1) for x in "kvo"}
    maps = {"mlp": ("up_proj", "down_proj"), "linear": ("up_proj",), "none": ()}[feed_forward]
    assert names == attention | {f"layers.{b}.mlp.{x}.weight" for b in (0, 1) for x in maps}


def test_initial_weights():
    model = initial_model(replace(TINY, dim=256, hidden_dim=1024, context_length=64))
    for embedding in (model.embed_tokens, model.embed_positions):
        assert stats.kstest(embedding.weight.numpy().ravel(), "norm").pvalue > 1e-3
    for name, bound in (("lm_head", 1 / 16), ("layers.0.self_attn.k_proj", 1 / 16), ("layers.1.mlp.down_proj", 1 / 32)):
        weight = model.get_submodule(name).weight.detach().numpy().ravel()
        assert stats.kstest(weight, "uniform", (-bound, 2 * bound)).pvalue > 1e-3
    assert model.get_output_embeddings() is model.lm_head and model.get_input_embeddings() is model.embed_tokens
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    initial_model(TINY)
    assert torch.equal(torch.rand(3), expected), "the caller's generator was touched"


def test_padding_changes_no_score():
    model = initial_model(TINY)
    tokens = torch.from_numpy(draw(n=3, length=20).tokens)
    alone = model(tokens).logits
    right = torch.cat([tokens, torch.zeros(3, 5, dtype=torch.long)], dim=1)
    left = torch.cat([torch.zeros(3, 5, dtype=torch.long), tokens], dim=1)
    mask = torch.ones(3, 25, dtype=torch.long)
    mask[:, 20:] = 0
    torch.testing.assert_close(model(right, attention_mask=mask).logits[:, :20], alone, rtol=1e-5, atol=1e-5)
    positions = torch.arange(-5, 20).clamp(min=0)
    padded = model(left, attention_mask=mask.flip(1), position_ids=positions).logits
    torch.testing.assert_close(padded[:, 5:], alone, rtol=1e-5, atol=1e-5)
    assert torch.isfinite(padded).all()


def test_what_forward_returns_when_asked():
    model = initial_model(TINY)
    batch = draw(n=3, length=20)
    tokens, scored = torch.from_numpy(batch.tokens), torch.from_numpy(batch.scored)
    out = model(tokens, labels=tokens, output_attentions=True, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(scored_logits(model, tokens, scored), out.logits[scored])
    torch.testing.assert_close(model(tokens, logits_to_keep=2).logits, out.logits[:, -2:])
    torch.testing.assert_close(model(tokens, logits_to_keep=torch.tensor([3, 7])).logits, out.logits[:, [3, 7]])
    assert len(out.hidden_states) == 3 and out.hidden_states[1].equal(model.layers[0](out.hidden_states[0]))
    for block, stream, weights in zip(model.layers, out.hidden_states, out.attentions):
        value = block.self_attn.v_proj(stream)
        torch.testing.assert_close(block.self_attn.o_proj(weights[:, 0] @ value), block.self_attn(stream))
    with pytest.raises(InputError, match="model.recall.context_length"):
        model(torch.zeros(1, 33, dtype=torch.long))


# ---- training and its cache


def test_training_learns_and_repeats():
    config = replace(TINY, context_length=48, batch_size=32, steps=60, learning_rate=3e-3)
    batch = draw(config, n=200, length=48, seed=7)
    tokens, labels, scored = (torch.from_numpy(x) for x in (batch.tokens, batch.labels, batch.scored))

    def loss(model):
        return torch.nn.functional.cross_entropy(model(tokens).logits[scored], labels[scored]).item()

    model = train(config, progress=False)
    # Knowing that noise follows half of the time and nothing else costs log 2 + (log 65) / 2 nats.
    assert loss(initial_model(config)) > 4 > np.log(2) + np.log(65) / 2 + 0.2 > loss(model)
    again = train(config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    start = initial_model(config)
    for name in ("embed_tokens", "embed_positions", "lm_head"):
        assert torch.equal(model.get_submodule(name).weight, start.get_submodule(name).weight)


def test_sgd_trains_with_momentum():
    config = replace(TINY, optimizer="sgd", learning_rate=0.03)
    one, two = train(config, progress=False), train(replace(config, momentum=0.0), progress=False)
    assert not torch.equal(one.layers[0].mlp.up_proj.weight, two.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_resumes_at_the_latest_checkpoint_bit_for_bit(tiny, monkeypatch, optimizer):
    config = replace(tiny, optimizer=optimizer)
    uninterrupted, sampled = train(config, progress=False), []
    first = load_recall(ensure_trained(replace(config, checkpoint=0), progress=False))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), initial_model(config).parameters()))
    ensure_trained(replace(config, checkpoint=3), progress=False)
    monkeypatch.setattr(recall_training, "sample", lambda *args: sampled.append(1) or sample(*args))
    fifth = load_recall(ensure_trained(replace(config, checkpoint=5), progress=False))
    assert len(sampled) == 2
    last = load_recall(ensure_trained(config, progress=False))
    assert len(sampled) == 5
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), uninterrupted.parameters()))
    straight = train(replace(config, checkpoint=5), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(fifth.parameters(), straight.parameters()))
    assert cache_folder(replace(config, checkpoint=8)) == cache_folder(config)


def test_saved_model_loads_bit_identically(tiny):
    from transformers import AutoModelForCausalLM

    path = ensure_trained(tiny, progress=False)
    trained, loaded = train(tiny, progress=False), load_recall(path)
    assert trained.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(trained.state_dict().values(), loaded.state_dict().values()))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in trained.parameters()]
    assert process_of(loaded.config) == recall_process(tiny)
    assert (loaded.config.context_length, loaded.config.dim, loaded.config.hidden_dim) == (32, 32, 48)
    assert loaded.config.to_diff_dict().keys() >= {"seed", "steps", "optimizer", "learning_rate", "batch_size", "noise"}
    auto = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    assert isinstance(auto, RecallForCausalLM)
    assert auto.layers[0].self_attn.eager and not loaded.layers[0].self_attn.eager
    assert load_recall(path, "eager").layers[1].self_attn.eager
    tokens = torch.from_numpy(draw(n=2, length=20).tokens)
    torch.testing.assert_close(auto(tokens).logits, loaded(tokens).logits, rtol=1e-5, atol=1e-5)


def test_cache_is_used_and_keyed_by_what_matters(tiny, monkeypatch, tmp_path):
    path = ensure_trained(tiny, progress=False)
    assert path.parent.parent == tmp_path
    for change in ({"steps": 9}, {"seed": 1}, {"noise": 0.4}, {"noise_token": "!"}, {"hidden_dim": 49}):
        assert cache_folder(replace(tiny, **change)) != path
    assert cache_folder(replace(tiny, momentum=0.5)) == path  # of SGD only
    monkeypatch.setattr(recall_training, "train", lambda *args: pytest.fail("trained again"))
    assert ensure_trained(tiny, progress=False) == path
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_default_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(TINY).is_relative_to(tmp_path / "spectral-harness")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(TINY).is_relative_to(tmp_path / "home/.cache/spectral-harness")


@pytest.mark.parametrize("damage", ["truncate", "flip", "unfinished", "config"])
def test_a_damaged_cache_is_trained_again(tiny, damage):
    path = ensure_trained(tiny, progress=False)
    weights = (path / "model.safetensors").read_bytes()
    if damage == "truncate":
        (path / "model.safetensors").write_bytes(weights[:1000])
    elif damage == "flip":
        (path / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif damage == "unfinished":
        (path / "complete.json").unlink()
    else:
        (path / "config.json").write_text("{}")
    assert ensure_trained(tiny, progress=False) == path
    assert (path / "model.safetensors").read_bytes() == weights
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("broken", [False, True])
def test_another_process_may_finish_first(tiny, monkeypatch, broken):
    """While this one trains, the same model is installed by another; the folder is never half there."""
    real, installed = recall_training.train, []

    def overtaken(*args):
        monkeypatch.setattr(recall_training, "train", real)
        path = ensure_trained(tiny, progress=False)
        installed.append((path / "complete.json").stat().st_ino)
        if broken:
            (path / "model.safetensors").unlink()
        return real(*args)

    monkeypatch.setattr(recall_training, "train", overtaken)
    path = ensure_trained(tiny, progress=False)
    assert ((path / "complete.json").stat().st_ino == installed[0]) is not broken
    load_recall(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_training_leaves_nothing(tiny, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(recall_training, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ensure_trained(tiny)
    assert list((tmp_path / "recall").iterdir()) == []


def test_folders_that_cannot_be_used(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="model.recall.cache_dir"):
        ensure_trained(replace(tiny, cache_dir=str(tmp_path / "file")))
    with pytest.raises(InputError, match="not a saved recall model"):
        load_recall(tmp_path)
    with pytest.raises(InputError, match="model.attn_implementation"):
        load_recall(tmp_path, "flash_attention_2")


def test_configuration_of_the_model_is_known_without_its_weights():
    config = recall_config(replace(TINY, n_triggers=2, noise_token="!"))
    assert (config.vocab_size, config.trigger_ids, config.noise_token_id) == (65, [1, 43], 2)
    assert (config.model_type, config.num_hidden_layers, config.num_attention_heads) == ("recall", 2, 1)
