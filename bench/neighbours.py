"""Neighbours that stream weights too, against edgelm with the same or less memory, in turn, within one run.

Installs each neighbour into a virtual environment of its own and gives it the format that it reads, made from one GGUF
file: Q8_0 (for the one that knows no llama, relabelled as qwen3 without norms of q and k), or bfloat16. edgelm runs the
same weights from a GGUF. Speed is the difference of two processes that generate different numbers of tokens, divided
by the difference of their times, so that start-up and prompt do not count; peaks are the kernel's (wait4). edgelm's
budget is nine tenths of the neighbour's peak, and never more than 250 MB.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

TORCH = "torch==2.13.0"
PROMPT = "Once upon a time"
CONTEXT = 256
OUR_TOKENS = (4, 132)
BUDGET_SHARE = 0.9
"""Of the neighbour's peak, that edgelm gets, but never more than `MOST_BYTES`."""
MOST_BYTES = 250 * common.MB
MEMOPRO = (
    "import memopro, sys; print(memopro.generate(sys.argv[1], sys.argv[2], chat=False, draft=None, device='cpu', "
    "budget=sys.argv[3], max_new_tokens=int(sys.argv[4])))"
)


@dataclass(frozen=True, slots=True)
class Files:
    """One model in every format that somebody reads."""

    q8_0: Path
    relabelled: Path
    bf16: Path
    folder: Path
    packed: Path

    @classmethod
    def within(cls, folder: Path) -> Files:
        return cls(
            q8_0=folder / "Q8_0" / "model.Q8_0.gguf",
            relabelled=folder / "relabelled" / "model.Q8_0.gguf",
            bf16=folder / "BF16" / "model.BF16.gguf",
            folder=folder / "folder",
            packed=folder / "packed",
        )


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run a neighbour. `command` gives the command line for so many tokens; `same` is what edgelm runs."""

    name: str
    package: str
    version: str
    also: tuple[tuple[str, ...], ...]
    command: Callable[[Path, Files, int], Sequence[str]]
    same: Callable[[Files], Path]
    tokens: tuple[int, int] = (4, 20)


def _neurostream(*options: str) -> Callable[[Path, Files, int], Sequence[str]]:
    def command(bin_folder: Path, files: Files, n: int) -> Sequence[str]:
        run = [str(bin_folder / "neurostream"), "run", str(files.relabelled), "-p", PROMPT, "-n", str(n), "-t", "0"]
        return [*run, "--device", "cpu", *options]

    return command


def _flatrun(*options: str) -> Callable[[Path, Files, int], Sequence[str]]:
    def command(bin_folder: Path, files: Files, n: int) -> Sequence[str]:
        run = [str(bin_folder / "flatrun"), "run", "--model", str(files.q8_0.parent), "--prompt", PROMPT, "--no-sample"]
        return [*run, "--no-chat-template", "--max-new", str(n), *options]

    return command


def _nunspark(bin_folder: Path, files: Files, n: int) -> Sequence[str]:
    run = [str(bin_folder / "nunspark"), "generate", str(files.packed), "--prompt", PROMPT, "--max-tokens", str(n)]
    return [*run, "--budget", "100MB"]


def _memopro(bin_folder: Path, files: Files, n: int) -> Sequence[str]:
    return [str(bin_folder / "python"), "-c", MEMOPRO, str(files.folder), PROMPT, "900MB", str(n)]


NEURO = ("neurostream", "0.2.1", ((TORCH,),))
FLAT = ("flatrun", "0.1.1", ())
WAYS = (
    Way("neurostream, 16 MB", *NEURO, _neurostream("--mem-budget", "16MB"), lambda files: files.q8_0),
    Way("neurostream, 16 MB, 200 MB resident", *NEURO, _neurostream("--mem-budget", "16MB", "--ram-budget", "200MB"),
        lambda files: files.q8_0),
    Way("flatrun, NumPy", *FLAT, _flatrun(), lambda files: files.q8_0),
    Way("flatrun, native", *FLAT, _flatrun("--backend", "native"), lambda files: files.q8_0, (2, 8)),
    Way("nunspark, 100 MB", "nunspark", "0.13.0", (("mlx[cpu]==0.32.4",),), _nunspark, lambda files: files.bf16),
    Way("memopro, 900 MB", "memopro[llm]", "0.2.0b1", ((TORCH,),), _memopro, lambda files: files.bf16),
)  # fmt: skip


def main() -> None:
    parser = common.arguments(__doc__, rounds=3, models=("smollm2-135m-instruct",))
    parser.add_argument("--only", help="measure the ways whose name begins so")
    parser.add_argument("--make", action="store_true", help="write the formats and end")
    args = parser.parse_args()
    folder = common.scratch_folder() / "neighbours"
    files = Files.within(folder)
    if args.make:
        return _make(common.find_model(args.models[0]), files, args.threads)
    # in a child: the kernel's peak of a process begins with that of the process that started it
    subprocess.run([sys.executable, __file__, "--make", "--models", *args.models], check=True)
    report = common.Report("neighbours", {"threads of edgelm": args.threads, "rounds": args.rounds, "context": CONTEXT})
    for way in WAYS:
        if way.name.startswith(args.only or ""):
            _compare(report, way, files, folder, args.threads, args.rounds)
    return report.finish()


def _compare(report: common.Report, way: Way, files: Files, folder: Path, threads: int, rounds: int) -> None:
    try:
        bin_folder = _installed(way, folder)
        if way.package == "nunspark" and not files.packed.exists():
            _checked([str(bin_folder / "nunspark"), "pack", str(files.folder), str(files.packed)])
        theirs = Side(way.tokens, lambda n: way.command(bin_folder, files, n))
        memory = min(int(BUDGET_SHARE * theirs.peak_bytes), MOST_BYTES)
        given: dict[str, Any] = {"threads": threads, "context": CONTEXT, "memory_bytes": memory, "backend": "llamacpp"}
        ours = Side(OUR_TOKENS, lambda n: common.edgelm_run(way.same(files), PROMPT, max_tokens=n, **given))
        for _ in range(rounds):
            theirs.turn()
            ours.turn()
        their_tps, our_tps = theirs.tps(), ours.tps()
    except RuntimeError as error:
        report.add("not measured", neighbour=way.name, version=way.version, why=str(error)[-300:])
        return
    report.add(
        "decode, tokens/s, and peak memory",
        **{
            "neighbour": way.name,
            "version": way.version,
            "weights": way.same(files).parent.name,
            "tok/s": their_tps,
            "peak MB": common.mb(theirs.peak_bytes),
            "edgelm budget MB": common.mb(memory),
            "edgelm tok/s": our_tps,
            "edgelm peak MB": common.mb(ours.peak_bytes),
            "times as fast": our_tps / their_tps,
            "ahead in both": our_tps > their_tps and ours.peak_bytes < theirs.peak_bytes,
            "every": {"neighbour": theirs.seconds, "edgelm": ours.seconds},
        },
    )


class Side:
    """Processes that generate few and many tokens, by turns; the first, a warm-up, is not timed."""

    def __init__(self, tokens: tuple[int, int], command: Callable[[int], Sequence[str]]) -> None:
        self._tokens, self._command = tokens, command
        self.seconds: dict[int, list[float]] = {n: [] for n in tokens}
        self.peak_bytes = _checked(command(tokens[0])).peak_bytes

    def turn(self) -> None:
        for n, seconds in self.seconds.items():
            done = _checked(self._command(n))
            seconds.append(done.wall_s)
            self.peak_bytes = max(self.peak_bytes, done.peak_bytes)

    def tps(self) -> float:
        """Return tokens a second between the two. Raises `RuntimeError` where the machine was too busy to tell."""
        (few, short), (many, long) = ((n, common.middle(seconds)) for n, seconds in self.seconds.items())
        if long <= short:
            raise RuntimeError(f"{many} tokens took {long:.2f} s and {few} took {short:.2f} s: the machine is busy")
        return (many - few) / (long - short)


def _checked(argv: Sequence[str]) -> common.Finished:
    done = common.run(argv)
    if done.exit_code != 0:
        raise RuntimeError(f"exit code {done.exit_code}: {done.stderr.strip()[-280:]}")
    return done


def _installed(way: Way, folder: Path) -> Path:
    """Return the folder of programs of the neighbour's environment, made and filled if it is not there yet."""
    place = folder / way.package.partition("[")[0]
    if not (place / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        # torch first and by itself, so that nothing pulls in a build for graphics cards
        for packages in (*way.also, (f"{way.package}=={way.version}",)):
            _checked([str(place / "bin" / "pip"), "install", "--quiet", *packages])
        (place / "installed").touch()
    return place / "bin"


def _make(model: Path, files: Files, threads: int) -> None:
    for kind, path in (("Q8_0", files.q8_0), ("BF16", files.bf16)):
        if not path.exists():
            _requantize(model, path, kind, threads)
    if not files.relabelled.exists():
        _relabel(files.q8_0, files.relabelled)
    if not (files.folder / "config.json").exists():
        import hf_folder

        hf_folder.write(model, files.folder)


def _requantize(model: Path, path: Path, kind: str, threads: int) -> None:
    import ctypes

    import llama_cpp.llama_cpp as api

    path.parent.mkdir(parents=True, exist_ok=True)
    params = api.llama_model_quantize_default_params()
    params.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize, params.nthread = True, threads
    if api.llama_model_quantize(str(model).encode(), str(path).encode(), ctypes.byref(params)) != 0:
        raise RuntimeError(f"llama.cpp could not write {path}")


def _relabel(model: Path, path: Path) -> None:
    """Write a llama file as qwen3: other names of the keys, and the rows of q and k in the order of NeoX's rotation."""
    import gguf
    import hf_folder

    path.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = gguf.GGUFReader(model), gguf.GGUFWriter(path, "qwen3")
    attention = {key: reader.fields[f"llama.attention.{key}"].contents() for key in ("head_count", "head_count_kv")}
    heads = {"attn_q": attention["head_count"], "attn_k": attention["head_count_kv"]}
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind, inner = entry.types[0], entry.types[-1]
            array = inner if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key.replace("llama.", "qwen3.", 1), entry.contents(), kind, array)
    for key in ("key_length", "value_length"):
        if f"llama.attention.{key}" not in reader.fields:
            size = reader.fields["llama.embedding_length"].contents() // attention["head_count"]
            writer.add_uint32(f"qwen3.attention.{key}", size)
    for tensor in reader.tensors:
        rows, kind = tensor.data, tensor.name.split(".")[-2]
        if kind in heads:
            rows = hf_folder.halves(rows, heads[kind])
        writer.add_tensor(tensor.name, rows, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
