"""What candidates would do with a model, as it was measured, and kept on disk until it would be wrong.

Numbers of bytes are beside what the process takes before it loads anything: `spare` is what a budget leaves of it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from edgelm.cachedir import cache_dir, read_json, write_json
from edgelm.engine.machine import digest, machine_key, release
from edgelm.sizes import MB

KEPT_S = 7 * 86_400.0
"""How long the best is believed to be the best: a ranking ages more slowly than the speeds it was made from."""
DOUBT_S = 3600.0
"""How long, if the machine was too busy for repeats to agree, or full."""
LESS_BYTES, MORE = 1 * MB, 1.1
"""How much less and how much more room than when it was measured a streaming candidate may have."""
_N_KEPT = 8


class Weighed(NamedTuple):
    """What a plan for one backend says. `needed_bytes`: more than there was; the rest is nothing then.

    `prepared_bytes`, `prepared_path`: the file of the weights in the backend's own layout, made or yet to be made.
    `why_not` is set if there is no plan. `steady`: another measurement would say the same.
    """

    decode_tps: float = 0.0
    planned_bytes: int = 0
    streamed_bytes: int = 0
    needed_bytes: int = 0
    prepared_bytes: int = 0
    prepared_path: str = ""
    loss: str = ""
    why_not: str = ""
    broken: bool = False
    steady: bool = True

    @property
    def prepare_bytes(self) -> int:
        """Bytes that have to be written before the first start."""
        return 0 if not self.prepared_bytes or os.path.exists(self.prepared_path) else self.prepared_bytes

    def holds(self, measured_at: int, spare: int) -> bool:
        """Say whether what was found with `measured_at` bytes to spare holds with `spare` bytes."""
        if self.why_not:
            return True
        if self.needed_bytes:
            return spare < self.needed_bytes
        if not self.streamed_bytes:
            return spare >= self.planned_bytes
        return measured_at - LESS_BYTES <= spare <= MORE * measured_at


UNKNOWN = Weighed(steady=False)
"""Nothing could be found out."""


def recall(facts: tuple[object, ...], name: str, identity: str, spare: int) -> Weighed | None:
    """Return what was kept for this model and way of loading (`facts`), this library, and this much room."""
    for kept in reversed(_kept(_place(facts), name)):
        try:
            found = Weighed(**kept["weighed"])
            fresh = kept["identity"] == digest(identity) and 0 <= kept["until"] - time.time() <= KEPT_S
            if fresh and found.holds(kept["spare"], spare):
                return found
        except (AttributeError, KeyError, TypeError):
            continue  # of another edgelm
    return None


def keep(facts: tuple[object, ...], name: str, identity: str, spare: int, found: Weighed) -> None:
    """Remember, if there is anything; of one backend, only what was measured last and with the same library."""
    if found == UNKNOWN:
        return
    place = _place(facts)
    until = time.time() + (KEPT_S if found.steady else DOUBT_S)
    entry = {"identity": digest(identity), "spare": spare, "until": until, "weighed": found._asdict()}
    same = [kept for kept in _kept(place, name) if kept.get("identity") == entry["identity"]]
    write_json(place, {**(read_json(place) or {}), name: [*same, entry][-_N_KEPT:]})


def forget(facts: tuple[object, ...]) -> None:
    """Let everything that was kept for this model and way of loading be measured anew."""
    with suppress(OSError):
        _place(facts).unlink()


def _place(facts: tuple[object, ...]) -> Path:
    return cache_dir() / "choices" / f"{digest(release(__file__), machine_key(), *facts)}.json"


def _kept(place: Path, name: str) -> list[dict[str, Any]]:
    found = (read_json(place) or {}).get(name)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
