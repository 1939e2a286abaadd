"""edgelm's MLX backend and mlx-lm on the same model folders, in turn, within one run: tokens, speed, peak memory.

The folders are made of a GGUF file of the llama architecture: bfloat16, and quantized by mlx-lm. Both sides continue
the same prompts greedily, each turn in a process of its own. mlx-lm computes in the type of the folder, edgelm in
float32: so mlx-lm has a second turn with the same weights and float32 activations. Where they part, `gap` tells by how
much the two best logits of mlx-lm differ. edgelm has a turn with everything resident and one at `--share` of the
folder's size. Peaks are the kernel's.

    python bench/mlx_folders.py [--tokens 32]
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import common
import hf_folder

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village",
    "def fibonacci(n):",
    "Water boils at",
    "The three most important inventions of the last century are",
)
PLAIN = "bf16"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "4 bits, group 64": {"group_size": 64, "bits": 4},
    "8 bits, group 32": {"group_size": 32, "bits": 8},
}
"""The second is what `mlx_lm.convert -q` makes."""
CONTEXT = 256
RESIDENT = "4GB"
CHILD = Path(__file__).resolve()


def folder_of(variant: str, model: Path) -> Path:
    """Return the folder of a variant, made once, in a child: the peak of a process begins at that of its parent."""
    folder = common.scratch_folder() / f"mlx {model.stem} {variant}"
    if not (folder / "config.json").exists():
        done = common.run([sys.executable, str(CHILD), "--make", variant, str(model), str(folder)])
        if done.exit_code != 0:
            raise RuntimeError(done.stderr)
    return folder


def make(variant: str, model: Path, folder: Path) -> None:
    plain = folder.with_name(f"mlx {model.stem} {PLAIN}")
    if not (plain / "config.json").exists():
        hf_folder.write(model, plain)
    if variant == PLAIN:
        return
    import mlx.core as mx
    from mlx_lm import utils

    loaded, config = utils.load_model(plain)
    loaded.set_dtype(mx.bfloat16)
    loaded, config = utils.quantize_model(loaded, config, **VARIANTS[variant])
    utils.save_model(folder, loaded)
    for path in plain.glob("token*"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(config))


def ours(spec: dict[str, Any]) -> list[dict[str, Any]]:
    import edgelm

    runs = []
    with edgelm.load(spec["folder"], backend="mlx", memory=spec["memory"], context=CONTEXT) as model:
        for ids in spec["prompts"]:
            options = {"max_tokens": spec["tokens"], "ignore_eos": True, "temperature": 0.0}
            chunks = list(model.stream_ids(ids, **options))
            tokens = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
            runs.append({"tokens": tokens, "decode_tps": chunks[-1].usage.decode_tps})
        streamed = model.plan.streamed_bytes
    return [{**run, "streamed_bytes": streamed} for run in runs]


def theirs(spec: dict[str, Any]) -> list[dict[str, Any]]:
    import mlx.core as mx
    from mlx_lm import utils
    from mlx_lm.generate import generate_step

    model, _ = utils.load_model(Path(spec["folder"]))
    if spec.get("float32"):
        model.set_dtype(mx.float32)
    runs = []
    for ids in spec["prompts"]:
        tokens, gaps, times = [], [], []
        for token, logprobs in generate_step(mx.array(ids), model, max_tokens=spec["tokens"]):
            times.append(time.perf_counter())
            first, second = sorted(mx.topk(logprobs, 2).astype(mx.float32).tolist(), reverse=True)
            tokens.append(int(token))
            gaps.append(first - second)
        runs.append({"tokens": tokens, "gaps": gaps, "decode_tps": (len(times) - 1) / (times[-1] - times[0])})
    return runs


SIDES = {"edgelm": ours, "mlx-lm": theirs}


def turn(who: str, spec: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    done = common.run([sys.executable, str(CHILD), "--child", who, json.dumps(spec)])
    return done.json(), done.peak_bytes


def encode(folder: Path) -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(prompt).ids for prompt in PROMPTS]


def parting(ours: list[int], theirs: list[int]) -> int | None:
    """Return the first place where two continuations differ."""
    return next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)


def measure(variant: str, model: Path, args: Any, report: common.Report) -> None:
    folder = folder_of(variant, model)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    spec = {"folder": str(folder), "prompts": encode(folder), "tokens": args.tokens}
    peers = {}
    for name, float32 in (("mlx-lm", False), ("mlx-lm in float32", True)):
        peers[name], peak = turn("mlx-lm", {**spec, "float32": float32})
        report.add("mlx-lm", folder=variant, engine=name, size_mb=common.mb(size), **speed(peers[name], peak))
    resident: list[list[int]] = []
    for what, memory in (("resident", RESIDENT), (f"{args.share:.0%} of the size", str(int(size * args.share)))):
        try:
            found, peak = turn("edgelm", {**spec, "memory": memory})
        except RuntimeError as error:
            report.add("edgelm", folder=variant, memory=what, refused=str(error).splitlines()[-1][-200:])
            continue
        tokens = [run["tokens"] for run in found]
        resident = resident or tokens
        report.add(
            "edgelm",
            folder=variant,
            memory=what,
            **speed(found, peak),
            **{"streamed MB a pass": common.mb(found[0]["streamed_bytes"])},
            **{"peak <= budget": None if what == "resident" else peak <= size * args.share},
            **{f"same tokens as {name}": agreement(tokens, peer) for name, peer in peers.items()},
            **{"same tokens as resident": tokens == resident},
        )


def agreement(tokens: list[list[int]], peer: list[dict[str, Any]]) -> str:
    """Say how many continuations are the same, and of the others where they part and how close the choice was."""
    places = [parting(a, b["tokens"]) for a, b in zip(tokens, peer, strict=True)]
    parted = [
        f"token {place} (gap {b['gaps'][place]:.3f})"
        for place, b in zip(places, peer, strict=True)
        if place is not None
    ]
    return "; ".join([f"{places.count(None)} of {len(places)}", *parted])


def speed(runs: list[dict[str, Any]], peak_bytes: int) -> dict[str, float]:
    return {"tokens/s": common.middle(run["decode_tps"] for run in runs), "peak_mb": common.mb(peak_bytes)}


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(SIDES[sys.argv[2]](json.loads(sys.argv[3]))))
        return
    if sys.argv[1:2] == ["--make"]:
        make(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return
    parser = common.arguments(__doc__, rounds=1, models=["smollm2-135m-instruct"])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.6, help="the budget, as a share of the folder's size")
    args = parser.parse_args()
    report = common.Report("mlx_folders", {"tokens": args.tokens, "context": CONTEXT, "prompts": len(PROMPTS)})
    for model in args.models:
        for variant in VARIANTS:
            measure(variant, common.find_model(model), args, report)
    report.finish()


if __name__ == "__main__":
    main()
