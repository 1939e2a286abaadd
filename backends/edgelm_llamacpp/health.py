"""A small matrix product through the installed ggml: does it load, does it compute, is the answer right?

A library built for another processor dies here, so callers run it in a child process.
"""

from __future__ import annotations

import ctypes

from edgelm.engine.backend import Bindings, PassShape
from edgelm.engine.ir import Op, Segment, Value, Weight
from edgelm.errors import BackendUnavailable
from edgelm.files.ggml_types import TensorType
from edgelm_llamacpp.session import GgmlSession


def check() -> str:
    """Return the version of a ggml that works. Raises `BackendUnavailable`."""
    session = GgmlSession(n_threads=1)
    width = 32
    weight = Weight("", TensorType.F32, width, width)
    segment = Segment((Op("linear", (0,), 1, (weight,)),), (Value(width, "token"),) * 2, (0,), (1,), (weight,), 0)
    x = (ctypes.c_float * width)(*range(width))
    y = (ctypes.c_float * width)()
    identity = (ctypes.c_float * width**2)()
    for i in range(width):
        identity[i * width + i] = 2.0
    program = session.compile(segment, PassShape(1, 1, ()))
    program.run(Bindings((_at(x),), (_at(y),), (_at(identity),), (), (), 0, 0, (), ()))
    version = session.ggml.version
    del program
    session.close()
    if list(y) != [2.0 * i for i in range(width)]:
        raise BackendUnavailable("llamacpp", f"ggml {version} computes wrong results here", "rebuild llama-cpp-python")
    return version


def _at(array: ctypes.Array[ctypes.c_float]) -> int:
    return ctypes.addressof(array)
