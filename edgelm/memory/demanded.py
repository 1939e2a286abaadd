"""What lives in memory beside the matrices of a model, as a value."""

from __future__ import annotations

from typing import NamedTuple

from edgelm.memory.spill_shape import SpillShape


class Demand(NamedTuple):
    """Everything but matrices that lives in memory, in bytes. `scratch` etc. belong to passes of `chunk` tokens."""

    process_bytes: int
    constants_bytes: int
    kv_bytes: int
    chunk: int
    scratch_bytes: int
    state_bytes: int
    reserve_bytes: int
    beside_bytes: int = 0
    """What another backend takes, which computes the prompts."""
    kv: str = "f16"
    """Types of keys and values."""
    draft_bytes: int = 0
    """What a draft model takes, all of it."""
    n_rows: int = 1
    """Rows of logits that one pass can return: drafts are verified in passes of so many tokens."""
    spill: SpillShape | None = None
    """What of the cache may go to flash; `kv_bytes` is what stays in memory."""
    spill_bytes: int = 0
    """Memory through which that is read, and in which attention over it is computed."""
    attention: str = "exact"
    """How attention is made cheaper, if it is: the answer is then an approximation."""
    n_kept: int = 0
    """Tokens that an approximate attention keeps of a longer prompt."""
    places: int = 0
    """Tokens that the cache then holds, the answer among them; 0: the whole context."""

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the cache that lie on flash when the context is full; each token then reads them."""
        return self.spill.file_bytes if self.spill and self.attention == "exact" else 0

    @property
    def total_bytes(self) -> int:
        return sum(n_bytes for _, n_bytes in self.items())

    def items(self) -> tuple[tuple[str, int], ...]:
        kinds = [self.kv] * (self.kv != "f16") + [f"approximate ({self.attention})"] * (self.attention != "exact")
        items = (
            ("interpreter, libraries and tokenizer", self.process_bytes),
            ("norms and biases", self.constants_bytes),
            (", ".join(("KV cache", *kinds)), self.kv_bytes),
            ("scratch of the backend", self.scratch_bytes),
            ("activations, masks and logits", self.state_bytes),
            ("reserve", self.reserve_bytes),
        )
        more = (
            ("attention over KV on flash", self.spill_bytes),
            ("draft model", self.draft_bytes),
            ("prompts on another backend", self.beside_bytes),
        )
        return (*items, *(item for item in more if item[1]))
