"""What ONNX Runtime's execution providers for NPUs take: shapes, types, options, and where they come from.

From the providers' documentation. Of all of them only OpenVINO's was tried with this code, on a processor: there is no
NPU at hand. Which one is used is said by the environment variable `EDGELM_NPU`, as `openvino` or `openvino:CPU`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from edgelm.errors import ConfigError

VARIABLE = "EDGELM_NPU"


class Provider(NamedTuple):
    """One provider. `graph`: what products are given to it as.

    "int8": 8-bit weights with a scale for each row and 8-bit activations, between QuantizeLinear and DequantizeLinear.
    "float": a product of floats, which the provider computes in 16 bits; for those that need calibrated scales for
    every result of an 8-bit one, which edgelm does not have.
    """

    name: str
    execution_provider: str
    graph: Literal["int8", "float"]
    options: Mapping[str, str]
    shapes: str
    types: str
    platforms: str
    package: str
    tested: str = "untested"
    falls_back: bool = False
    """Whether what it refuses may be computed by the processor, in silence."""


_TABLE = (
    Provider(
        "openvino",
        "OpenVINOExecutionProvider",
        "int8",
        {"device_type": "NPU"},
        "fixed on the NPU (or bounds in `reshape_input`), any on CPU and GPU",
        "float16; 8-bit weights and activations as QuantizeLinear/DequantizeLinear",
        "Intel Core Ultra: Linux, Windows",
        "onnxruntime-openvino",
        "on a processor (`openvino:CPU`); untested on an NPU",
    ),
    Provider(
        "qnn",
        "QNNExecutionProvider",
        "float",
        {"backend_type": "htp", "enable_htp_fp16_precision": "1"},
        "fixed only",
        "float16; 8-bit or 16-bit activations with 4-bit or 8-bit weights, every result with a calibrated scale",
        "Snapdragon: Windows on ARM, Android, Linux on ARM",
        "onnxruntime-qnn",
    ),
    Provider(
        "coreml",
        "CoreMLExecutionProvider",
        "float",
        {"ModelFormat": "MLProgram", "MLComputeUnits": "CPUAndNeuralEngine", "RequireStaticInputShapes": "1"},
        "fixed ones preferred; `RequireStaticInputShapes` keeps others on the processor",
        "float16; the right side of a product must be constant",
        "Apple: macOS, iOS",
        "onnxruntime",
    ),
    Provider(
        "vitisai",
        "VitisAIExecutionProvider",
        "float",
        {},
        "fixed only; compiled when a session is made, for minutes, then cached (`cache_dir`, `cache_key`)",
        "bfloat16 (`config_file`); 8-bit weights and activations with calibrated scales",
        "Ryzen AI: Windows; Versal, Zynq: Linux",
        "Ryzen AI Software",
    ),
)
PROVIDERS: Mapping[str, Provider] = MappingProxyType({provider.name: provider for provider in _TABLE})


def wanted() -> tuple[Provider, dict[str, str]] | None:
    """Return the provider that the environment asks for and its options; None: the simulated NPU.

    Raises `ConfigError` for one that the table does not have.
    """
    name, _, device = os.environ.get(VARIABLE, "").strip().partition(":")
    if name in ("", "simulated"):
        return None
    if name not in PROVIDERS:
        raise ConfigError(f"{VARIABLE}={name!r} is not a provider (known: simulated, {', '.join(PROVIDERS)})")
    options = dict(PROVIDERS[name].options)
    if device:
        options["device_type"] = device
    return PROVIDERS[name], options
