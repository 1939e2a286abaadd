"""Write a GGUF file of the llama architecture as a folder of the hub's format, for engines that read nothing else.

Weights are dequantized to bfloat16 in one safetensors file; the tokenizer is byte-level BPE with the file's vocabulary.

    python bench/hf_folder.py MODEL.gguf FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write(model: Path, folder: Path) -> Path:
    """Write `folder` from `model` and return it; a folder that is not whole has no config.json."""
    reader = gguf.GGUFReader(model)
    config = _config(reader)
    folder.mkdir(parents=True, exist_ok=True)
    _weights(reader, config, folder / "model.safetensors")
    _tokenizer(reader, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _config(reader: gguf.GGUFReader) -> dict[str, Any]:
    def get(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].contents()),
        "bos_token_id": reader.fields["tokenizer.ggml.bos_token_id"].contents(),
        "eos_token_id": reader.fields["tokenizer.ggml.eos_token_id"].contents(),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "torch_dtype": "bfloat16",
    }


def _weights(reader: gguf.GGUFReader, config: dict[str, Any], path: Path) -> None:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    pieces: list[bytes] = []
    at = 0
    for tensor in reader.tensors:
        name = NAMES.get(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name is None:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{NAMES[kind]}.weight"
            if kind in heads:
                values = halves(values, heads[kind])
        rounded = (np.ascontiguousarray(values, np.float32).view(np.uint32) + 0x8000) >> 16
        pieces.append(rounded.astype(np.uint16).tobytes())
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [at, at + len(pieces[-1])]}
        at += len(pieces[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.writelines(pieces)


def halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the rows of q or k with rotated pairs in two halves of a head; a llama GGUF has them side by side."""
    return np.ascontiguousarray(rows.reshape(n_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape))


def _tokenizer(reader: gguf.GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ", 1)) for merge in reader.fields["tokenizer.ggml.merges"].contents()]
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    ends = {key: tokens[reader.fields[f"tokenizer.ggml.{key}_token_id"].contents()] for key in ("bos", "eos")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ends["bos"], "eos_token": ends["eos"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), Path(sys.argv[2])))
