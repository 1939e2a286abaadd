"""The angles of rotary positions, as ggml makes them: for backends that rotate by tables.

Source: `ggml_rope_cache_init`, `ggml_rope_yarn_corr_dims` and `rope_yarn_ramp` of llama.cpp.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from edgelm.engine.ir import RopeSpec

Floats = NDArray[np.float32]


def angles(spec: RopeSpec, positions: NDArray[np.int32], factors: Floats | None = None) -> tuple[Floats, Floats]:
    """Return cosines and sines, float32 [positions, n_dims / 2], YaRN's magnitude included.

    `factors` [n_dims / 2] divide the frequencies.
    """
    # Repeated products, not powers: ggml rounds to float32 after each, and at long contexts the difference shows.
    theta = np.full((len(positions), spec.n_dims // 2), np.float32(spec.base) ** np.float32(-2.0 / spec.n_dims))
    theta[:, 0] = positions
    np.multiply.accumulate(theta, axis=1, out=theta)
    if factors is not None:
        theta /= factors
    magnitude = spec.attn_factor
    if spec.ext_factor:
        mix = _yarn_ramp(spec) * np.float32(spec.ext_factor)
        theta = theta * np.float32(spec.freq_scale) * (1 - mix) + theta * mix
        magnitude *= 1 + 0.1 * math.log(1 / spec.freq_scale)
    else:
        theta *= np.float32(spec.freq_scale)
    cos, sin = np.cos(theta), np.sin(theta, out=theta)
    cos *= np.float32(magnitude)
    sin *= np.float32(magnitude)
    return cos, sin


def _yarn_ramp(spec: RopeSpec) -> Floats:
    """How far each frequency is extrapolated, 1 … 0."""

    def dimension(n_rotations: float) -> float:
        wave = spec.n_ctx_orig / (n_rotations * 2 * math.pi)
        return spec.n_dims * math.log(wave) / (2 * math.log(spec.base))

    low = max(0.0, math.floor(dimension(spec.beta_fast)))
    high = min(spec.n_dims - 1.0, math.ceil(dimension(spec.beta_slow)))
    ramp: Floats = (np.arange(spec.n_dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(max(1e-3, high - low))
    return np.subtract(1, np.clip(ramp, 0, 1), dtype=np.float32)
