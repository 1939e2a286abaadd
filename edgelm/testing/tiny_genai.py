"""Tiny random models as folders of onnxruntime-genai: genai_config.json, a graph with its weights beside it, texts.

Made of the same tensors as `tiny_model`, so that both must compute the same. Needs the `onnx` package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.testing.tiny import TinySpec, tiny_parts, tiny_spec
from edgelm.testing.tiny_folder import write_tokenizer

BLOCK = 32
EPSILON = 1e-5


def tiny_genai(
    folder: Path | str,
    architecture: str = "llama",
    *,
    in_place: bool = True,
    last_only: bool = False,
    quantized: bool = False,
    inline: bool = False,
    cache: str = "float32",
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of the `llama` or `qwen2` architecture and return its folder.

    `in_place`: caches grow in place (GroupQueryAttention), else they are copied (MultiHeadAttention; as many key heads
    as heads). `last_only`: logits of the last token only. `quantized`: matrices as 4-bit blocks. `inline`: weights in
    the graph's own file. `cache`: type of keys and values. `config`: more keys for the object `model`.
    """
    import onnx

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = tiny_spec(architecture, **overrides)
    metadata, tensors = tiny_parts(spec, "F32", seed)
    weights = {}
    for tensor in tensors:
        data = tensor.data() if callable(tensor.data) else tensor.data
        weights[tensor.name] = np.frombuffer(data, np.float32).reshape(tensor.shape[::-1])
    n_vocab = len(weights["token_embd.weight"])
    graph = _Graph(spec, weights, quantized=quantized, in_place=in_place, cache=cache)
    model = graph.model(n_vocab, last_only)
    path = folder / "model.onnx"
    (folder / "model.onnx.data").unlink(missing_ok=True)  # it would be appended to
    onnx.save_model(model, str(path), save_as_external_data=not inline, location="model.onnx.data", size_threshold=64)
    keys = _config(spec, n_vocab, metadata, in_place) | dict(config or {})
    said = {"model": keys, "search": {"do_sample": False, "max_length": spec.n_context, "temperature": 0.5}}
    (folder / "genai_config.json").write_text(json.dumps(said, indent=1))
    write_tokenizer(folder, metadata)
    return folder


def _config(spec: TinySpec, n_vocab: int, metadata: Mapping[str, Any], in_place: bool) -> dict[str, Any]:
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    names |= {} if in_place else {"position_ids": "position_ids"}
    return {
        "type": spec.architecture,
        "context_length": spec.n_context,
        "vocab_size": n_vocab,
        "eos_token_id": [metadata["tokenizer.ggml.eos_token_id"]],
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": spec.head_dim,
            "hidden_size": spec.n_embd,
            "num_attention_heads": spec.n_heads,
            "num_hidden_layers": spec.n_layers,
            "num_key_value_heads": spec.n_kv_heads,
            "inputs": names
            | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }


class _Graph:
    """Adds operations one by one; each method returns the name of its result."""

    def __init__(
        self, spec: TinySpec, weights: Mapping[str, NDArray[np.float32]], *, quantized: bool, in_place: bool, cache: str
    ) -> None:
        from onnx import TensorProto, helper, numpy_helper

        self._helper, self._types, self._array = helper, TensorProto, numpy_helper.from_array
        self._spec, self._weights, self._quantized, self._in_place, self._cache = (
            spec, weights, quantized, in_place, cache,
        )  # fmt: skip
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def model(self, n_vocab: int, last_only: bool) -> Any:
        spec, helper, types = self._spec, self._helper, self._types
        inputs = [("input_ids", types.INT64, [1, "n"]), ("attention_mask", types.INT64, [1, "total"])]
        if not self._in_place:
            inputs.append(("position_ids", types.INT64, [1, "n"]))
        n_outputs: Any = 1 if last_only else "n"
        outputs = [("logits", types.FLOAT, [1, n_outputs, n_vocab])]
        kind = types.FLOAT if self._cache == "float32" else types.FLOAT16
        for i in range(spec.n_layers):
            for what in ("key", "value"):
                shape = [1, spec.n_kv_heads, "places", spec.head_dim]
                inputs.append((f"past_key_values.{i}.{what}", kind, shape))
                outputs.append((f"present.{i}.{what}", kind, [*shape[:2], "places after", shape[3]]))
        self._prologue()
        x = self._add("Gather", self._constant("token_embd.weight"), "input_ids")
        for i in range(spec.n_layers):
            x = self._block(x, i)
        x = self._norm(x, "output_norm.weight")
        if last_only:
            x = self._add("Gather", x, self._given("last", np.array([-1], np.int64)), axis=1)
        head = "token_embd.weight" if spec.tied else "output.weight"
        self._linear(x, head, out="logits")
        graph = helper.make_graph(
            self._nodes,
            "tiny",
            [helper.make_tensor_value_info(*port) for port in inputs],
            [helper.make_tensor_value_info(*port) for port in outputs],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def _prologue(self) -> None:
        """Count tokens by the mask, and tabulate rotations."""
        total = self._add("ReduceSum", "attention_mask", self._given("one", np.array([1], np.int64)), keepdims=0)
        before = self._add("Sub", total, self._given("one", np.array([1], np.int64)))
        self._seqlens = self._add("Cast", before, to=self._types.INT32)
        length = self._add(
            "Gather", self._add("Shape", "attention_mask"), self._given("at", np.array(1, np.int64)), axis=0
        )
        self._total = self._add("Cast", length, to=self._types.INT32)
        half = self._spec.head_dim // 2
        steps = self._spec.rope_base ** (-np.arange(half) / half)
        angles = np.arange(self._spec.n_context)[:, None] * steps
        self._rotations = [
            self._given(name, table(angles).astype(np.float32)) for name, table in (("cos", np.cos), ("sin", np.sin))
        ]

    def _block(self, x: str, i: int) -> str:
        h = self._norm(x, f"blk.{i}.attn_norm.weight")
        q, k, v = (self._linear(h, f"blk.{i}.attn_{name}.weight") for name in "qkv")
        past = [f"past_key_values.{i}.{what}" for what in ("key", "value")]
        present = [f"present.{i}.{what}" for what in ("key", "value")]
        interleaved = int(self._spec.architecture == "llama")
        if self._in_place:
            h = self._attend_in_place(i, (q, k, v), past, present, interleaved)
        else:
            q, k = (self._rotated(y, interleaved) for y in (q, k))
            h = f"attention.{i}"
            heads = {"num_heads": self._spec.n_heads, "unidirectional": 1}
            self._node("MultiHeadAttention", [q, k, v, "", "", "", *past], [h, *present], **heads)
        x = self._add("Add", x, self._linear(h, f"blk.{i}.attn_output.weight"))
        h = self._norm(x, f"blk.{i}.ffn_norm.weight")
        gate = self._linear(h, f"blk.{i}.ffn_gate.weight")
        gate = self._add("Mul", gate, self._add("Sigmoid", gate))
        h = self._add("Mul", gate, self._linear(h, f"blk.{i}.ffn_up.weight"))
        return self._add("Add", x, self._linear(h, f"blk.{i}.ffn_down.weight"))

    def _attend_in_place(
        self, i: int, qkv: tuple[str, ...], past: list[str], present: list[str], interleaved: int
    ) -> str:
        spec, out, rotations = self._spec, f"attention.{i}", self._rotations
        if half := self._cache == "float16":  # the operator computes in one type
            qkv = tuple(self._add("Cast", y, to=self._types.FLOAT16) for y in qkv)
            rotations = [self._add("Cast", table, to=self._types.FLOAT16) for table in rotations]
        inputs = [*qkv, *past, self._seqlens, self._total, *rotations]
        heads = {"num_heads": spec.n_heads, "kv_num_heads": spec.n_kv_heads}
        rotary = {"do_rotary": 1, "rotary_interleaved": interleaved, "scale": spec.head_dim**-0.5}
        self._node("GroupQueryAttention", inputs, [out, *present], **heads, **rotary)
        return self._add("Cast", out, to=self._types.FLOAT) if half else out

    def _rotated(self, x: str, interleaved: int) -> str:
        heads = {"num_heads": self._spec.n_heads, "interleaved": interleaved}
        inputs = [x, "position_ids", *self._rotations]
        out = f"t{len(self._nodes)}"
        self._node("RotaryEmbedding", inputs, [out], **heads)
        return out

    def _norm(self, x: str, weight: str) -> str:
        out = f"t{len(self._nodes)}"
        inputs = [x, self._constant(weight)]
        self._nodes.append(
            self._helper.make_node("SimplifiedLayerNormalization", inputs, [out], epsilon=EPSILON, axis=-1)
        )
        return out

    def _linear(self, x: str, name: str, out: str = "") -> str:
        out = out or f"t{len(self._nodes)}"
        bias = name.replace(".weight", ".bias")
        product = f"{out}.product" if bias in self._weights else out
        rows, width = self._weights[name].shape
        if self._quantized:
            blocks, scales = quantized(self._weights[name])
            inputs = [x, self._given(f"{name}.q4", blocks), self._given(f"{name}.scales", scales)]
            sizes = {"K": width, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
            self._node("MatMulNBits", inputs, [product], **sizes)
        else:
            matrix = self._given(f"{name}.transposed", np.ascontiguousarray(self._weights[name].T))
            self._nodes.append(self._helper.make_node("MatMul", [x, matrix], [product]))
        if bias in self._weights:
            self._nodes.append(self._helper.make_node("Add", [product, self._constant(bias)], [out]))
        return out

    def _constant(self, name: str) -> str:
        return self._given(name, self._weights[name])

    def _given(self, name: str, values: NDArray[Any]) -> str:
        self._initializers.setdefault(name, self._array(values, name))
        return name

    def _add(self, op: str, *inputs: str, **attributes: Any) -> str:
        out = f"t{len(self._nodes)}"
        self._nodes.append(self._helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def _node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self._nodes.append(self._helper.make_node(op, inputs, outputs, domain="com.microsoft", **attributes))


def quantized(matrix: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return 4-bit blocks of 32 along the rows, [rows, blocks, 16] with the low half first, and their scales."""
    rows, width = matrix.shape
    blocks = matrix.reshape(rows, width // BLOCK, BLOCK)
    scales = np.abs(blocks).max(axis=2) / 7
    quants = np.rint(blocks / np.maximum(scales, 1e-12)[..., None]).astype(np.int8) + 8
    pairs = quants.astype(np.uint8).reshape(rows, width // BLOCK, BLOCK // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, scales.astype(np.float32)


def dequantized(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the numbers that the blocks of `quantized` stand for."""
    _, scales = quantized(matrix)
    blocks = matrix.reshape(*scales.shape, BLOCK)
    values = np.rint(blocks / np.maximum(scales, 1e-12)[..., None]) * scales[..., None]
    return values.reshape(matrix.shape).astype(np.float32)
