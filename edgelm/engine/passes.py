"""What may be appended to a cache, and how a prompt is cut into passes. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from edgelm.engine.running import Running
from edgelm.errors import ConfigError, ContextOverflow

BLOCK_TOKENS, NARROW_TOKENS = 512, 8
WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""How many rows a verified pass has: few widths, because each is compiled."""


def width_for(n: int, most: int) -> int:
    """Return the largest width of `WIDTHS` that is at most `n` and `most`."""
    return max(width for width in WIDTHS if width <= max(min(n, most), 1))


def first_width(n: int, done: int, chunk: int, n_outputs: int = 1) -> int:
    """Return how many tokens the next pass of a prompt of `n` takes when `done` of them are done.

    Kernels add up in another order for one row, and on some processors for three to seven, than for eight and more. So
    that a budget changes no bit, prompts are cut in blocks of 512 first, as llama.cpp cuts them, and inside a block no
    pass is narrower than eight tokens (of a chunk of at least 16). Rows whose logits are wanted share the last pass.
    """
    end = min(done // BLOCK_TOKENS * BLOCK_TOKENS + BLOCK_TOKENS, n)
    if n - end == 1:  # the last two tokens share a pass
        end = end - 1 if done < end - 1 else n
    rest = end - done
    width = min(rest, chunk)
    if chunk < rest < min(chunk + NARROW_TOKENS, 2 * chunk):
        width = -(-rest // 2)
    if 0 < n - done - width < n_outputs:
        return n - done if n - done <= chunk else n - done - n_outputs
    return width


def check_request(engine: Running, ids: Sequence[int], n_outputs: int, max_outputs: int, n_known: int) -> None:
    """Raise what `forward` raises if these ids, of a vocabulary of `n_known`, cannot be appended."""
    if not 1 <= n_outputs <= min(len(ids), max_outputs):
        raise ValueError(f"{n_outputs} rows of logits of {len(ids)} tokens; at most {max_outputs} are planned")
    if engine.n_past + len(ids) > engine.plan.places:
        raise ContextOverflow(engine.n_past + len(ids), engine.plan.places)
    if not 0 <= min(ids) <= max(ids) < n_known:
        raise ConfigError(f"token ids must be in 0…{n_known - 1}, got {min(ids)}…{max(ids)}; use its tokenizer")
