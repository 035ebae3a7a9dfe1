"""What is said over HTTP: requests and responses in OpenAI's form, and Foreword's own for prefixes.

A field that cannot be honoured is refused, never passed over.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "ErrorBody",
    "GenerationRequest",
    "Model",
    "ModelList",
    "PrefixInfo",
    "PrefixList",
    "error_body",
]

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_Text = Annotated[str, StringConstraints(max_length=2**20)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False


class GenerationRequest(_Strict):
    """What completions and chats have in common."""

    model: str = Field("", max_length=200, description="`base`, `prefix` or `base:prefix`; by default the base alone.")
    n: int = Field(1, ge=1, le=16, description="Answers to each prompt.")
    temperature: float | None = Field(None, ge=0, le=10, description="0 always takes the likeliest token. Default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="0: among all tokens.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed gives the same answer.")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        dict[Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = Field(None, max_length=1024)
    ignore_eos: bool = Field(False, description="Go on behind the token that ends an answer.")
    user: str | None = Field(None, max_length=256, description="Appears in the log.")

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`: text to be continued as it is."""

    prompt: (
        _Text
        | Annotated[list[_Text], Field(min_length=1, max_length=64)]
        | Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    max_tokens: int | None = Field(None, ge=1, description="Default 16.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: _Text


class Message(_Strict):
    """One turn of a chat."""

    role: str = Field(min_length=1, max_length=64)
    content: _Text | Annotated[list[TextPart], Field(min_length=1)]
    name: None = None

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(_Strict):
    """Answers are text."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`: messages, rendered by the chat template of the prefix."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="Default: as many as fit and are allowed.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: Any) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("top_logprobs needs logprobs: true")
        return value


# ------------------------------------------------------------------------------------------------------- responses


class ErrorDetail(BaseModel):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail


class Model(BaseModel):
    """The base, or a prefix on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "foreword"
    parent: str | None = None


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class PrefixInfo(BaseModel):
    """A prefix in the store, as its file tells."""

    name: str
    object: Literal["prefix"] = "prefix"
    version: str | None = Field(description="SHA-256 of the file. In lists, null for those that were not used yet.")
    base: str | None
    virtual_tokens: int
    bytes: int
    created: int
    training: dict[str, Any] = Field(description="Settings, losses, and the curve where the file has it.")
    evaluation: dict[str, Any]


class PrefixList(BaseModel):
    """`GET /v1/prefixes`."""

    object: Literal["list"] = "list"
    data: list[PrefixInfo]


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """An error as JSON."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
