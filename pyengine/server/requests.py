"""The fields of a request: one table per kind, checked by pydantic.

`CompletionRequest` and `ChatRequest` name every parameter that a request can have.  Three tables say what
becomes of them: the parameters that are done; `Harmless`, accepted because they do not change the answer;
`only(...)`, accepted with the values that ask for nothing else.  Everything else is an error: what would
change the answer and is not done is never ignored.  /openapi.json and README.md have the same tables.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

MOST_CHOICES = 128  # of one request: prompts times n


# ---- kinds of values ---------------------------------------------------------------------------


def parameter(meaning: str, want: str | None = None) -> Any:
    """A field that may be absent; null counts as absent.

    meaning  for people: in /openapi.json and README.md
    want     the values in words, for errors; None: made from the type
    """
    return Field(None, description=meaning, json_schema_extra={"x-want": want} if want else None)


def only(meaning: str, *values: Any) -> Any:
    """A field that may have these values, which ask for nothing but what is done here."""
    want = " or ".join(map(json.dumps, values)) + ": nothing else is done here"
    return Field(None, description=meaning, json_schema_extra={"enum": [*values, None], "x-want": want})


def _integer(value: Any) -> Any:
    """JSON has one kind of numbers, and some clients write 5 as 5.0.  Beyond 2^53 a float is not exact."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) <= 1 << 53
    return int(value) if whole else value


Whole = BeforeValidator(_integer)  # the last of an annotation: the schema is that of what stands before it
Integer = Annotated[int, Whole]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31), Whole]
TokenCount = Annotated[int, Field(ge=0), Whole]
Limit = Annotated[int, Field(ge=-1), Whole]  # -1: none
# Keys of a JSON object are text; one spelling for each id, so that none is there twice.
Decimal = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
RepeatPenalty = Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _among(cls, value: Any, info: ValidationInfo) -> Any:
        """Of `only`: one of the values, where true is not 1."""
        extra = cls.model_fields[str(info.field_name)].json_schema_extra
        values = extra.get("enum") if isinstance(extra, dict) else None
        if isinstance(values, list) and not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in values
        ):
            raise ValueError
        return value


class StreamOptions(_Strict):
    """What a stream carries beside the answer."""

    include_usage: bool | None = parameter("a last chunk with the counts of tokens")
    continuous_usage_stats: bool | None = parameter("with include_usage: the counts so far in every chunk")
    include_obfuscation: bool | None = parameter("accepted; the chunks are not padded")


class _Loose(BaseModel):
    """An object of which the server reads a part."""

    model_config = ConfigDict(strict=True, extra="ignore")


class FunctionName(_Loose):
    name: str


class ToolChoice(_Loose):
    """One function."""

    type: Literal["function"]
    function: FunctionName


class Schema(_Loose):
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Loose):
    """The answer's form; `strict` and `name` change nothing: the form always holds."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # of a json_object, as llama.cpp has it


# ---- the tables --------------------------------------------------------------------------------


class Harmless(_Strict):
    """Accepted because they do not change the answer: bookkeeping of clients, hints to other servers."""

    user: str | None = parameter("OpenAI's records")
    safety_identifier: str | None = parameter("OpenAI's records")
    metadata: dict[str, Any] | None = parameter("OpenAI's records")
    store: bool | None = parameter("nothing is stored, whatever it says")
    service_tier: str | None = parameter("there is one tier")
    prompt_cache_key: str | None = parameter("the last prompt is kept, whatever it says")
    prompt_cache_retention: str | None = parameter("the last prompt is kept, whatever it says")
    cache_prompt: bool | None = parameter("llama.cpp's; no bit of an answer depends on the cache")
    verbosity: Literal["low", "medium", "high"] | None = parameter("a hint to models that know it")
    request_id: str | None = parameter("vLLM's; the answer has an id of its own")


class _Neutral(_Strict):
    """Methods that are not done here, with the values that turn them off."""

    use_beam_search: Any = only("vLLM's", False)
    length_penalty: Any = only("vLLM's, for beams", 1)
    skip_special_tokens: Any = only("special tokens have no text", True)
    spaces_between_special_tokens: Any = only("vLLM's", True, False)
    include_stop_str_in_output: Any = only("vLLM's", False)
    typical_p: Any = only("llama.cpp's", 1)
    mirostat: Any = only("llama.cpp's", 0)
    xtc_probability: Any = only("llama.cpp's", 0)
    dry_multiplier: Any = only("llama.cpp's", 0)


class _Common(Harmless, _Neutral):
    """Parameters of both kinds of request."""

    model: str | None = parameter("the model's name, as /v1/models has it; absent: the model that there is")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES), Whole] | None = parameter(
        "number of answers to each prompt; answer i is drawn from seed + i"
    )
    max_tokens: Limit | None = parameter("the most tokens of an answer, thinking included; -1: no limit")
    n_predict: Limit | None = parameter("llama.cpp's name of max_tokens")
    min_tokens: TokenCount | None = parameter("no end id is drawn before; not together with stop")
    seed: Limit | None = parameter("of every random draw; -1: a fresh one, which the answer's `seed` tells")
    temperature: Temperature | None = parameter("0: the likeliest token each time")
    top_p: Share | None = parameter("of the likeliest tokens that have this probability together; 1: all")
    top_k: Limit | None = parameter("of the k likeliest tokens; 0 or -1: all")
    min_p: Share | None = parameter(
        "no tokens below this fraction of the likeliest token's probability; 0: all"
    )
    repeat_penalty: RepeatPenalty | None = parameter("divides the logits of tokens seen; 1: none")
    repetition_penalty: RepeatPenalty | None = parameter("vLLM's name of repeat_penalty")
    repeat_last_n: Limit | None = parameter("number of last tokens that the penalties look at; -1: all")
    presence_penalty: Amount | None = parameter("subtracted from the logits of tokens seen")
    frequency_penalty: Amount | None = parameter(
        "subtracted from the logits of tokens seen, once for each time"
    )
    logit_bias: dict[Decimal, Amount] | None = parameter(
        "added to the logits of these ids", "an object of token ids with numbers from -100 to 100"
    )
    stop: str | list[str] | None = parameter("a text, or several, that ends the answer")
    stop_token_ids: list[TokenId] | None = parameter(
        "ids that end the answer, beside the model's own", "a list of token ids"
    )
    ignore_eos: bool | None = parameter("the model's own end ids do not end the answer")
    stream: bool | None = parameter("the answer comes as server-sent events")
    prompt_logprobs: Annotated[int, Field(ge=0, le=100), Whole] | None = parameter(
        "vLLM's: number of likeliest tokens to report of each token of the prompt; not in a stream"
    )
    structured_outputs: dict[str, Any] | None = parameter(
        "vLLM's: the answer's form", "an object with one of json, regex, choice and grammar"
    )
    guided_json: dict[str, Any] | str | None = parameter("vLLM's: the answer is JSON of this schema")
    guided_regex: str | None = parameter("vLLM's: the answer matches this regular expression")
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = parameter("vLLM's: one of these texts")
    guided_grammar: str | None = parameter("vLLM's: the answer is of this grammar, Lark or GBNF")
    json_schema: dict[str, Any] | None = parameter("llama.cpp's name of guided_json")
    grammar: str | None = parameter("llama.cpp's name of guided_grammar")
    stream_options: StreamOptions | None = parameter(
        "what the stream carries beside the answer",
        "an object with include_usage and continuous_usage_stats, true or false",
    )


class CompletionRequest(_Common):
    """Body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[Integer], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Annotated[list[Integer], Field(min_length=1)]], Field(min_length=1)]
        | None
    ) = parameter("the text, or its ids; or several", "text, token ids, or a list of one of them")
    logprobs: Annotated[int, Field(ge=0, le=100), Whole] | None = parameter(
        "number of likeliest tokens to report"
    )
    parse_special: bool | None = parameter("text that spells a special token is that token")
    best_of: Any = only("choosing among several answers", 1)
    echo: bool | None = parameter("the answer begins with the prompt, and logprobs with the prompt's tokens")
    suffix: Any = only("text behind the answer", "")


Messages = Annotated[
    list[dict[str, Any]],
    Field(min_length=1),
    WithJsonSchema(
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"type": "string"},
                    "content": {"description": "text, null, or a list of {type: text, text: ...}"},
                    "reasoning_content": {"type": "string"},
                    "tool_calls": {"type": "array", "items": {"type": "object"}},
                    "tool_call_id": {"type": "string"},
                },
            },
        }
    ),
]


class ResponsesRequest(Harmless):
    """Body of POST /v1/responses."""

    model: str | None = parameter("the model's name")
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)] | None = parameter(
        "the text, or messages, calls and their results", "a text or a list of items"
    )
    instructions: str | None = parameter("a system message")
    max_output_tokens: Limit | None = parameter("the most tokens of the answer, thinking included")
    temperature: Temperature | None = parameter("as of a chat completion")
    top_p: Share | None = parameter("as of a chat completion")
    seed: Limit | None = parameter("as of a chat completion")
    tools: list[dict[str, Any]] | None = parameter("functions", "a list of tools")
    tool_choice: str | dict[str, Any] | None = parameter("as of a chat completion", "text or an object")
    parallel_tool_calls: bool | None = parameter("as of a chat completion")
    reasoning: dict[str, Any] | None = parameter("effort: as reasoning_effort of a chat completion")
    text: dict[str, Any] | None = parameter("format: as response_format of a chat completion")
    stream: bool | None = parameter("the answer comes as server-sent events")
    stream_options: StreamOptions | None = parameter("accepted; the events are not padded")
    include: list[str] | None = parameter("accepted; what there is comes in any case", "a list of texts")
    truncation: Any = only("an input that is too long is an error", "disabled")
    background: Any = only("the answer comes at once", False)
    previous_response_id: Any = only("nothing is stored: send the items again")
    conversation: Any = only("nothing is stored: send the items again")


class TokenizeRequest(_Strict):
    """Body of POST /tokenize: one of prompt, content and messages."""

    model: str | None = parameter("the model's name")
    prompt: str | None = parameter("the text")
    content: str | None = parameter("llama.cpp's name of prompt")
    messages: Messages | None = parameter("a conversation, through the chat template", "a list of messages")
    add_special_tokens: bool | None = parameter("a token that begins every text is added; absent: it is")
    add_special: bool | None = parameter("llama.cpp's name of add_special_tokens")
    parse_special: bool | None = parameter("text that spells a special token is that token; absent: it is")
    add_generation_prompt: bool | None = parameter("of messages: a turn of the assistant's is begun")
    tools: list[dict[str, Any]] | None = parameter(
        "of messages: JSON schemas of functions", "a list of tools"
    )
    chat_template_kwargs: dict[str, Any] | None = parameter("of messages: further variables of the template")
    return_token_strs: bool | None = parameter("the text of each token too")
    with_pieces: bool | None = parameter("llama.cpp's: tokens as objects with their text")


class DetokenizeRequest(_Strict):
    """Body of POST /detokenize."""

    model: str | None = parameter("the model's name")
    tokens: list[TokenId] | None = parameter("the ids", "a list of token ids")


class ChatRequest(_Common):
    """Body of POST /v1/chat/completions."""

    messages: Messages | None = parameter("the conversation", "a list of messages")
    max_completion_tokens: Limit | None = parameter("OpenAI's newer name of max_tokens")
    logprobs: bool | None = parameter("report the log-probability of each token of the answer")
    top_logprobs: Annotated[int, Field(ge=0, le=100), Whole] | None = parameter(
        "number of likeliest tokens to report; needs logprobs"
    )
    tools: list[dict[str, Any]] | None = parameter("JSON schemas of functions", "a list of tools")
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = parameter(
        "auto: the model decides; none: as without tools; required: calls alone; or one call of a function",
        '"auto", "none", "required", or an object {"type": "function", "function": {"name": NAME}}',
    )
    parallel_tool_calls: bool | None = parameter("false: the answer ends after one call")
    documents: list[dict[str, Any]] | None = parameter("texts to answer from", "a list of documents")
    continue_final_message: bool | str | None = parameter(
        "the answer continues the last message (or this field of it); absent: where that is an assistant's"
    )
    add_generation_prompt: bool | None = parameter(
        "a turn of the assistant's is begun; absent: unless the last message is continued"
    )
    reasoning_effort: Effort | None = parameter(
        "none: no thinking; all others: thinking",
        '"none" for no thinking, or "minimal" to "xhigh", which are all one',
    )
    enable_thinking: bool | None = parameter("thinking; the same as in chat_template_kwargs")
    chat_template_kwargs: dict[str, Any] | None = parameter("further variables of the chat template")
    reasoning_budget: Limit | None = parameter("the most tokens of thinking; -1: no limit")
    response_format: ResponseFormat | None = parameter(
        "the answer's form: text, json_object, or json_schema",
        'an object with type "text", "json_object" or "json_schema", the last with json_schema: {schema}',
    )
    modalities: Any = only("the answer's kind", ["text"])
    functions: Any = only("OpenAI's older name of tools", [])
    function_call: Any = only("the older tool_choice", "auto", "none")
