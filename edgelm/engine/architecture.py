"""What an architecture file is, what it can read of a model's metadata, and how its model is recorded.

An architecture is a module with `ARCHITECTURES` (names as in `general.architecture`) and
`record(ops, weights, config) -> Tensor`, which returns the logits, or of a model
that embeds texts its last states. It is registered under the entry point
`edgelm.architectures`. Metadata means here what it means to llama.cpp, defaults included.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple, Protocol

from edgelm.engine.ir import RopeSpec, Trace, Weight
from edgelm.engine.ops import Ops, Tensor, Weights
from edgelm.errors import UnsupportedModel
from edgelm.files.meta import Meta
from edgelm.files.model import ModelFile

MAX_LAYERS = 512
MAX_HEADS = 4096
MAX_EMBD = 2**20

_SCALINGS = ("none", "linear", "yarn", "longrope")
# tensors that a sound model may hold and not use: which factors apply depends on the scaling and on the context
_OPTIONAL = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


class ModelConfig(NamedTuple):
    """The numbers that most architectures share, under GGUF's names. `meta` has the rest.

    `n_context` is what the caller asked for, `n_context_train` what the file was made for.
    """

    meta: Meta
    n_context: int
    n_context_train: int
    n_layers: int
    n_embd: int
    n_heads: tuple[int, ...]
    n_kv_heads: tuple[int, ...]
    head_dim_k: int
    head_dim_v: int
    eps: float
    rope_dims: int
    rope_base: float


class Architecture(Protocol):
    ARCHITECTURES: tuple[str, ...]

    def record(self, ops: Ops, w: Weights, cfg: ModelConfig) -> Tensor:
        """Record the whole model, in pass order, and return the logits."""


def read_config(meta: Meta, n_context: int) -> ModelConfig:
    """Read the common numbers. Raises `UnsupportedModel` or `ModelFileError` if one is missing or absurd."""
    if n_experts := meta.int("expert_count", default=0):
        raise UnsupportedModel(f"a mixture of {n_experts} experts is not supported; try a dense model of this family")
    n_layers = meta.int("block_count", least=1, most=MAX_LAYERS)
    n_embd = meta.int("embedding_length", least=1, most=MAX_EMBD)
    n_heads = meta.ints("attention.head_count", n_layers, least=1, most=MAX_HEADS)
    n_kv_heads = n_heads
    if meta.has("attention.head_count_kv"):
        n_kv_heads = meta.ints("attention.head_count_kv", n_layers, least=1, most=MAX_HEADS)
    for heads, kv_heads in zip(n_heads, n_kv_heads, strict=True):
        if heads % kv_heads:
            raise UnsupportedModel(f"{heads} attention heads cannot share {kv_heads} key-value heads evenly")
    head_dim = n_embd // n_heads[0]
    head_dim_k = meta.int("attention.key_length", default=head_dim, least=1, most=MAX_EMBD)
    return ModelConfig(
        meta=meta,
        n_context=n_context,
        n_context_train=meta.int("context_length", least=1),
        n_layers=n_layers,
        n_embd=n_embd,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim_k=head_dim_k,
        head_dim_v=meta.int("attention.value_length", default=head_dim, least=1, most=MAX_EMBD),
        eps=meta.float(_epsilon_key(meta), least=0.0, most=1.0),
        rope_dims=meta.int("rope.dimension_count", default=head_dim_k, least=2, most=MAX_EMBD),
        rope_base=meta.float("rope.freq_base", default=10000.0, least=1.0),
    )


def _epsilon_key(meta: Meta) -> str:
    """Return the key of the norms' epsilon: layer norms have another one than RMS norms."""
    keys = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    return keys[1] if meta.has(keys[1]) and not meta.has(keys[0]) else keys[0]


def rope_spec(
    cfg: ModelConfig, n_heads: int, *, neox: bool, base: float | None = None, scaled: bool = True
) -> RopeSpec:
    """Return the rotary embedding that the file asks for: plain, linear, or YaRN.

    `neox` is the order of rotated pairs in GGUF files of the architecture: in two halves of a head, or side by side.
    Folders have halves always, and say so with `rope.neox`, which GGUF does not know.
    `scaled=False` leaves out the division of positions (Gemma 3's sliding layers). The magnitude of YaRN,
    `1 + 0.1 ln(factor)`, is the kernel's; `attn_factor` is what the file multiplies it with. The ramp's ends are
    those of the paper (32 and 1), whatever the file says, as in llama.cpp for all architectures here.
    """
    kind, factor = _scaling(cfg.meta)
    return RopeSpec(
        n_heads=n_heads,
        n_dims=cfg.rope_dims,
        neox=neox or cfg.meta.bool("rope.neox", default=False),
        base=cfg.rope_base if base is None else base,
        freq_scale=1.0 / factor if scaled else 1.0,
        ext_factor=1.0 if kind == "yarn" else 0.0,
        attn_factor=cfg.meta.float("rope.scaling.attn_factor", default=1.0),
        n_ctx_orig=_original_context(cfg),
    )


def rope_factors(w: Weights, cfg: ModelConfig) -> Weight | None:
    """Return the divisors of the frequencies, if the file has any: Llama 3's one set, or one of longrope's two.

    Longrope (arXiv:2402.13753) has a set for contexts up to the original one and a set for longer ones; the context
    asked for decides for all positions, because keys in the cache cannot be rotated again.
    """
    kind, _ = _scaling(cfg.meta)
    if kind != "longrope" and (factors := w.get("rope_freqs")):
        return factors
    return w.get("rope_factors_long" if cfg.n_context > _original_context(cfg) else "rope_factors_short")


def sliding_windows(cfg: ModelConfig, period: int, default: int = 0) -> tuple[int, ...]:
    """Return the window of every layer in tokens, 0 for a layer that sees everything.

    Unless the file says otherwise, every `period`-th layer sees everything. `default` is the window of files that do
    not state one; 0 means that all layers of such a file see everything.
    """
    window = cfg.meta.int("attention.sliding_window", default=default)
    key = "attention.sliding_window_pattern"
    value = cfg.meta.metadata.get(f"{cfg.meta.architecture}.{key}", period)
    if isinstance(value, int):
        period = cfg.meta.int(key, default=period)
        sliding = [period == 0 or layer % period < period - 1 for layer in range(cfg.n_layers)]
    else:
        read = cfg.meta.bools if value.dtype.kind == "b" else cfg.meta.ints
        sliding = [bool(flag) for flag in read(key, cfg.n_layers)]
    return tuple(window if flag else 0 for flag in sliding)


def _scaling(meta: Meta) -> tuple[str, float]:
    """Return the kind of rope scaling and the factor that positions are divided by; linear is the default."""
    kind = meta.str("rope.scaling.type", default="linear")
    if kind not in _SCALINGS:
        raise UnsupportedModel(f"rope scaling {kind!r} is not supported (supported: {', '.join(_SCALINGS)})")
    key = "rope.scaling.factor" if meta.has("rope.scaling.factor") else "rope.scale_linear"
    factor = meta.float(key, default=0.0, least=0.0) or 1.0
    if kind == "yarn" and factor < 1:
        raise UnsupportedModel(f"YaRN with a factor of {factor:g} would shorten the context; it must be 1 or more")
    return kind, factor if kind != "none" else 1.0


def _original_context(cfg: ModelConfig) -> int:
    return cfg.meta.int("rope.scaling.original_context_length", default=0) or cfg.n_context_train


def record(architecture: Architecture, model: ModelFile, n_context: int) -> Trace:
    """Record the model of a file.

    Raises `UnsupportedModel` if tensors are missing, shapes do not fit, or the file holds tensors that the
    architecture does not compute with: without them the answers would be wrong.
    """
    cfg = read_config(Meta.of(model), n_context)
    ops = Ops()
    logits = architecture.record(ops, Weights(model.tensors), cfg)
    if logits.per != "output":
        raise UnsupportedModel(f"architecture {model.architecture!r} does not select the rows of its logits")
    trace = ops.trace(logits)
    _check_all_used(model.tensors, trace)
    return trace


def _check_all_used(names: Collection[str], trace: Trace) -> None:
    unused = sorted(set(names) - {weight.tensor for weight in trace.weights()} - _OPTIONAL)
    if unused:
        shown = ", ".join(unused[:3]) + (" ..." if len(unused) > 3 else "")
        raise UnsupportedModel(
            f"the file has {len(unused)} tensors that this edgelm would not use ({shown}); use a newer edgelm"
        )
