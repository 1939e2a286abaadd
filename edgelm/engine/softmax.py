"""Attention over a part of the positions, and how parts become the whole.

Softmax over all positions is the sum of its parts once each is brought to the same largest score (online softmax,
arXiv:1805.02867). The merge is associative, so the parts may come in any order from any place (LeanAttention,
arXiv:2405.10480): that makes attention over blocks from flash exact. Knows arrays only.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from edgelm.files.blocks import Floats

LOWEST = np.float32(np.finfo(np.float32).min)
"""The largest score where there is none: finite, so that differences of two are no NaN."""


class Part(NamedTuple):
    """Attention of rows over some positions, not yet divided by its sum.

    `top` [..., rows]: the largest score. `total` [..., rows]: the sum of exp(score - top). `mixed` [..., rows, dim]:
    the values, each weighted so.
    """

    top: Floats
    total: Floats
    mixed: Floats


def clear(part: Part) -> None:
    """Let `part` be attention over no position at all."""
    part.top.fill(LOWEST)
    part.total.fill(0)
    part.mixed.fill(0)


def weigh(scores: Floats, values: Floats, out: Part) -> None:
    """Fill `out` with the attention over some positions; a score of -inf hides one.

    `scores` [..., rows, places] are overwritten, `values` are [..., places, dim].
    """
    np.maximum(scores.max(axis=-1), LOWEST, out=out.top)
    np.subtract(scores, out.top[..., None], out=scores)
    np.exp(scores, out=scores)
    scores.sum(axis=-1, out=out.total)
    np.matmul(scores, values, out=out.mixed)


def merge(into: Part, part: Part) -> None:
    """Add the positions of `part` to those of `into`. Overwrites both."""
    top = np.maximum(into.top, part.top)
    before, added = np.exp(into.top - top), np.exp(part.top - top)
    into.top[...] = top
    np.multiply(into.total, before, out=into.total)
    np.multiply(part.total, added, out=part.total)
    np.add(into.total, part.total, out=into.total)
    np.multiply(into.mixed, before[..., None], out=into.mixed)
    np.multiply(part.mixed, added[..., None], out=part.mixed)
    np.add(into.mixed, part.mixed, out=into.mixed)


def join(parts: Part) -> Part:
    """Return the whole of parts that lie along a first axis. Overwrites them."""
    top = parts.top.max(axis=0)
    share = np.exp(parts.top - top)
    np.multiply(parts.mixed, share[..., None], out=parts.mixed)
    return Part(top, (parts.total * share).sum(axis=0), parts.mixed.sum(axis=0))


def capped(scores: Floats, softcap: float) -> None:
    """Cap scores, if there is a cap: `cap * tanh(score / cap)`."""
    if softcap:
        cap = np.float32(softcap)
        np.divide(scores, cap, out=scores)
        np.tanh(scores, out=scores)
        np.multiply(scores, cap, out=scores)
