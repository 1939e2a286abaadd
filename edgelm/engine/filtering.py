"""Which tokens of a long prompt are kept where attention is `filtered`, and what that takes. Computes no pass.

GemFilter (arXiv:2409.17422): an early layer already attends to what matters for the next token. The blocks up to it
read the whole prompt; the tokens that its end attends to most are then the prompt of the whole model. This is
approximate: what is not kept is never seen by the later layers. Not the last position alone is asked but the last ones
(SnapKV, arXiv:2404.14469): behind a chat template the last one has not yet begun to look for an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.ir import AttendSpec
from edgelm.engine.softmax import capped
from edgelm.errors import UnsupportedModel
from edgelm.memory.arena import LayerCache, cache_bytes
from edgelm.memory.cache_layout import CacheLayout

if TYPE_CHECKING:
    from edgelm.engine.demand import Model

DEPTH = 0.57
"""How deep the ranking layer may lie, as a share of all. At 0.4 SmolLM2-135M ranks a fact that is asked for hardly
better than the rest; at 0.57 it is in the first 4 % of 1,200 tokens, in Gemma-3-270M in the first full one (0.28)."""
ANSWER_TOKENS = 256
"""Room of an answer beside the kept tokens."""
FIRST, LAST = 4, 32
"""Tokens that are kept whatever their rank: those that every head leans on (arXiv:2309.17453), and the end of the
prompt, where it says what is wanted. The last ones rank the others."""
NEIGHBOURS = 13
"""Places that share the rank of the best of them: a word is kept with what is around it. With 5 numbers of four digits
lose some of them; with 13 an eighth of a prompt's keys and values still holds them."""
KEY_BYTES = 4


class Filtering(NamedTuple):
    """`layer` ranks the tokens of a prompt, of which up to `n_kept` are kept, in a cache of `places`.

    `looking` is what the pass before keeps: the layers before `layer`, for a whole context.
    """

    layer: int
    spec: AttendSpec
    inputs: tuple[int, ...]
    """The values of the trace that are its queries and keys."""
    looking: tuple[LayerCache, ...]
    n_kept: int
    places: int

    def kv_bytes(self, layers: Sequence[LayerCache], context: int, chunk: int, cache: CacheLayout) -> int:
        """Return the memory of the larger of two caches that never hold anything at the same time."""
        keys_bytes = context * self.spec.n_kv_heads * self.spec.head_dim_k * KEY_BYTES
        looking = cache_bytes(self.looking, context, chunk, cache) + keys_bytes + context * ranking_bytes(self.spec)
        return max(looking, cache_bytes(layers, self.places, chunk, cache))


def ranking_bytes(spec: AttendSpec) -> int:
    """Return the memory for each place that is ranked: scores of one position, copies for a moment, and sums."""
    return (3 * spec.n_heads + 8) * 4


def kept_tokens(context: int, kept: float) -> int:
    """Return how many tokens the share `kept` of a context is: never fewer than are kept whatever their rank."""
    return min(max(round(kept * context), FIRST + LAST), context)


def filtering_of(model: Model, context: int, kept: float) -> Filtering:
    """Return how prompts of up to `context` tokens are filtered: down to the share `kept` of it.

    Raises `UnsupportedModel` for a model that embeds texts, or if no layer behind the first sees the whole prompt.
    """
    if model.encodes:
        raise UnsupportedModel("a model that embeds texts reads all of them; leave out the approximate attention")
    attends = [(op.params, op.inputs) for op in model.trace.ops if isinstance(op.params, AttendSpec)]
    seeing = [(spec, inputs) for spec, inputs in attends if not spec.window and spec.layer]
    if not seeing:
        raise UnsupportedModel(
            "no later layer of this model sees a whole prompt, so none can filter it; leave out the approximate "
            "attention"
        )
    deepest = max(sum(spec.layer <= DEPTH * len(attends) for spec, _ in seeing), 1)
    spec, (query, key, _) = seeing[deepest - 1]
    looking = tuple(one if i < spec.layer else one._replace(n_kv_heads=0) for i, one in enumerate(model.layers))
    n_kept = kept_tokens(context, kept)
    return Filtering(spec.layer, spec, (query, key), looking, n_kept, min(n_kept + ANSWER_TOKENS, context))


def ranked(queries: NDArray[np.float32], keys: NDArray[np.float32], spec: AttendSpec) -> NDArray[np.float32]:
    """Return how much the last positions attend to each, summed over them and over heads: float32 [n].

    `queries` [m, n_heads, dim] are those of the last m of n positions, `keys` are [n, n_kv_heads, dim].
    """
    n, n_kv, dim = keys.shape
    found = np.zeros(n, np.float32)
    for end, query in enumerate(queries, n - len(queries) + 1):
        scores = np.matmul(query.reshape(n_kv, -1, dim) * np.float32(spec.scale), keys[:end].transpose(1, 2, 0))
        capped(scores, spec.softcap)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        found[:end] += scores.reshape(-1, end).sum(axis=0)
    return found


def chosen(ranks: NDArray[np.float32], n_kept: int) -> NDArray[np.int64]:
    """Return the `n_kept` places of the highest ranks in order, always with the first and the last ones: int64.

    A place ranks as high as the best of its neighbours; of equal ranks the later one is kept.
    """
    n = len(ranks)
    if n_kept >= n:
        return np.arange(n)
    padded = np.pad(ranks, NEIGHBOURS // 2, constant_values=-np.inf)
    ranks = np.lib.stride_tricks.sliding_window_view(padded, NEIGHBOURS).max(axis=-1).copy()
    last = min(LAST, n_kept)
    ranks[n - last :] = np.inf
    ranks[: min(FIRST, n_kept - last)] = np.inf
    return np.sort(n - 1 - np.argsort(-ranks[::-1], kind="stable")[:n_kept])
