"""Write a random-weight model with the shape, types and vocabulary size of Qwen2.5-1.5B as Q4_K_M: 1.1 GB.

It talks nonsense, at the cost and with the memory of the real one. Weights are written piece by piece.

    python bench/big_model.py [FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

from edgelm.files.ggml_types import TensorType
from edgelm.files.strings import StringArray
from edgelm.testing import TensorData, random_weights
from edgelm.testing.gguf_writer import ALIGNMENT, header_bytes

NAME = "qwen2.5-1.5b-shape-random-Q4_K_M.gguf"
N_BLOCKS, N_EMBD, N_FF, N_HEADS, N_KV_HEADS = 28, 1536, 8960, 12, 2
N_VOCAB, N_MERGES = 151_936, 151_387
PIECE = 1 << 24
"""Weights made at a time."""

Q4_K, Q6_K, F32 = TensorType.Q4_K, TensorType.Q6_K, TensorType.F32
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write(path: Path, seed: int = 0) -> Path:
    """Write the model to `path`; a file that is not whole never has that name."""
    tensors = list(shapes())
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as out:
        out.write(header_bytes(metadata(seed), tensors))
        for number, tensor in enumerate(tensors):
            out.write(b"\0" * (-out.tell() % ALIGNMENT))
            for piece in weights(tensor, np.random.default_rng([seed, number])):
                out.write(piece)
        out.write(b"\0" * (-out.tell() % ALIGNMENT))
    unfinished.replace(path)
    return path


def shapes() -> Iterator[TensorData]:
    """Yield the tensors without their data; types as llama.cpp's quantizer mixes them for Q4_K_M."""
    kv = N_EMBD // N_HEADS * N_KV_HEADS
    yield TensorData("token_embd.weight", Q4_K, (N_EMBD, N_VOCAB), b"")
    for i in range(N_BLOCKS):
        better = Q6_K if i < N_BLOCKS // 8 or i >= 7 * N_BLOCKS // 8 or (i - N_BLOCKS // 8) % 3 == 2 else Q4_K
        for name, kind, shape in (
            ("attn_norm.weight", F32, (N_EMBD,)),
            ("attn_q.weight", Q4_K, (N_EMBD, N_EMBD)),
            ("attn_q.bias", F32, (N_EMBD,)),
            ("attn_k.weight", Q4_K, (N_EMBD, kv)),
            ("attn_k.bias", F32, (kv,)),
            ("attn_v.weight", better, (N_EMBD, kv)),
            ("attn_v.bias", F32, (kv,)),
            ("attn_output.weight", Q4_K, (N_EMBD, N_EMBD)),
            ("ffn_norm.weight", F32, (N_EMBD,)),
            ("ffn_gate.weight", Q4_K, (N_EMBD, N_FF)),
            ("ffn_up.weight", Q4_K, (N_EMBD, N_FF)),
            ("ffn_down.weight", better, (N_FF, N_EMBD)),
        ):
            yield TensorData(f"blk.{i}.{name}", kind, shape, b"")
    yield TensorData("output_norm.weight", F32, (N_EMBD,), b"")
    yield TensorData("output.weight", Q6_K, (N_EMBD, N_VOCAB), b"")


def weights(tensor: TensorData, rng: np.random.Generator) -> Iterator[bytes]:
    """Yield the bytes of a tensor, whole rows at a time."""
    width = tensor.shape[0]
    if len(tensor.shape) == 1:
        mean, spread = (1.0, 0.1) if "norm" in tensor.name else (0.0, 0.1)
        yield rng.normal(mean, spread, width).astype("<f4").tobytes()
        return
    rows, step = tensor.shape[1], max(1, PIECE // width)
    for first in range(0, rows, step):
        yield random_weights(tensor.type, min(step, rows - first) * width, width**-0.5, rng)


def metadata(seed: int) -> dict[str, Any]:
    tokens, merges = vocabulary(np.random.default_rng([seed, 1 << 20]))
    n_words = len(tokens)
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    types = [1] * n_words + [3] * 3 + [5] * (N_VOCAB - n_words - 3)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), N_VOCAB)]
    return {
        "general.architecture": "qwen2",
        "general.name": "random weights in the shape of Qwen2.5 1.5B",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "qwen2.block_count": N_BLOCKS,
        "qwen2.context_length": 32_768,
        "qwen2.embedding_length": N_EMBD,
        "qwen2.feed_forward_length": N_FF,
        "qwen2.attention.head_count": N_HEADS,
        "qwen2.attention.head_count_kv": N_KV_HEADS,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
        "qwen2.rope.freq_base": 1_000_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": StringArray.of(tokens),
        "tokenizer.ggml.token_type": np.asarray(types, np.int32),
        "tokenizer.ggml.merges": StringArray.of(merges),
        "tokenizer.ggml.eos_token_id": n_words + 2,
        "tokenizer.ggml.padding_token_id": n_words,
        "tokenizer.ggml.bos_token_id": n_words,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def vocabulary(rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Return made-up tokens of real number and length, and the merges that spell each from two earlier ones."""
    letters = byte_letters()
    tokens = list(letters)
    merges: list[str] = []
    seen = set(tokens)
    space = letters[32]
    pool = [letters[ord(c)] for c in "etaoinshrdlcumwfgypbvkjxqz"] + [space] + letters  # what grows
    while len(merges) < N_MERGES:
        draws = rng.random((4096, 2)) ** (2, 5)  # early ones, which are short and of common letters, most often
        for left, right in (draws * len(pool)).astype(int).tolist():
            a, b = pool[left], pool[right]
            merged = a + b
            if space in b or len(merged) > 15 or merged in seen:
                continue
            seen.add(merged)
            tokens.append(merged)
            merges.append(f"{a} {b}")
            pool.append(merged)
            if len(merges) == N_MERGES:
                break
    return tokens, merges


def byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte: itself if printable, else the next letter from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + hidden.index(byte)) for byte in range(256)]


def default_path() -> Path:
    return common.scratch_folder() / NAME


def made() -> Path:
    """Return the model's path; the first call writes it."""
    path = default_path()
    return path if path.is_file() else write(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=default_path())
    target = parser.parse_args().file
    write(target)
    print(f"{target}: {target.stat().st_size:,} bytes")
