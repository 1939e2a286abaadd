"""Everything between a model's name and its first answer on a board: flash, budget, backend, pack, measurement.

Each step is a command of edgelm in a process of its own, so that what it loads is not in memory when the demo starts.
What is found is kept, step by step, in the cache folder: who breaks off goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgelm_apps.pi.asking import AMPLE, Failed, edgelm_json, options

if TYPE_CHECKING:
    from edgelm_apps.pi.target import Target

PROMPT = "Explain in a few sentences what a Raspberry Pi is, and what people do with it."
MEASURED_TOKENS = 16
SPARE_BYTES = 20 * 10**6
"""What the budget has beyond what everything takes, if the board can spare it: for the screen of the demo."""
WORSE = 0.98
"""Share of the speed of the file that a pack must keep: plans of two processes differ by so much."""
ROOM = 1.1
"""Times its size that a pack needs of free flash."""

Say = Callable[[str], None]


class Kept:
    """The results of finished steps, in a file of the cache folder that belongs to one model, board and wish."""

    def __init__(self, path: Path, say: Say) -> None:
        self._path, self._say = path, say
        try:
            self._steps: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._steps = {}

    def step(self, name: str, work: Callable[[], dict[str, Any]], doing: str = "") -> dict[str, Any]:
        """Return the result of a step: from the file, or from doing it now. `said` in it is told to the user.

        `doing` is told before, of a step that takes its time.
        """
        known = name in self._steps
        if not known:
            if doing:
                self._say(f"{name}: {doing} ...")
            self._steps[name] = work()
            self._write()
        found: dict[str, Any] = self._steps[name]
        self._say(f"{name}: {found['said']}" + (" (done before)" if known else ""))
        return found

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps(self._steps, indent=1), encoding="utf-8")
        beside.replace(self._path)


class Prepared(NamedTuple):
    """A model that is ready: the file to load, with which options, and what was found out."""

    path: Path
    engine: dict[str, Any]
    facts: dict[str, Any]


def prepare(path: Path, target: Target, asked: Mapping[str, Any], say: Say, again: bool = False) -> Prepared:
    """Do what is still to be done for `path` on `target`; `asked`: options of `edgelm.load` that the user gave.

    Raises `Failed` with the words of the step that failed, such as those of a budget that is too small.
    """
    engine = dict(asked)
    if target.device is not None:
        engine["simulate"] = target.device.name
    kept_in = pi_folder() / f"{path.stem}-{_key(path, target, engine)}.json"
    if again:
        kept_in.unlink(missing_ok=True)
    for line in target.lines():
        say(line)
    kept = Kept(kept_in, say)
    measuring = "" if target.device else "measuring it, and trying what can compute here"
    flash = kept.step("flash", lambda: _flash(target), measuring)
    budget = kept.step("budget", lambda: _budget(path, target, engine))
    engine["memory"] = budget["bytes"]
    backend = kept.step("backend", lambda: _backend(path, engine), "measuring each on this model")
    engine["backend"] = backend["name"]
    packed = kept.step("pack", lambda: _pack(path, engine), "comparing plans")
    used = Path(packed["path"] or path)
    if not used.exists():  # a pack that somebody removed meanwhile
        return prepare(path, target, asked, say, again=True)
    measured = kept.step("measured", lambda: _measure(used, engine), "letting it answer once")
    steps = {"flash": flash, "budget": budget, "backend": backend, "pack": packed, "measured": measured}
    facts = {**target.facts(), "model": str(path), "loads": str(used), **steps}
    return Prepared(used, engine, facts)


def pi_folder() -> Path:
    """Return where the demo keeps what it found, and its packs."""
    from edgelm_models.cache import cache_dir

    return cache_dir() / "pi"


def _key(path: Path, target: Target, engine: Mapping[str, Any]) -> str:
    """Return what tells one preparation from another: the file, the board, the wishes, the version."""
    from hashlib import blake2b

    import edgelm

    facts = path.stat()
    board = target.board.model if target.board else None  # what is free differs between starts
    said = (str(path.resolve()), facts.st_size, facts.st_mtime_ns, board, target.drive, sorted(engine.items()))
    return blake2b(repr((said, edgelm.__version__)).encode(), digest_size=6).hexdigest()


def _flash(target: Target) -> dict[str, Any]:
    """Find out how fast weights can be read; that also tries every backend, which the first start would do."""
    from edgelm.sizes import human

    if target.device is not None:
        speed = target.device.flash_bytes_per_s
        return {"bytes_per_s": speed, "simulated": True, "said": f"{human(speed)}/s, simulated"}
    found = edgelm_json("doctor")["flash"]
    if "problem" in found:
        return {"bytes_per_s": None, "simulated": False, "said": f"not measured, {found['problem']}"}
    speed = found["read_bytes_per_s"]
    return {"bytes_per_s": speed, "simulated": False, "said": f"{human(speed)}/s measured, {found['how']}"}


def _budget(path: Path, target: Target, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the budget: what everything takes, or what the board can spare if that is less."""
    from edgelm.sizes import human, parse_size

    if "memory" in engine:
        given = parse_size(engine["memory"])
        return {"bytes": given, "said": f"{human(given)}, as asked for"}
    plan = edgelm_json("plan", path, "--memory", AMPLE, *options(engine))
    whole, spared = plan["predicted_peak_bytes"] + SPARE_BYTES, target.spare_bytes
    spare = f"{human(spared)} can be spared" + (", simulated" if target.device else "")
    if whole <= spared:
        return {"bytes": whole, "said": f"{human(whole)}: room for everything ({spare})"}
    return {"bytes": spared, "said": f"{human(spared)}: everything would take {human(whole)} ({spare})"}


def _backend(path: Path, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what computes, each candidate measured in a process of its own."""
    if "backend" in engine:
        return {"name": engine["backend"], "said": f"{engine['backend']}, as asked for"}
    found = edgelm_json("backends", path, *options(engine))["candidates"]
    chosen = next((one for one in found if one["chosen"]), None)
    if chosen is None:
        edgelm_json("plan", path, *options(engine))  # fails, and says why
        raise Failed("no backend computes this model here; see `edgelm backends`", 5)
    slow = "; ggml's kernels are far faster: pip install 'edgelm[ggml]'" if chosen["name"] == "numpy" else ""
    return {"name": chosen["name"], "said": f"{chosen['name']}, {chosen['reason']}{slow}"}


def _pack(path: Path, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the model out for streaming if the plan of the pack is no worse than that of the file."""
    from edgelm.sizes import human

    before = edgelm_json("plan", path, *options(engine))
    if reason := _no_pack(path, before["streamed_bytes_per_pass"]):
        return {"path": None, "said": f"not made, {reason}"}
    output = pi_folder() / f"{path.stem}.edgelm.gguf"
    output.parent.mkdir(parents=True, exist_ok=True)
    edgelm_json("pack", path, output, "--force")
    after = edgelm_json("plan", output, *options(engine))
    old, new = before["predicted_decode_tps"], after["predicted_decode_tps"]
    speeds = f"{old:.3g} tok/s predicted with the file, {new:.3g} with the pack"
    if new < WORSE * old:
        output.unlink()
        return {"path": None, "said": f"not kept, {speeds}"}
    streamed = f"{human(after['streamed_bytes_per_pass'])} are read from flash for each token"
    return {"path": str(output), "said": f"made, since {streamed}: in its order, and checked on the way; {speeds}"}


def _no_pack(path: Path, streamed_bytes: int) -> str | None:
    """Return why a pack would not pay; None if it might."""
    import edgelm
    from edgelm.sizes import human

    if not streamed_bytes:
        return "everything stays in memory, so that weights are read once, at the start"
    if path.is_dir() or any(key.startswith("edgelm.pack.") for key in edgelm.inspect(path).metadata):
        return "this is a folder, or a pack already"
    needed, free = int(path.stat().st_size * ROOM), shutil.disk_usage(path.parent).free
    if free < needed:
        return f"it needs {human(needed)} of flash and {human(free)} are free"
    return None


def _measure(path: Path, engine: Mapping[str, Any]) -> dict[str, Any]:
    """Let it answer once, in a process whose peak is the model's alone."""
    from edgelm.sizes import human

    asked = ["--raw", "--ignore-eos", "--quiet", "--max-tokens", MEASURED_TOKENS]
    answer = edgelm_json("run", path, PROMPT, *asked, *options(engine))
    stats, simulated = answer["stats"], engine.get("simulate")
    read_s = stats["read_s"]
    flash = stats["bytes_streamed"] / read_s if read_s and stats["bytes_streamed"] else None
    said = f"{stats['decode_tps']:.3g} tok/s (predicted {stats['predicted_decode_tps']:.3g}), first token after "
    said += f"{stats['ttft_s']:.2f} s, peak {human(stats['peak_bytes'])} of {human(engine['memory'])}"
    said += f", flash gave {human(flash)}/s" if flash else ", nothing read from flash"
    kept = {name: stats[name] for name in ("decode_tps", "predicted_decode_tps", "ttft_s", "peak_bytes")}
    said += f"; simulated {simulated}" if simulated else ""
    return {**kept, "flash_bytes_per_s": flash, "simulated": simulated, "said": said}
