"""LangChain's own tests of chat models. They bring plug-ins of pytest, so they have an environment of their own:

pip install '.[test-connectors]'
pytest -o asyncio_mode=auto -o asyncio_default_fixture_loop_scope=function tests/connectors/test_langchain_standard.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed: pip install '.[test-connectors]'")

from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from edgelm_apps.langchain import ChatEdgeLM

needs_a_mind = pytest.mark.skip(reason="a model of random weights finds no right value, nor when to call a tool")


class OfATinyModel:
    @pytest.fixture(autouse=True)
    def a_model(self, models: list[Path]) -> None:
        self.path, self.other = map(str, models)

    @property
    def chat_model_class(self) -> type[ChatEdgeLM]:
        return ChatEdgeLM

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self.path, "memory": "2GB", "backend": "numpy", "threads": 1, "context": 1024}

    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        return {"temperature": 0, "max_tokens": 100, "timeout": 60, "stop": []}  # nothing is tried again here


class TestUnits(OfATinyModel, ChatModelUnitTests):
    pass


class TestIntegration(OfATinyModel, ChatModelIntegrationTests):
    @property
    def model_override_value(self) -> str:
        return self.other

    test_tool_calling = needs_a_mind(ChatModelIntegrationTests.test_tool_calling)
    test_tool_calling_async = needs_a_mind(ChatModelIntegrationTests.test_tool_calling_async)
    test_agent_loop = needs_a_mind(ChatModelIntegrationTests.test_agent_loop)
    test_unicode_tool_call_integration = needs_a_mind(ChatModelIntegrationTests.test_unicode_tool_call_integration)
