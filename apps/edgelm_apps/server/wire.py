"""What requests may hold, in the words of the API that OpenAI's clients speak; a field that is none is refused.

Where a limit is not the API's, the docstring says so. Knows no model.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1, max_length=256)]
Seed = Annotated[int, Meta(ge=0, lt=1 << 62)]
Top = Annotated[int, Meta(ge=0, le=20)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
Stops = str | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=16)]
Biases = dict[Annotated[str, Meta(pattern=r"^\d{1,9}$")], Annotated[float, Meta(ge=-100, le=100)]]
Schema = dict[str, Any]
Asker = Annotated[str, Meta(max_length=512, description="Who asks: the queue serves users, not requests, in turn.")]
Temperature = Annotated[float, Meta(ge=0, le=2, description="Without it, what the server was started with.")]


class Request(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields that every request may have. `metadata` is recorded nowhere and changes nothing."""

    model: Annotated[str, Meta(max_length=256, description="One of GET /v1/models; empty: the first of them.")] = ""

    user: Asker | None = None
    metadata: dict[str, str] | None = None


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_stats: Annotated[
        bool, Meta(description="edgelm's own: an `edgelm` object in every chunk, with memory, speed and times.")
    ] = False


class Sampled(Request, kw_only=True):
    """How tokens are chosen, and when to stop. `top_k`, `min_p`, `repeat_penalty` and `speculate` are edgelm's own."""

    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    min_p: Share | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=10)] | None = None
    speculate: bool | None = None

    def __post_init__(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")


class TextPart(Struct, forbid_unknown_fields=True):
    type: Literal["text", "input_text", "output_text"]
    text: str


Content = str | list[TextPart]


class CalledFunction(Struct, forbid_unknown_fields=True):
    name: Name
    arguments: str


class Called(Struct, forbid_unknown_fields=True):
    id: Name
    function: CalledFunction
    type: Literal["function"] = "function"


class System(Struct, tag_field="role", tag="system", forbid_unknown_fields=True):
    content: Content
    name: str | None = None


class Developer(Struct, tag_field="role", tag="developer", forbid_unknown_fields=True):
    content: Content
    name: str | None = None


class User(Struct, tag_field="role", tag="user", forbid_unknown_fields=True):
    content: Content
    name: str | None = None


class Assistant(Struct, tag_field="role", tag="assistant", forbid_unknown_fields=True):
    content: Content | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: list[Called] | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    def __post_init__(self) -> None:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message of the assistant needs content or tool_calls")


class Tool(Struct, tag_field="role", tag="tool", forbid_unknown_fields=True):
    content: Content
    tool_call_id: Name


Message = System | Developer | User | Assistant | Tool


class Function(Struct, forbid_unknown_fields=True):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class FunctionTool(Struct, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: Name


class NamedTool(Struct, forbid_unknown_fields=True):
    function: NamedFunction
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class AsText(Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    pass


class AsJson(Struct, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    pass


class NamedSchema(Struct, forbid_unknown_fields=True):
    name: Name
    schema: Schema | UnsetType = UNSET
    description: str | None = None
    strict: bool | None = None


class AsSchema(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    json_schema: NamedSchema


ResponseFormat = AsText | AsJson | AsSchema


class ChatRequest(Sampled, kw_only=True):
    """`POST /v1/chat/completions`. `regex` and `grammar` (Lark) are edgelm's own."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Meta(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    store: Literal[False] | None = None

    regex: str | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        formed = self.response_format is not None and not isinstance(self.response_format, AsText)
        if sum((formed, self.regex is not None, self.grammar is not None)) > 1:
            raise ValueError("response_format, regex and grammar exclude each other")


class CompletionRequest(Sampled, kw_only=True):
    """`POST /v1/completions`: what follows a prompt, without a chat template."""

    prompt: str | Annotated[list[TokenId], Meta(min_length=1)]
    echo: bool | None = None
    logprobs: Top | None = None


class EmbeddingRequest(Request, kw_only=True):
    """`POST /v1/embeddings`."""

    input: str | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"


class ResponseMessage(Struct, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    type: Literal["message"] = "message"
    id: str | None = None
    status: str | None = None


class TextFormatSchema(Struct, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    name: Name
    schema: Schema
    description: str | None = None
    strict: bool | None = None


class TextFormat(Struct, forbid_unknown_fields=True):
    format: AsText | AsJson | TextFormatSchema | None = None


class ResponseRequest(Request, kw_only=True):
    """`POST /v1/responses`, stateless: nothing is stored, so nothing that was said before can be named."""

    input: str | Annotated[list[ResponseMessage], Meta(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stream: bool | None = None
    text: TextFormat | None = None
    store: Literal[False] | None = None


class BudgetRequest(Struct, forbid_unknown_fields=True):
    """`POST /v1/budget`, edgelm's own: another memory budget, while the server runs."""

    memory: Annotated[str | int, Meta(description='Bytes, or a size such as "200MB".')]
