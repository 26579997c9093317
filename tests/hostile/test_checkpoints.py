"""Checkpoints that are damaged, impossible or being changed: one line before weights are loaded, never a wrong number.

A case is what is done to a tiny checkpoint, and what the line must say. `harness plan` and `harness spectra` must exit
with status 2 after this one line.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from harness.cli import main
from harness.engine.run import run
from harness.errors import InputError
from harness.measurements import ABLATION, SPECTRA, compose_settings
from harness.measurements.ablation.tables import read_metrics
from harness.models import pretrained
from harness.models.families import matrices_of, skeleton
from harness.models.loading import describe_model, load
from harness.models.settings import ModelSettings
from tests.checkpoints import save_checkpoint, text_file
from tests.studies import quiet

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A tiny checkpoint without fault."""
    return save_checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def model(whole, tmp_path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def refused(model, capsys, tmp_path) -> Callable[[str], None]:
    """A function that asserts that the checkpoint is refused with one line which holds a text."""
    text = text_file(tmp_path / "text.txt", 40)

    def check(says: str) -> None:
        for words in (["plan", "target=all", "task=text", f"tasks.text.data_files={text}"], ["spectra"]):
            command, *rest = words
            capsys.readouterr()
            folder = [f"model.name={model}", f"output={tmp_path / 'out'}"]
            assert main([command, "model=pretrained", *folder, *rest]) == 2
            captured = capsys.readouterr()
            assert captured.err.count("\n") == 1 and captured.err.startswith("harness: "), captured.err
            assert says in captured.err and "Traceback" not in captured.err
        assert not (tmp_path / "out").exists()

    return check


def header(content: object, data: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a safetensors file with this header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: object = 0, end: object = 4, shape: object = (1,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "one byte": lambda old: old[:1],
    "seven bytes": lambda old: old[:7],
    "only the length": lambda old: old[:8],
    "half of the header": lambda old: old[:60],
    "header without data": lambda old: old[: 8 + int.from_bytes(old[:8], "little")],
    "half": lambda old: old[: len(old) // 2],
    "the last byte is missing": lambda old: old[:-1],
    "one byte too many": lambda old: old + b"\0",
    "twice": lambda old: old + old,
    "zeros": lambda old: bytes(len(old)),
    "ones": lambda old: b"\xff" * len(old),
    "a page of HTML": lambda old: b"<!DOCTYPE html><html><body>404</body></html>" * 40,
    "a pointer of Git LFS": lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "a zip, as pickled weights are": lambda old: b"PK\x03\x04" + old[4:],
    "an oversized header": lambda old: struct.pack("<Q", 1 << 40) + old[8:],
    "a header as long as 2**64": lambda old: b"\xff" * 8 + old[8:],
    "a header just beyond the file": lambda old: struct.pack("<Q", len(old) - 7) + old[8:],
    "a header of no bytes": lambda old: header(b""),
    "a header that is no JSON": lambda old: header(b"x" * 100),
    "a header that is no UTF-8": lambda old: header(b'{"\xff\xfe": 1}'),
    "a header that is a list": lambda old: header([1, 2]),
    "a header that is a number": lambda old: header(3),
    "a header that is null": lambda old: header(None),
    "a header that is nested 100,000 times": lambda old: header(b"[" * 100_000 + b"]" * 100_000),
    "a header with an integer of 5,000 digits": lambda old: header(b'{"a": ' + b"9" * 5000 + b"}"),
    "a tensor that is a list": lambda old: header({"a": []}),
    "a tensor without a shape": lambda old: header({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"1234"),
    "a tensor of an unknown dtype": lambda old: header({"a": tensor(dtype="F33")}, b"1234"),
    "a dtype that is a list": lambda old: header({"a": tensor(dtype=["F32"])}, b"1234"),
    "a shape that is a text": lambda old: header({"a": tensor(shape="1")}, b"1234"),
    "a negative size": lambda old: header({"a": tensor(shape=(-1,))}, b"1234"),
    "a size that is not whole": lambda old: header({"a": tensor(shape=(1.0,))}, b"1234"),
    "a size that is true": lambda old: header({"a": tensor(shape=(True,))}, b"1234"),
    "a size of 2**70": lambda old: header({"a": tensor(shape=(2**70,))}, b"1234"),
    "offsets in reverse": lambda old: header({"a": tensor(4, 0)}, b"1234"),
    "a negative offset": lambda old: header({"a": tensor(-4, 0)}, b"1234"),
    "offsets beyond the end": lambda old: header({"a": tensor(0, 400, (100,))}, b"1234"),
    "one offset": lambda old: header({"a": {**tensor(), "data_offsets": [0]}}, b"1234"),
    "three offsets": lambda old: header({"a": {**tensor(), "data_offsets": [0, 4, 8]}}, b"1234"),
    "offsets that are texts": lambda old: header({"a": tensor("0", "4")}, b"1234"),
    "two tensors in the same bytes": lambda old: header({"a": tensor(), "b": tensor()}, b"1234"),
    "a hole between two tensors": lambda old: header({"a": tensor(), "b": tensor(8, 12)}, bytes(12)),
    "more bytes than the shape": lambda old: header({"a": tensor(0, 8)}, bytes(8)),
    "fewer bytes than the shape": lambda old: header({"a": tensor(0, 4, (2,))}, bytes(4)),
}


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_a_damaged_file(model, refused, damage):
    file = model / WEIGHTS
    file.write_bytes(DAMAGED_FILES[damage](file.read_bytes()))
    refused(f"model.name: cannot read {file} as safetensors: ")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(1, 255))
def test_any_byte_of_a_header_may_be_wrong(whole, tmp_path, at, byte):
    """A changed byte is refused, or gives another identity (the names of tensors are part of it)."""
    folder = tmp_path / "any"
    if not folder.exists():
        shutil.copytree(whole, folder)
    content = bytearray((whole / WEIGHTS).read_bytes())
    content[at] ^= byte
    (folder / WEIGHTS).write_bytes(content)
    identity = describe_model(ModelSettings(name=str(whole))).identity
    try:
        assert describe_model(ModelSettings(name=str(folder))).identity != identity
    except InputError as error:
        assert "cannot read" in str(error) and "\n" not in str(error)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_download_may_stop_anywhere(whole, tmp_path, share):
    folder = tmp_path / "cut"
    if not folder.exists():
        shutil.copytree(whole, folder)
    content = (whole / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="cannot read .*model.safetensors as safetensors"):
        describe_model(ModelSettings(name=str(folder)))


def test_files_that_are_no_regular_files(model, refused):
    file = model / WEIGHTS
    file.unlink()
    os.mkfifo(file)  # whoever opens it waits for a writer for ever
    refused(f"model.name: {file} is not a regular file")
    file.unlink()
    file.mkdir()
    refused(f"model.name: {file} is not a regular file")
    file.rmdir()
    file.symlink_to("/dev/zero")
    refused(f"model.name: {file} is not a regular file")
    file.unlink()
    file.symlink_to(file.name)
    refused("model.name: ")


@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_a_file_that_is_a_fifo(model, refused, name):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(f"model.name: {model / name} is not a regular file")


# What an index file holds -> what the line says.
BROKEN_INDEXES: dict[str, tuple[str, str]] = {
    "empty": ("", "it is not a JSON object with a weight_map"),
    "half": ('{"weight_map": {"a": "model-1', "it is not a JSON object with a weight_map"),
    "a list": ("[]", "it is not a JSON object with a weight_map"),
    "a number": ("7", "it is not a JSON object with a weight_map"),
    "null": ("null", "it is not a JSON object with a weight_map"),
    "no map": ("{}", "it is not a JSON object with a weight_map"),
    "a map that is a list": ('{"weight_map": ["a"]}', "it is not a JSON object with a weight_map"),
    "a map that is null": ('{"weight_map": null}', "it is not a JSON object with a weight_map"),
    "an empty map": ('{"weight_map": {}}', "its weight_map is empty"),
    "a file that is a number": ('{"weight_map": {"a": 1}}', "it is not a JSON object with a weight_map"),
    "a file that is a list": ('{"weight_map": {"a": ["b"]}}', "it is not a JSON object with a weight_map"),
    "nested 100,000 times": ("[" * 100_000, "it is not a JSON object with a weight_map"),
    "5,000 digits": ('{"weight_map": ' + "9" * 5000 + "}", "it is not a JSON object with a weight_map"),
    "a file above": ('{"weight_map": {"a": "../model.safetensors"}}', "no safetensors file in its folder"),
    "an absolute file": ('{"weight_map": {"a": "/etc/passwd.safetensors"}}', "no safetensors file in its folder"),
    "no name": ('{"weight_map": {"a": ""}}', "no safetensors file in its folder"),
    "a NUL": ('{"weight_map": {"a": "a\\u0000.safetensors"}}', "no safetensors file in its folder"),
    "pickled weights": ('{"weight_map": {"a": "pytorch_model.bin"}}', "no safetensors file in its folder"),
    "a file that is not there": (
        '{"weight_map": {"a": "none.safetensors"}}',
        "names none.safetensors, which is not there",
    ),
    "itself": ('{"weight_map": {"a": "model.safetensors.index.json"}}', "no safetensors file in its folder"),
}


@pytest.mark.parametrize("index", BROKEN_INDEXES)
def test_a_broken_index(model, refused, index):
    content, says = BROKEN_INDEXES[index]
    (model / WEIGHTS).rename(model / "other.safetensors")
    (model / INDEX).write_text(content)
    refused(says)


# What config.json becomes -> what the line says. None takes a key away.
IMPOSSIBLE_CONFIGS: dict[str, dict] = {
    "no type": {"model_type": None},
    "an unknown type": {"model_type": "llamma"},
    "a type that is a list": {"model_type": []},
    "an empty type": {"model_type": ""},
    "no layers": {"num_hidden_layers": -1},
    "a million layers": {"num_hidden_layers": 10**6},
    "10**30 layers": {"num_hidden_layers": 10**30},
    "layers that are a text": {"num_hidden_layers": "three"},
    "layers that are not whole": {"num_hidden_layers": 2.5},
    "layers that are a list": {"num_hidden_layers": [3]},
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -4},
    "heads that do not divide": {"num_attention_heads": 7},
    "heads that are a text": {"num_attention_heads": "4"},
    "a width of zero": {"hidden_size": 0},
    "a negative width": {"hidden_size": -24},
    "a width of 10**30": {"hidden_size": 10**30},
    "a width of 2**62": {"hidden_size": 2**62},
    "a width that is a text": {"hidden_size": "wide"},
    "a width that is a list": {"hidden_size": [24]},
    "another width": {"hidden_size": 32},
    "another inner width": {"intermediate_size": 41},
    "a negative inner width": {"intermediate_size": -1},
    "another vocabulary": {"vocab_size": 68},
    "no vocabulary": {"vocab_size": -1},
    "a vocabulary of 2**60": {"vocab_size": 2**60},
    "a vocabulary that is a text": {"vocab_size": "all"},
    "an unknown activation": {"hidden_act": "silly"},
    "an activation that is a list": {"hidden_act": ["silu"]},
    "an activation that is a number": {"hidden_act": 3},
    "a context that is a text": {"max_position_embeddings": "long"},
    "heads of keys that do not divide": {"num_key_value_heads": 3},
    "no heads of keys": {"num_key_value_heads": 0},
    "a head of size -1": {"head_dim": -8},
    "a padding token beyond": {"pad_token_id": 10**6},
    "a norm that is a text": {"rms_norm_eps": "small"},
    "rope that is a number": {"rope_parameters": 3},
    "rope of an unknown type": {"rope_parameters": {"rope_type": "mad", "rope_theta": 1.0}},
    "weights of another name": {"transformers_weights": "none.safetensors"},
    "weights above": {"transformers_weights": "../model.safetensors"},
    "weights that are a number": {"transformers_weights": 5},
}


@pytest.mark.parametrize("change", IMPOSSIBLE_CONFIGS)
def test_an_impossible_config(model, change):
    """It is one line, from the plan at the latest when the weights are to be loaded, and never a crash."""
    content = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps({**content, **IMPOSSIBLE_CONFIGS[change]}))
    chosen = ModelSettings(name=str(model), device="cpu")
    with pytest.raises(InputError) as caught:
        load(chosen, describe_model(chosen))
    assert "model" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"text"',
        "[" * 100_000,
        '{"a": ' + "9" * 5000 + "}",
        "\0",
        '{"model_type": "llama", "hidden_size": NaN}',
        '{"hidden_size": Infinity}',
    ],
)
def test_a_config_that_is_no_config(model, refused, content):
    (model / CONFIG).write_text(content)
    refused("model.name: ")


NUMBERS = st.one_of(st.integers(-3, 200), st.sampled_from([2**31, 2**63, 2**64, 10**40]), st.floats(), st.booleans())
VALUES = st.one_of(
    NUMBERS,
    st.none(),
    st.text(max_size=6),
    st.lists(NUMBERS, max_size=3),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
)
KEYS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "max_position_embeddings",
    "torch_dtype",
    "dtype",
    "attention_bias",
    "model_type",
    "architectures",
    "auto_map",
    "quantization_config",
    "layer_types",
    "pad_token_id",
    "transformers_weights",
    "text_config",
    "id2label",
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_any_value_of_a_config(whole, tmp_path, changes):
    """The plan of the model succeeds or is refused with one line."""
    folder = tmp_path / "any"
    if not folder.exists():
        shutil.copytree(whole, folder)
    content = json.loads((whole / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))
    try:
        description = describe_model(ModelSettings(name=str(folder), device="cpu"))
        matrices_of(skeleton(description.config, description.family), description.family)
    except InputError as error:
        assert "\n" not in str(error) and str(error)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_weights_without_a_scale(model, dtype):
    """Their integers would be taken for weights."""
    tensors = load_file(model / WEIGHTS)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    save_file({**tensors, name: (tensors[name] * 50).to(dtype)}, model / WEIGHTS)
    chosen = ModelSettings(name=str(model), device="cpu")
    with pytest.raises(InputError, match=rf"holds {name} as .*no quantization_config that gives its scale"):
        load(chosen)
    with pytest.raises(InputError, match="no quantization_config"):
        run(SPECTRA, compose_settings("spectra", ["model=pretrained", f"model.name={model}", f"output={model}-out"]))


def test_an_adapter_is_not_passed_over(model, refused):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    refused("holds an adapter (adapter_config.json), which is not applied here; write model.adapter=")


def study(model: Path, folder: Path, text: Path) -> list[str]:
    return [
        "model=pretrained",
        f"model.name={model}",
        "target=matrix",
        "target.layer_types=[down_proj]",
        "region=decile",
        "region.deciles=[1,10]",
        "task=text",
        f"tasks.text.data_files={text}",
        "tasks.text.window=16",
        "tasks.text.limit=4",
        "runtime.threads=1",
        "model.device=cpu",
        f"output={folder}",
    ]


@pytest.fixture(scope="module")
def undisturbed(whole, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    text = text_file(folder / "text.txt", 100)
    return run(ABLATION, compose_settings("ablation", study(whole, folder / "study", text)), quiet()).folder


def changed(file: Path) -> bytes:
    """Its bytes with other weights: every byte of the second half is another."""
    content = file.read_bytes()
    half = len(content) // 2
    return content[:half] + bytes(byte ^ 1 for byte in content[half:])


def in_place(file: Path, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.write(content)


def replaced(file: Path, content: bytes) -> None:
    other = file.with_name("other")
    other.write_bytes(content)
    os.replace(other, file)


def truncated(file: Path, content: bytes) -> None:
    os.truncate(file, 100)


def deleted(file: Path, content: bytes) -> None:
    file.unlink()


CHANGES = {"in place": in_place, "replaced": replaced, "truncated": truncated, "deleted": deleted}


def faults(when: str) -> list:
    """Every way to change a file, each as a row of experiments/faults."""
    return [pytest.param(change, marks=pytest.mark.fault(f"weights {how} {when}"))
            for change, how in zip(CHANGES, ("overwritten in place", "replaced", "truncated", "deleted"))]


@pytest.mark.parametrize("change", faults("while a study runs"))
def test_weights_that_change_while_a_study_runs(model, undisturbed, tmp_path, monkeypatch, change):
    """The rows are those of the weights that were planned, whatever happens to the file once it is loaded."""
    from harness.measurements.ablation.cell_run import CellRun

    text, real, seen = undisturbed.parent / "text.txt", CellRun._measure, []

    def measure(*arguments):
        seen.append(1)
        if len(seen) == 3:
            CHANGES[change](model / WEIGHTS, changed(model / WEIGHTS))
        return real(*arguments)

    monkeypatch.setattr(CellRun, "_measure", measure)
    outcome = run(ABLATION, compose_settings("ablation", study(model, tmp_path / "study", text)), quiet())
    assert len(seen) == outcome.done > 5 and outcome.failed == 0
    rows = [read_metrics(folder).drop(columns=["model", "settings"]) for folder in (undisturbed, outcome.folder)]
    assert (rows[0].value == rows[1].value).all() and (rows[0].cell_id == rows[1].cell_id).all()


@pytest.mark.parametrize("change", faults("between the digest and the load, and then restored"))
def test_weights_that_change_between_the_digest_and_the_load(model, undisturbed, tmp_path, monkeypatch, change):
    text, file, real = undisturbed.parent / "text.txt", model / WEIGHTS, pretrained.read_state
    before = file.read_bytes()

    def read(files):
        CHANGES[change](file, changed(file))
        try:
            return real(files)
        finally:
            file.write_bytes(before)  # a check afterwards would find nothing

    monkeypatch.setattr(pretrained, "read_state", read)
    with pytest.raises(InputError, match=r"has changed since the run was planned|No such file"):
        run(ABLATION, compose_settings("ablation", study(model, tmp_path / "study", text)), quiet())
    assert not list((tmp_path / "study").rglob("*.parquet"))


@pytest.mark.fault("weights overwritten in place while spectra stream them")
def test_weights_that_change_while_spectra_stream_them(model, tmp_path, monkeypatch):
    from harness.measurements.spectra import measure
    from harness.measurements.spectra.tables import read_spectra

    real, seen = measure._measure_matrix, []

    def one(*arguments):
        seen.append(1)
        if len(seen) == 4:
            in_place(model / WEIGHTS, changed(model / WEIGHTS))
        return real(*arguments)

    words = ["model=pretrained", f"model.name={model}", "threads=1"]
    run(SPECTRA, compose_settings("spectra", [*words, f"output={tmp_path / 'clean'}"]), quiet())
    monkeypatch.setattr(measure, "_measure_matrix", one)
    with pytest.raises(InputError, match="has changed since the run was planned"):
        run(SPECTRA, compose_settings("spectra", [*words, f"output={tmp_path / 'moved'}"]), quiet())
    rows, right = (read_spectra(tmp_path / name, "matrices").set_index("spectrum_id") for name in ("moved", "clean"))
    assert 0 < len(rows) < len(right) and set(rows.status) == {"ok"}
    assert (rows.frobenius_norm == right.frobenius_norm[rows.index]).all()


@pytest.mark.fault("weights that change in memory during a run")
def test_weights_that_change_in_memory_make_every_row_of_the_run_an_error(model, undisturbed, tmp_path, monkeypatch):
    """As a fault of this program or of the memory would do it."""
    from harness.measurements.ablation.cell_run import CellRun

    text, real, seen = undisturbed.parent / "text.txt", CellRun._measure, []

    def measure(self, *arguments):
        seen.append(1)
        if len(seen) == 3:
            next(self.loaded.model.parameters()).data.view(-1)[0] += 1
        return real(self, *arguments)

    config = compose_settings("ablation", study(model, tmp_path / "study", text))
    with monkeypatch.context() as patched:
        patched.setattr(CellRun, "_measure", measure)
        outcome = run(ABLATION, config, quiet())
    assert outcome.done == 0 and outcome.failed == len(seen)
    rows = read_metrics(outcome.folder)
    assert set(rows.status) == {"error"} and rows.value.isna().all()
    assert rows.error.str.contains("the weights in memory were not the same").all()
    again = run(ABLATION, config, quiet())
    assert again.failed == 0 and again.done == outcome.failed
    rows = [read_metrics(folder).drop(columns=["model", "settings"]) for folder in (undisturbed, again.folder)]
    assert (rows[0].value == rows[1].value).all()


@pytest.mark.fault("weights overwritten that an index names in a subfolder")
def test_weights_of_an_index_in_a_subfolder_count(model):
    """Every file that the loader opens is part of the identity."""
    (model / "parts").mkdir()
    (model / WEIGHTS).rename(model / "parts" / "one.safetensors")
    names = list(load_file(model / "parts" / "one.safetensors"))
    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "parts/one.safetensors")}))
    chosen = ModelSettings(name=str(model), device="cpu")
    before = describe_model(chosen)
    assert load(chosen, before).missing == ()
    in_place(model / "parts" / "one.safetensors", changed(model / "parts" / "one.safetensors"))
    assert describe_model(chosen).identity != before.identity
    with pytest.raises(InputError, match="has changed since the run was planned"):
        load(chosen, before)


def test_the_named_weights_of_a_config_count(model):
    content = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps({**content, "transformers_weights": "mine.safetensors"}))
    shutil.copy(model / WEIGHTS, model / "mine.safetensors")
    chosen = ModelSettings(name=str(model), device="cpu")
    before = describe_model(chosen).identity
    in_place(model / "mine.safetensors", changed(model / "mine.safetensors"))
    assert describe_model(chosen).identity != before
    named = describe_model(chosen).identity
    in_place(model / WEIGHTS, changed(model / WEIGHTS))  # nobody opens this one
    assert describe_model(chosen).identity == named


def test_trusted_code_counts(model):
    chosen = ModelSettings(name=str(model), device="cpu", trust_remote_code=True)
    (model / "modeling_mine.py").write_text("a = 1\n")
    before = describe_model(chosen).identity
    (model / "modeling_mine.py").write_text("a = 2\n")
    assert describe_model(chosen).identity != before
