"""Every backend considered for one model and one budget: what the user is shown, and what a child process finds out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm.engine.choosing import Asked, Candidate, consider
from edgelm.engine.loading import open_path
from edgelm.engine.weighed import UNKNOWN
from edgelm.engine.wishes import Wishes
from edgelm.errors import BackendUnavailable, BudgetTooSmall, EdgeLMError, UnsupportedModel
from edgelm.files.index import is_genai_folder
from edgelm.opening import get_ready
from edgelm.resources import budget_of, device_of, threads_of


def candidates(
    path: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    threads: int | None = None,
    context: int | None = None,
    simulate: str | None = None,
    spill: bool = True,
    recheck: bool = False,
) -> tuple[Candidate, ...]:
    """Return every registered backend with what it would do with this model, the one that `load` takes first.

    Each is measured in a child process, or recalled; `recheck` tries and measures them all again. Raises what `load`
    raises about the file and the options.
    """
    if is_genai_folder(path):
        from edgelm.opening_graph import graph_candidates

        return graph_candidates(Path(path), Wishes(memory, threads=threads, context=context, simulate=simulate))
    device = device_of(simulate, threads)
    budget_bytes, _ = budget_of(memory, device)
    wishes = Wishes(memory, threads=threads, context=context, simulate=simulate, spill=spill)
    asked = Asked(os.fspath(path), budget_bytes, threads_of(threads, device), wishes)
    return consider(open_path(path), asked, fresh=recheck)


def weigh(path: str, host_bytes: int, wishes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a backend would do in another process, which takes `host_bytes`: fields of `Weighed`."""
    try:
        ready = get_ready(path, Wishes(**wishes), host_bytes=host_bytes)
    except BudgetTooSmall as exc:
        return {"needed_bytes": exc.needed_bytes - host_bytes}
    except (BackendUnavailable, UnsupportedModel) as exc:
        return {"why_not": getattr(exc, "reason", str(exc))}
    except EdgeLMError:
        return UNKNOWN._asdict()  # not the backend's fault: whoever loads the model will hear of it
    ready.close()
    plan, file = ready.prepared.plan, ready.prepared.file
    packed = file.paths != ready.file.paths
    return {
        "decode_tps": plan.predicted_decode_tps,
        "planned_bytes": plan.planned_bytes - host_bytes,
        "streamed_bytes": plan.streamed_bytes + plan.demand.spilled_bytes,
        "prepared_bytes": file.file_bytes[0] if packed else 0,
        "prepared_path": str(file.paths[0]) if packed else "",
        "loss": "; ".join(ready.lost),
        "steady": plan.rates is None or plan.rates.steady,
    }
