"""Would lossless compression of weights pay? How much blocks shrink, how fast they come back, and on which flash that
wins: never where decoding is slower than what it saves.

A streamed byte costs 1/flash without compression. With it, share/flash of reading beside 1/decode of one core; where
both overlap, the slower of the two counts. So it wins on flash slower than the speed of decoding, by 1/share at most,
and only while a core has nothing better to do.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import common
import numpy as np

from edgelm.files.ggml_types import TensorType
from edgelm.files.gguf import open_model

TILE_BYTES = 128 << 10
SAMPLE_BYTES = 12 << 20
"""Weights of each tensor type that are tried, spread over the model."""


Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], Any]]


def codecs(block_bytes: int) -> dict[str, Codec]:
    """Return ways to code and decode a tile of such blocks; "apart" puts equal fields of all blocks together."""
    import lz4.block
    import zstandard

    decoder = zstandard.ZstdDecompressor()
    three = zstandard.ZstdCompressor(level=3)

    def transposed(raw: bytes, columns: int) -> bytes:
        return np.frombuffer(raw, np.uint8).reshape(-1, columns).T.tobytes()

    return {
        "lz4": (lz4.block.compress, lz4.block.decompress),
        "lz4 hc": (lambda raw: lz4.block.compress(raw, mode="high_compression"), lz4.block.decompress),
        "zstd 3": (three.compress, decoder.decompress),
        "zstd 3, apart": (
            lambda raw: three.compress(transposed(raw, block_bytes)),
            lambda coded: transposed(raw := decoder.decompress(coded), len(raw) // block_bytes),
        ),
        "zstd 19": (zstandard.ZstdCompressor(level=19).compress, decoder.decompress),
    }


def tiles_by_type(path: Any) -> dict[TensorType, list[bytes]]:
    """Return some tiles of whole blocks of every tensor type."""
    file = open_model(path)
    places = defaultdict(list)
    for info in file.tensors.values():
        if info.n_rows > 1:
            tile = TILE_BYTES // info.type.block_bytes * info.type.block_bytes
            starts = range(0, info.n_bytes, tile)
            places[info.type] += [(info.offset + start, min(tile, info.n_bytes - start)) for start in starts]
    found = {}
    with open(path, "rb") as weights:
        for kind, all_places in places.items():
            step = max(len(all_places) * TILE_BYTES // SAMPLE_BYTES, 1)
            found[kind] = []
            for offset, n_bytes in all_places[::step]:
                weights.seek(offset)
                found[kind].append(weights.read(n_bytes))
    return found


def main() -> None:
    args = common.arguments(__doc__, rounds=3).parse_args()
    report = common.Report("entropy", {"tile": f"{TILE_BYTES >> 10} KiB", "cores": 1})
    for name in args.models:
        for kind, tiles in tiles_by_type(common.find_model(name)).items():
            for codec, (encode, decode) in codecs(kind.block_bytes).items():
                measure(report, name, kind.name, tiles, codec, encode, decode, args.rounds)
    report.finish()


def measure(
    report: common.Report,
    name: str,
    kind: str,
    tiles: list[bytes],
    codec: str,
    encode: Callable[[bytes], bytes],
    decode: Callable[[bytes], Any],
    rounds: int,
) -> None:
    coded = [encode(tile) for tile in tiles]
    n_bytes = sum(map(len, tiles))
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        for tile in coded:
            decode(tile)
        best = min(best, time.process_time() - began)
    assert all(decode(short) == tile for short, tile in zip(coded, tiles, strict=True))
    share, decode_rate = sum(map(len, coded)) / n_bytes, n_bytes / best
    report.add(
        "Blocks of real models",
        model=name,
        type=kind,
        codec=codec,
        **{
            "share left": share,
            "decodes at GB/s": decode_rate / 1e9,
            "wins on flash below MB/s": decode_rate / 1e6 if share < 1 else 0.0,
            "gain there at most": 1 / share if share < 1 else 1.0,
        },
    )


if __name__ == "__main__":
    main()
