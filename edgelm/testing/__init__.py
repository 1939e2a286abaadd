"""What an author of a backend, store or architecture tests with: tiny models that need no download."""

from edgelm.testing.blocks import RANDOM_TYPES, random_weights
from edgelm.testing.gguf_writer import TensorData, write_gguf, write_split_gguf
from edgelm.testing.tiny import ARCHITECTURES, SPECS, TinySpec, tiny_model, tiny_spec
from edgelm.testing.tiny_folder import tiny_folder
from edgelm.testing.tiny_genai import tiny_genai

__all__ = [
    "ARCHITECTURES",
    "RANDOM_TYPES",
    "SPECS",
    "TensorData",
    "TinySpec",
    "random_weights",
    "tiny_folder",
    "tiny_genai",
    "tiny_model",
    "tiny_spec",
    "write_gguf",
    "write_split_gguf",
]
