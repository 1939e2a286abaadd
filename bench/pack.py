"""A packed model beside the GGUF file it was made of: start-up, streaming, and what verification costs.

Start-up is the whole process to its first token, files in the page cache, against its unavoidable parts: a process that
only imports what is needed and loads the backend's library, the reads of the weights, the first pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common

import edgelm
from edgelm.files.index import open_indexed
from edgelm.memory.buffer import Buffer
from edgelm.memory.stores import MemoryStore, Store, open_store, span
from edgelm.memory.verified import VerifiedStore

PROMPT = "The quick brown fox jumps over the lazy"
IMPORTS = """
import edgelm.opening, edgelm.model
from edgelm.engine.registry import get_backend
get_backend({backend!r}).open({threads})
print(flush=True)
"""
START = """
import json, sys, time
import edgelm, edgelm.opening, edgelm.model
from edgelm.engine.forward import Engine
spent = {{}}
def timed(home, name):
    plain = getattr(home, name)
    def call(*args, **more):
        began = time.perf_counter()
        try:
            return plain(*args, **more)
        finally:
            spent.setdefault(name, time.perf_counter() - began)
    setattr(home, name, call)
timed(Engine, "load")
timed(Engine, "forward")
with edgelm.load({model!r}, threads={threads}, context=1024, backend={backend!r}) as model:
    next(model.stream({prompt!r}, max_tokens=1))
    print(flush=True)
    print(json.dumps(spent))
"""
BUDGETS = {"smollm2-135m-instruct": 110, "gemma-3-270m": 150}
REQUEST_BYTES = 1 << 20


def main() -> None:
    parser = common.arguments(__doc__, rounds=9)
    parser.add_argument("--backend", default="llamacpp")
    args = parser.parse_args()
    report = common.Report("pack", {"threads": args.threads, "backend": args.backend, "rounds": args.rounds})
    for name in args.models:
        model = common.find_model(name)
        packed = common.scratch_folder() / f"{name}.edgelm.gguf"
        edgelm.pack(model, packed, force=True)
        start_up(report, name, {"GGUF": model, "pack": packed}, args)
        streaming(report, name, {"GGUF": model, "pack": packed}, args)
        verification(report, name, packed, args.rounds)
        packed.unlink()
    report.finish()


def start_up(report: common.Report, name: str, files: dict[str, Path], args: Any) -> None:
    for path in files.values():
        path.read_bytes()  # into the page cache
    places = {"threads": args.threads, "backend": args.backend, "prompt": PROMPT}
    scripts = {who: START.format(model=str(path), **places) for who, path in files.items()}
    scripts["imports"] = IMPORTS.format(**places)
    for script in scripts.values():
        first_line(script)  # compiled modules, verdict on the backend, tables and index of the GGUF file
    times: dict[str, list[float]] = {who: [] for who in scripts}
    spent: dict[str, list[dict[str, float]]] = {who: [] for who in files}
    for _ in range(args.rounds):
        for who, script in scripts.items():
            seconds, rest = first_line(script)
            times[who].append(seconds)
            if who in spent:
                spent[who].append(json.loads(rest))
    for who in files:
        parts = {
            "imports": times["imports"],
            "reads": [each["load"] for each in spent[who]],
            "first pass": [each["forward"] for each in spent[who]],
        }
        report.add(
            "Process start to first token, seconds",
            model=name,
            file=who,
            **{"first token": common.middle(times[who])},
            **{part: common.middle(values) for part, values in parts.items()},
            ratio=common.middle(times[who]) / sum(map(common.middle, parts.values())),
            **{"ratio of the lowest": min(times[who]) / sum(map(min, parts.values()))},
            every=times[who],
        )


def first_line(script: str) -> tuple[float, str]:
    """Return the seconds until a child says its first line, and what it says then."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        child.stdout.readline()
        seconds = time.perf_counter() - began
        rest = child.stdout.read().decode()
    if child.returncode != 0:
        raise RuntimeError(f"exit code {child.returncode}: {script}")
    return seconds, rest


def streaming(report: common.Report, name: str, files: dict[str, Path], args: Any) -> None:
    if name not in BUDGETS:
        return
    budget = BUDGETS[name] * common.MB
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in files}
    for _ in range(max(args.rounds // 3, 1)):
        for who, path in files.items():
            argv = common.edgelm_run(
                path, PROMPT, max_tokens=24, threads=args.threads, context=1024, memory_bytes=budget,
                backend=args.backend,
            )  # fmt: skip
            found[who].append(common.run(argv).json()["stats"])
    for who, stats in found.items():
        report.add(
            "Decoding while weights stream",
            model=name,
            file=who,
            budget_mb=BUDGETS[name],
            **{
                "tok/s": common.middle(each["decode_tps"] for each in stats),
                "MB streamed": common.mb(common.middle(each["bytes_streamed"] for each in stats)),
            },
            every=[each["decode_tps"] for each in stats],
        )


def verification(report: common.Report, name: str, packed: Path, rounds: int) -> None:
    """Read all weights in requests of whole tiles, directly and from memory, with and without verification."""
    file = open_indexed(packed)
    direct, how = open_store([str(packed)])
    memory = MemoryStore([packed.read_bytes()])
    requests = list(_requests(file))
    n_bytes = sum(size for _, size in requests)
    ways: dict[str, Store] = {
        "flash, plain": direct,
        "flash, verified": VerifiedStore(direct, file),
        "memory, plain": memory,
        "memory, verified": VerifiedStore(memory, file),
    }
    with Buffer(max(span(offset, size) for offset, size in requests), huge=True) as buffer:
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, store in ways.items():
                began = time.process_time()
                for offset, size in requests:
                    store.read_into(0, offset, size, buffer.view, 0)
                cpu[way].append(time.process_time() - began)
        for way, values in cpu.items():
            report.add(
                "Processor seconds for a gigabyte of weights",
                model=name, way=way, how=how if way.startswith("flash") else "a copy in memory",
                **{"CPU s/GB": common.middle(values) / n_bytes * 1e9},
            )  # fmt: skip
    direct.close()
    _hashes(report, name, packed.read_bytes()[: 64 << 20], rounds)


def _requests(file: Any) -> Iterator[tuple[int, int]]:
    for info in file.tensors.values():
        tile = info.row_step * info.row_bytes
        step = max(REQUEST_BYTES // tile, 1) * tile
        for start in range(0, info.n_bytes, step):
            yield info.offset + start, min(step, info.n_bytes - start)


def _hashes(report: common.Report, name: str, content: bytes, rounds: int) -> None:
    import xxhash

    from edgelm.hashing import blake2b

    kinds: dict[str, Callable[[memoryview], object]] = {
        "XXH3, 64 bits (xxhash)": lambda tile: xxhash.xxh3_64(tile).intdigest(),
        "XXH64 (xxhash)": xxhash.xxh64_intdigest,
        "CRC-32 (zlib)": zlib.crc32,
        "Adler-32 (zlib)": zlib.adler32,
        "BLAKE2b": lambda tile: blake2b(tile, digest_size=8).digest(),
    }
    view, tile = memoryview(content), 160 << 10
    for kind, digest in kinds.items():
        best = float("inf")
        for _ in range(max(rounds // 2, 1)):
            began = time.process_time()
            for at in range(0, len(view), tile):
                digest(view[at : at + tile])
            best = min(best, time.process_time() - began)
        report.add("Hashing tiles of 160 KiB, best", model=name, hash=kind, **{"GB/s": len(view) / best / 1e9})


if __name__ == "__main__":
    main()
