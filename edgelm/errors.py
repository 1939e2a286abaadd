"""Every error that edgelm raises on purpose, as one tree.

Each message is one sentence with a fact and a next step. Applications print it without a traceback;
the command line maps each class to the exit code in `exit_code` (see docs/cli.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from edgelm.sizes import human


class EdgeLMError(Exception):
    """Base of every error edgelm raises on purpose; applications print it without a traceback."""

    exit_code = 1


class ConfigError(EdgeLMError):
    """An option has a value that cannot work."""

    exit_code = 2


class ModelNotFound(EdgeLMError):
    """Neither a file, nor in the cache, nor in the catalogue."""

    exit_code = 3


class DownloadError(EdgeLMError):
    """A model could not be fetched, or what came is not what was promised."""

    exit_code = 3


class ModelFileError(EdgeLMError):
    """The file is not a model that can be read: `path` and the fact are in the message."""

    exit_code = 4

    def __init__(self, path: object, fact: str, hint: str = "download the file again") -> None:
        self.path, self.fact = str(path), fact
        super().__init__(f"{path}: {fact}; {hint}")


class UnsupportedModel(EdgeLMError):
    """The file is sound, but edgelm cannot run it (architecture, tensor type, tokenizer)."""

    exit_code = 5


class BudgetTooSmall(EdgeLMError):
    """No plan fits. `needed_bytes` is the smallest budget that works, `items` the largest parts of it."""

    exit_code = 6

    def __init__(self, given_bytes: int, needed_bytes: int, items: Iterable[tuple[str, int]] = ()) -> None:
        self.given_bytes, self.needed_bytes = given_bytes, needed_bytes
        self.items = tuple(sorted(items, key=lambda item: -item[1])[:3])
        largest = ", ".join(f"{name} {human(n_bytes)}" for name, n_bytes in self.items)
        super().__init__(
            f"budget {human(given_bytes)} is too small: this model needs {human(needed_bytes)} at this context"
            + (f" (largest: {largest})" if largest else "")
            + "; raise --memory, shorten --context, or use a smaller quantization"
        )


class BackendUnavailable(EdgeLMError):
    """The backend is known, but cannot be used here: the message says why and what to do."""

    exit_code = 7

    def __init__(self, name: str, reason: str, hint: str = "see `edgelm backends`") -> None:
        self.name, self.reason = name, reason
        super().__init__(f"backend {name!r} is not available: {reason}; {hint}")


class UnknownBackend(BackendUnavailable):
    """No backend has this name."""

    def __init__(self, name: str, available: Iterable[str]) -> None:
        names = ", ".join(sorted(available))
        super().__init__(name, "no backend has this name", f"available: {names}")


class PreparationError(EdgeLMError):
    """The weights of a model could not be prepared for a backend; nothing is left of the attempt."""

    exit_code = 10


class ContextOverflow(EdgeLMError):
    """The prompt and the answer do not fit into the context."""

    exit_code = 8

    def __init__(self, n_prompt_tokens: int, n_context: int) -> None:
        self.n_prompt_tokens, self.n_context = n_prompt_tokens, n_context
        super().__init__(
            f"the prompt has {n_prompt_tokens} tokens and the context holds {n_context}; "
            "shorten the prompt, raise --context, or choose an overflow policy that trims old turns"
        )


class TemplateError(EdgeLMError):
    """The chat template of the file fails, or does more than a template may."""

    exit_code = 9


class Cancelled(EdgeLMError):
    """The caller stopped the generation."""

    exit_code = 130


class ToolsIgnored(UserWarning):
    """A chat was given tools, and its template leaves them out: the model never hears of them."""
