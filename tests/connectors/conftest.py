"""Tiny models for programs that edgelm is plugged into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgelm.testing import tiny_model

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models whose answers differ."""
    folder = tmp_path_factory.mktemp("plugged")
    template = {"tokenizer.chat_template": TEMPLATE}
    return [tiny_model(folder / f"tiny{n}.gguf", "llama", seed=n, metadata=template) for n in range(2)]


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    yield
    from edgelm_apps.holding import let_go

    let_go()
