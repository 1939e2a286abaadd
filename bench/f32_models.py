"""Write a model's weights out as F32: the same numbers in four times the bytes or more, so that streaming has work.

python bench/f32_models.py [--models NAME …]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import numpy as np

from edgelm.files.blocks import dequantize
from edgelm.files.ggml_types import TensorType
from edgelm.files.gguf import open_model
from edgelm.files.model import TensorInfo
from edgelm.testing import TensorData
from edgelm.testing.gguf_writer import write_gguf


def write(source: Path, target: Path) -> Path:
    """Write the model at `source` as F32; a file that is not whole never has that name."""
    file = open_model(source)
    metadata = {**file.metadata, "general.file_type": 0}
    tensors = [
        TensorData(info.name, TensorType.F32, info.shape, lambda info=info: _numbers(source, info))
        for info in file.tensors.values()
    ]
    unfinished = target.with_suffix(".unfinished")
    write_gguf(unfinished, metadata, tensors)
    unfinished.replace(target)
    return target


def _numbers(source: Path, info: TensorInfo) -> bytes:
    raw = np.memmap(source, np.uint8, "r", info.offset, info.n_bytes)
    return dequantize(info.type, np.asarray(raw).reshape(info.n_rows, -1)).tobytes()


def made(name: str) -> Path:
    """Return the path of the F32 model of this name or path; the first call writes it."""
    source = common.find_model(name)
    target = common.scratch_folder() / f"{source.name.removesuffix('.gguf')}-F32.gguf"
    return target if target.is_file() else write(source, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(common.MODELS), help="catalogue names or paths")
    for name in parser.parse_args().models:
        path = made(name)
        print(f"{path}: {path.stat().st_size:,} bytes")
