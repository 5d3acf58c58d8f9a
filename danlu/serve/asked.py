"""What clients may ask, field by field with bounds.  An unknown field is refused; one without effect here is named as such."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

Text = Annotated[str, Field(max_length=1 << 20)]
Id = Annotated[int, Field(ge=0, lt=1 << 31)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=1 << 19)]
Name = Annotated[str, Field(max_length=128)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Asked(BaseModel):
    """A request's body."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), strict=True)
    IGNORED: ClassVar[tuple[str, ...]] = ()              # what clients send and has no effect here

    model: Name | None = Field(None, description="Name of the model or adapter; left out: the first.")

    @property
    def ignored(self) -> list[str]:
        """Fields that were given and have no effect."""
        return [name for name in self.IGNORED if getattr(self, name) is not None]


class Schema(BaseModel):
    """What OpenAI calls json_schema: a schema with a name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=64)] = "answer"
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    strict: bool | None = None


class Format(BaseModel):
    """What an answer must look like."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    @model_validator(mode="after")
    def _schema_if_named(self) -> Format:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema stands beside type=json_schema, and only there")
        return self

    @property
    def wanted(self) -> dict[str, Any] | None:
        """The JSON schema that the answer obeys, None for any text."""
        if self.json_schema is not None:
            return dict(self.json_schema.schema_)
        return {"type": "object"} if self.type == "json_object" else None


class Part(BaseModel):
    """A part of what is said.  Only text: nothing is fetched for a client."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(max_length=64)]
    name: Annotated[str, Field(max_length=64)] | None = Field(None, description="Has no effect.")
    refusal: None = Field(None, description="As an answer has it that a client sends back.")
    annotations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Only empty.")
    audio: None = Field(None, description="Only empty.")
    function_call: None = Field(None, description="Only empty.")
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="Only empty.")

    @property
    def said(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description="Has no effect.")


class Writing(Asked):
    """What conversations and completions have in common."""

    IGNORED = ("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    max_tokens: Annotated[int, Field(ge=0, le=1 << 20)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    n: Literal[1] | None = None
    response_format: Format | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description="Only empty.")
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Has no effect.")
    store: bool | None = Field(None, description="Has no effect: nothing is stored.")
    metadata: dict[str, str] | None = Field(None, description="Has no effect.")
    service_tier: Annotated[str, Field(max_length=64)] | None = Field(None, description="Has no effect.")
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(None, description="Has no effect.")
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = Field(None, description="Has no effect.")
    parallel_tool_calls: bool | None = Field(None, description="Has no effect.")

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @model_validator(mode="after")
    def _streams(self) -> Writing:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options stands beside stream=true")
        return self


class Chat(Writing):
    """A conversation that the model is to continue."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[JsonValue], Field(max_length=0)] | None = Field(None, description="Only empty.")

    @model_validator(mode="after")
    def _logprobs(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs stands beside logprobs=true")
        if self.max_tokens == 0:
            raise ValueError("max_tokens is at least 1")
        return self


class Complete(Writing):
    """Texts that the model is to continue, as texts or as ids of tokens."""

    prompt: Text | Annotated[list[Text], Field(min_length=1)] | Ids | Annotated[list[Ids], Field(min_length=1)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Literal[""] | None = Field(None, description="Only empty.")
    best_of: Literal[1] | None = None

    @model_validator(mode="after")
    def _something(self) -> Complete:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens=0 stands beside echo=true")
        if self.stream and self.echo:
            raise ValueError("echo and stream are not given together")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [list(self.prompt)] if isinstance(self.prompt[0], int) else list(self.prompt)     # type: ignore[arg-type, list-item]


class Embeddings(Asked):
    """Texts of which vectors are to be made."""

    IGNORED = ("user",)

    input: Text | Annotated[list[Text], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    head: Name | None = None
    user: Annotated[str, Field(max_length=512)] | None = Field(None, description="Has no effect.")


class Classes(Asked):
    """Texts to be classified or scored; two of them in a list belong together."""

    input: Text | Annotated[list[Text | Annotated[list[Text], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="Also list so many of the likeliest classes.")
    head: Name | None = None


class Tags(Asked):
    """Words to be tagged: those of one sentence, or a list for each."""

    words: (Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]], Field(min_length=1, max_length=8192)]
            | Annotated[list[Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]],
                                       Field(min_length=1, max_length=8192)]], Field(min_length=1)])
    head: Name | None = None


class Question(BaseModel):
    """A question, and where its answer stands."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    question: Annotated[str, Field(min_length=1, max_length=1 << 16)]
    context: Annotated[str, Field(min_length=1, max_length=1 << 20)]


class Questions(Asked):
    """Questions to be answered with a stretch of a text: one, or a list of them as `input`."""

    question: Annotated[str, Field(min_length=1, max_length=1 << 16)] | None = None
    context: Annotated[str, Field(min_length=1, max_length=1 << 20)] | None = None
    input: Annotated[list[Question], Field(min_length=1)] | None = None
    head: Name | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Questions:
        if (self.question is None) != (self.context is None) or (self.question is None) == (self.input is None):
            raise ValueError("give question and context, or a list of both as input")
        return self

    @property
    def each(self) -> list[Question]:
        """The questions."""
        if self.input is not None:
            return list(self.input)
        assert self.question is not None and self.context is not None
        return [Question(question=self.question, context=self.context)]
