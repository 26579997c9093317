"""The beginning of a real GGUF file: its metadata, its first tokens, and its first blocks."""

from __future__ import annotations

import re
from pathlib import Path

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def beginning(source: Path, target: Path, blocks: int, tokens: int = 2000) -> None:
    """Write a GGUF file with the first blocks and tokens of another, every byte of their tensors as it is there.

    A whole file takes half a minute to read, most of it for the texts of its 49,152 tokens.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields.pop("general.architecture").contents()
    values = {name: field.contents() for name, field in fields.items()}
    kept = set(values["tokenizer.ggml.tokens"][:tokens])
    for name in ("tokens", "token_type", "scores"):
        if f"tokenizer.ggml.{name}" in values:
            values[f"tokenizer.ggml.{name}"] = values[f"tokenizer.ggml.{name}"][:tokens]
    pairs = [pair for pair in values["tokenizer.ggml.merges"] if {*pair.split(" "), pair.replace(" ", "")} <= kept]
    values |= {"tokenizer.ggml.merges": pairs, f"{architecture}.block_count": blocks}
    if f"{architecture}.vocab_size" in values:
        values[f"{architecture}.vocab_size"] = tokens

    writer = GGUFWriter(target, architecture)
    for name, field in fields.items():
        inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(name, values[name], field.types[0], inner)
    for tensor in reader.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block is None or int(block[1]) < blocks:
            rows = tensor.data[:tokens] if tensor.name in ("token_embd.weight", "output.weight") else tensor.data
            writer.add_tensor(tensor.name, rows, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
