"""A request's body to what it asks for: prompts, options of a generation, the kind of its answer."""

from __future__ import annotations

import json
import secrets
from typing import Any

from ..seed import SEED
from ..text.options import GenerationOptions
from .answers import ChatCompletion, Completion
from .body import agreed, checked
from .errors import ApiError
from .requests import ChatRequest, CompletionRequest, ResponsesRequest, ToolChoice
from .responses import ResponseAnswer, chat_of

DEFAULT_TOKENS = 16  # of a completion: OpenAI's


class Asked:
    """A request, read.

    prompts  one or more;  prompt  the parameter that holds them
    kind     of its answer
    seed     of the first choice
    """

    def __init__(
        self,
        fields: CompletionRequest | ChatRequest,
        prompts: list[Any],
        prompt: str,
        options: GenerationOptions,
        kind: type[Completion],
    ):
        self.fields, self.prompts, self.prompt, self.options, self.kind = (
            fields,
            prompts,
            prompt,
            options,
            kind,
        )
        seed = options.sampling.get("seed", SEED)
        self.seed: int = secrets.randbelow(1 << 31) if seed == -1 else seed


class Reader:
    """Bodies of requests to what they ask for.  Errors of all methods: ApiError, or an option's InputError.

    name      of the model that is served
    defaults  options of requests that leave them open
    """

    def __init__(self, name: str, defaults: GenerationOptions):
        self.name, self.defaults = name, defaults

    def check_name(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise ApiError(f"model: want {self.name!r}, got {name!r}", "model", 404, "model_not_found")

    def completion(self, body: dict[str, Any]) -> Asked:
        fields: CompletionRequest = checked(body, CompletionRequest)
        if fields.prompt is None:
            raise ApiError("prompt: want text or token ids, got none", "prompt")
        prompt = fields.prompt
        many = isinstance(prompt, list) and not isinstance(prompt[0], int)
        options = self._options(fields).updated(
            max_tokens=_given(agreed(fields, "max_tokens", "n_predict"), DEFAULT_TOKENS),
            logprobs=fields.logprobs,
            prompt_logprobs=_most(fields.logprobs if fields.echo else None, fields.prompt_logprobs),
            special=bool(fields.parse_special),
            reasoning="auto",
            reasoning_budget=None,
        )
        return Asked(fields, list(prompt) if many else [prompt], "prompt", options, Completion)

    def chat(self, body: dict[str, Any]) -> Asked:
        fields: ChatRequest = checked(body, ChatRequest)
        if fields.messages is None:
            raise ApiError("messages: want a list of messages, got none", "messages")
        if fields.top_logprobs and not fields.logprobs:
            raise ApiError("top_logprobs: want logprobs to be true with it", "top_logprobs")
        limit = agreed(fields, "max_completion_tokens", "max_tokens", "n_predict")
        options = self._options(fields).updated(
            max_tokens=_given(limit, self.defaults.max_tokens),
            logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
            prompt_logprobs=fields.prompt_logprobs,
            reasoning=_reasoning(fields, self.defaults.reasoning),
            reasoning_budget=_given(fields.reasoning_budget, self.defaults.reasoning_budget),
            documents=fields.documents,
            continue_final_message=fields.continue_final_message,
            add_generation_prompt=fields.add_generation_prompt,
            **_tools(fields),
        )
        return Asked(fields, [fields.messages], "messages", options, ChatCompletion)

    def response(self, body: dict[str, Any]) -> Asked:
        asked = self.chat(chat_of(checked(body, ResponsesRequest)))
        asked.kind, asked.prompt = ResponseAnswer, "input"
        return asked

    def _options(self, fields: CompletionRequest | ChatRequest) -> GenerationOptions:
        """The options that both kinds have."""
        self.check_name(fields.model)
        if fields.min_tokens and fields.stop:
            raise ApiError("min_tokens: want it without stop: nothing else is done here", "min_tokens")
        if fields.stream and fields.prompt_logprobs is not None:
            raise ApiError("prompt_logprobs: want it without stream, got both", "prompt_logprobs")
        bias = fields.logit_bias
        sampling = dict(
            temperature=fields.temperature,
            top_p=fields.top_p,
            top_k=0 if fields.top_k == -1 else fields.top_k,
            min_p=fields.min_p,
            seed=fields.seed,
            repetition_penalty=agreed(fields, "repeat_penalty", "repetition_penalty"),
            presence_penalty=fields.presence_penalty,
            frequency_penalty=fields.frequency_penalty,
            penalty_last_n=fields.repeat_last_n,
            logit_bias=None if bias is None else {int(i): value for i, value in bias.items()},
        )
        given = {name: value for name, value in sampling.items() if value is not None}
        return self.defaults.updated(
            guided=_form(fields),
            min_tokens=fields.min_tokens or 0,
            stop=() if fields.stop is None else fields.stop,
            stop_ids=fields.stop_token_ids or (),
            ignore_end=bool(fields.ignore_eos),
            **given,
        )


def _most(*counts: int | None) -> int | None:
    return max((count for count in counts if count is not None), default=None)


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _form(fields: CompletionRequest | ChatRequest) -> dict[str, Any] | None:
    """The answer's form, from whichever of its names.  Errors: ApiError where there are two."""
    forms: dict[str, dict[str, Any]] = {}
    if fields.structured_outputs is not None:
        forms["structured_outputs"] = {k: v for k, v in fields.structured_outputs.items() if v is not None}
    names = {"json_schema": "json", "grammar": "grammar"}
    names |= {f"guided_{kind}": kind for kind in ("json", "regex", "choice", "grammar")}
    for name, kind in names.items():
        value = getattr(fields, name)
        if value is not None:
            forms[name] = {kind: _schema(name, value) if kind == "json" else value}
    asked = getattr(fields, "response_format", None)
    if asked is not None and asked.type == "json_object":
        forms["response_format"] = {"json": asked.schema_ or {"type": "object"}}
    elif asked is not None and asked.type == "json_schema":
        if asked.json_schema is None:
            raise ApiError("response_format: want json_schema with it, got none", "response_format")
        forms["response_format"] = {"json": asked.json_schema.schema_}
    for name in list(forms)[1:]:
        raise ApiError(f"{name}: want one form of the answer, got {next(iter(forms))} too", name)
    return next(iter(forms.values()), None)


def _schema(name: str, value: dict[str, Any] | str) -> dict[str, Any]:
    """vLLM takes a text too."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise ApiError(f"{name}: want a JSON schema, got {value[:100]!r}", name) from None
    if not isinstance(value, dict):
        raise ApiError(f"{name}: want a JSON schema, got {json.dumps(value)[:100]}", name)
    return value


def _tools(fields: ChatRequest) -> dict[str, Any]:
    """The tools, and the template's other variables; tool_choice "none": no tools in either."""
    choice = fields.tool_choice
    if choice != "none":
        one = isinstance(choice, ToolChoice) or fields.parallel_tool_calls is False
        named = choice.function.name if isinstance(choice, ToolChoice) else choice
        if not fields.tools and named not in (None, "auto"):
            raise ApiError(f"tool_choice: want tools with it, got {named!r} without", "tool_choice")
        return dict(
            tools=fields.tools,
            tool_calls=(named or "auto") if fields.tools else None,
            most_tool_calls=1 if fields.tools and one else None,
            template_options=fields.chat_template_kwargs,
        )
    variables = {k: v for k, v in (fields.chat_template_kwargs or {}).items() if k != "tools"}
    return dict(tools=None, template_options=variables or None)


def _reasoning(fields: ChatRequest, default: str) -> str:
    """The request's wish, from whichever of its names; the server's where it has none."""
    wishes = {
        "reasoning_effort": None if fields.reasoning_effort is None else fields.reasoning_effort != "none",
        "enable_thinking": fields.enable_thinking,
        "chat_template_kwargs": (fields.chat_template_kwargs or {}).get("enable_thinking"),
    }
    given = {name: value for name, value in wishes.items() if value is not None}
    for name, value in given.items():
        first = next(iter(given))
        if bool(value) != bool(given[first]):
            words = "thinking" if given[first] else "no thinking"
            raise ApiError(f"{name}: want {words}, as {first} has it, got {json.dumps(value)[:100]}", name)
    plain = [value for name, value in given.items() if name != "chat_template_kwargs"]
    if plain:
        return "on" if plain[0] else "off"
    return "auto" if given else default
