"""The bodies of an answer, whole or in chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from ..text.answer import AnswerTokens
from ..text.generate import Generation
from ..text.model import TextModel
from ..text.tokens import PromptToken, Token
from ..text.tool_calls import CallPart

Body = dict[str, Any]


class Completion:
    """The bodies of an answer to a completion, as a whole or in chunks.

    seed  of the first choice: choice i of a prompt has seed + i
    """

    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"
    last_line = "data: [DONE]\n\n"  # of a stream

    def __init__(self, model: TextModel, name: str, generations: list[Generation], request: Any, seed: int):
        self.generations, self.tokenizer = generations, model.tokenizer
        self.n = request.n or 1
        # A number of a completion, 0 too; true or false of a chat.
        self.wants_logprobs = request.logprobs is not None and request.logprobs is not False
        self.echoes = bool(getattr(request, "echo", False))
        self.wants_prompt = request.prompt_logprobs
        streams = request.stream_options
        self.include_usage = bool(streams and streams.include_usage)
        self.usage_so_far = bool(self.include_usage and streams.continuous_usage_stats)
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
            "seed": seed,
        }
        self.records: list[list[Body]] = [[] for _ in generations]  # logprobs, one per token
        self.lengths = [0] * len(generations)  # characters of text so far
        self.prompts: dict[int, str] = {}  # of choices, where the answer has them already
        self.counts = [0] * len(generations)  # tokens so far
        self.thought = [0] * len(generations)  # those of them that are thinking

    def take(self, index: int, token: Token) -> Body | None:
        """Note a token -> the logprobs that became certain with it."""
        self._echo(index)
        records = [self.record(index, token)] if self.wants_logprobs else []
        self.records[index] += records
        self.lengths[index] += len(token.text)
        self._count(index, token)
        return self._logprobs(records) if records else None

    def finish(self, index: int) -> Body | None:
        """Note the end of a choice -> the logprobs that were held back."""
        return None

    def _echo(self, index: int) -> tuple[str, Body | None]:
        """The prompt's text and logprobs, where they are wanted and not in the answer yet."""
        if not self.echoes or index in self.prompts:
            return "", None
        generation, records, text = self.generations[index], [], ""
        stream = self.tokenizer.stream()
        for i, token_id in enumerate(generation.prompt_ids):
            if self.wants_logprobs:
                records.append(self._prompt_record(generation.prompt[i], len(text)))
            text += stream.push(int(token_id))
        text += stream.flush()
        self.prompts[index] = text
        self.records[index] += records
        self.lengths[index] += len(text)
        return text, self._logprobs(records) if records else None

    def _prompt_record(self, token: PromptToken, offset: int) -> Body:
        top = None if token.logprob is None else {self.spelled(i): logprob for i, logprob in token.top}
        return {
            "tokens": self.spelled(token.id),
            "token_logprobs": token.logprob,
            "top_logprobs": top,
            "text_offset": offset,
        }

    def prompt_logprobs(self, index: int) -> Body:
        """vLLM's field, where it was asked for."""
        if self.wants_prompt is None:
            return {}
        found: list[Body | None] = []
        for token in self.generations[index].prompt:
            if token.logprob is None:
                found.append(None)
                continue
            ranked = {
                i: (rank, logprob) for rank, (i, logprob) in enumerate(token.top[: self.wants_prompt], 1)
            }
            ranked.setdefault(token.id, (token.rank, token.logprob))
            found.append(
                {
                    str(i): {"logprob": logprob, "rank": rank, "decoded_token": self.spelled(i)}
                    for i, (rank, logprob) in ranked.items()
                }
            )
        return {"prompt_logprobs": found}

    def _count(self, index: int, token: Token) -> None:
        self.counts[index] += 1
        self.thought[index] += bool(token.place and token.place.thinking)

    def whole(self) -> Body:
        return {
            **self.head,
            "object": self.object,
            "usage": self.usage(),
            "choices": [self.choice(i) for i in range(len(self.generations))],
        }

    def chunk(self, choices: list[Body], **more: Any) -> Body:
        usage = {"usage": self.usage() if self.usage_so_far else None} if self.include_usage else {}
        return {**self.head, "object": self.chunk_object, "choices": choices, **usage, **more}

    def last_chunk(self) -> Body:
        """With the counts of the whole answer."""
        return self.chunk([], usage=self.usage())

    def usage(self) -> Body:
        """Counts of tokens so far; a prompt counts once, however many choices were asked for."""
        prompts = self.generations[:: self.n]
        prompt, completion = sum(g.prompt_tokens for g in prompts), sum(self.counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(g.cached_tokens for g in prompts)},
            "completion_tokens_details": {"reasoning_tokens": sum(self.thought)},
        }

    def begin(self) -> Iterator[Body]:
        """The chunks before the first token."""
        return iter(())

    # ---- of completions ----

    def choice(self, index: int) -> Body:
        generation = self.generations[index]
        self._echo(index)
        text = self.prompts.get(index, "")
        logprobs = self._logprobs(self.records[index]) if self.wants_logprobs else None
        choice = self._choice(index, text + generation.text, logprobs, generation.finish_reason)
        return choice | self.prompt_logprobs(index)

    def _echo_chunk(self, index: int) -> Iterator[Body]:
        text, logprobs = self._echo(index)
        if text or logprobs:
            yield self.chunk([self._choice(index, text, logprobs, None)])

    def delta(self, index: int, token: Token) -> Iterator[Body]:
        """The chunks of a token."""
        yield from self._echo_chunk(index)
        logprobs = self.take(index, token)
        if token.text or logprobs:
            yield self.chunk([self._choice(index, token.text, logprobs, None)])

    def end(self, index: int) -> Iterator[Body]:
        """The last chunks of a choice."""
        yield from self._echo_chunk(index)
        logprobs, reason = self.finish(index), self.generations[index].finish_reason
        yield self.chunk([self._choice(index, "", logprobs, reason)])

    def _choice(self, index: int, text: str, logprobs: Body | None, finish_reason: str | None) -> Body:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, records: list[Body]) -> Body:
        keys = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        return {key: [record[key] for record in records] for key in keys}

    def record(self, index: int, token: Token) -> Body:
        return {
            "tokens": self.spelled(token.id),
            "token_logprobs": token.logprob,
            "top_logprobs": {self.spelled(i): logprob for i, logprob in token.top},
            "text_offset": self.lengths[index],
        }

    def spelled(self, token_id: int) -> str:
        """A token's text; as OpenAI has it, bytes:\\xe2\\x82 for bytes that are not whole characters."""
        raw = self.tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatCompletion(Completion):
    """The bodies of an answer to a chat.

    logprobs.content holds the tokens of message.content, whose bytes, joined, are that text;
    logprobs.reasoning_content holds those of the thinking, tags and the line ends around them included.
    """

    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, model: TextModel, name: str, generations: list[Generation], request: Any, seed: int):
        super().__init__(model, name, generations, request, seed)
        self.greeted: set[int] = set()  # choices whose role has been sent
        self.thoughts: list[list[Body]] = [[] for _ in generations]  # logprobs of the thinking
        self.sorted = [AnswerTokens(self.tokenizer) for _ in generations]

    def take(self, index: int, token: Token) -> Body | None:
        self._count(index, token)
        return self._note(index, *self.sorted[index].push(token)) if self.wants_logprobs else None

    def finish(self, index: int) -> Body | None:
        return self._note(index, *self.sorted[index].flush()) if self.wants_logprobs else None

    def _note(self, index: int, thinking: list[Token], text: list[tuple[Token, bytes]]) -> Body | None:
        thoughts = [self._record(token, self.tokenizer.token_bytes(token.id)) for token in thinking]
        content = [self._record(token, raw) for token, raw in text]
        self.thoughts[index] += thoughts
        self.records[index] += content
        return self._logprobs(content, thoughts) if content or thoughts else None

    def choice(self, index: int) -> Body:
        generation = self.generations[index]
        calls = generation.tool_calls
        message: Body = {"role": "assistant", "content": generation.text, "refusal": None}
        if calls:
            message["content"] = generation.text or None
            message["tool_calls"] = [self._call(index, i, **call) for i, call in enumerate(calls)]
        if generation.thinking:
            message["reasoning_content"] = generation.thinking
        logprobs = self._logprobs(self.records[index], self.thoughts[index]) if self.wants_logprobs else None
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._reason(index),
        }

    def _call(self, index: int, number: int, name: str, arguments: str) -> Body:
        function = {"name": name, "arguments": arguments}
        return {"id": self._call_id(index, number), "type": "function", "function": function}

    def _call_id(self, index: int, number: int) -> str:
        """The same in a stream and as a whole."""
        return f"call_{self.head['id'].rpartition('-')[2]}_{index}_{number}"

    def _reason(self, index: int) -> str | None:
        reason = self.generations[index].finish_reason
        return "tool_calls" if reason == "stop" and self.generations[index].tool_calls else reason

    def whole(self) -> Body:
        return super().whole() | self.prompt_logprobs(0)

    def delta(self, index: int, token: Token) -> Iterator[Body]:
        logprobs = self.take(index, token)
        yield from self._greet(index)
        texts = {"content": token.text, "reasoning_content": token.thinking}
        delta: Body = {key: text for key, text in texts.items() if text}
        if token.calls:
            delta["tool_calls"] = [self._call_delta(index, part) for part in token.calls]
        if delta or logprobs:
            yield self._delta(index, delta, logprobs)

    def end(self, index: int) -> Iterator[Body]:
        yield from self._greet(index)
        yield self._delta(index, {}, self.finish(index), self._reason(index))

    def _call_delta(self, index: int, part: CallPart) -> Body:
        if part.name is None:
            return {"index": part.number, "function": {"arguments": part.arguments}}
        return {"index": part.number, **self._call(index, part.number, part.name, part.arguments)}

    def _greet(self, index: int) -> Iterator[Body]:
        if index not in self.greeted:
            self.greeted.add(index)
            yield self._delta(index, {"role": "assistant", "content": ""})

    def _delta(
        self, index: int, delta: Body, logprobs: Body | None = None, finish_reason: str | None = None
    ) -> Body:
        return self.chunk(
            [{"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}]
        )

    def _logprobs(self, records: list[Body], thoughts: list[Body] | None = None) -> Body:
        thinking = {"reasoning_content": thoughts} if thoughts else {}
        return {"content": records, "refusal": None, **thinking}

    def _record(self, token: Token, raw: bytes) -> Body:
        return self._entry(raw, token.logprob) | {
            "top_logprobs": [self._entry(self.tokenizer.token_bytes(i), logprob) for i, logprob in token.top]
        }

    def _entry(self, raw: bytes, logprob: float) -> Body:
        return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}
