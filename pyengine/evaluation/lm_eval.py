"""lm-evaluation-harness on the engine itself, without a server between: `pyengine lm-eval`.

The numbers are those of the harness's own client, `local-completions`, on `pyengine serve`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..probabilities import log_softmax
from ..progress import progress
from ..text.model import TextModel
from ..text.thinking import CLOSE

MAX_GENERATED = 256  # tokens, where a task does not say it: the harness's own default


class PyengineLM(TemplateLM):
    """A model that `pyengine.load` returned, as the harness wants it.

    max_length  the context: one token more than context and continuation may have together, as the harness's
                own client counts; a longer context loses its beginning
    Requests with one context compute it once.  As everywhere in the harness, text that spells a special token
    is that token.
    """

    def __init__(self, model: TextModel, max_length: int | None = None):
        super().__init__()
        self.model, self.max_length = model, (max_length or model.context) - 1
        self.max_gen_toks = MAX_GENERATED

    # ---- tokens ----

    @property
    def eot_token_id(self) -> int:
        return int(self.model.tokenizer.end_ids[0])

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self.model.checkpoint.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens:
            return self.model.tokenizer.encode_prompt(string, special=True)
        return self.model.tokenizer.encode(string, special=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template:
            return None
        name = "default" if chat_template is True else chat_template
        return self.model.chat_template.sources[name]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        asked = {} if add_generation_prompt else {"continue_final_message": True}
        return self.model.chat_template.prompt(self.model.tokenizer, chat_history, **asked).text

    # ---- scores ----

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        cut = [_last(context, continuation, self.max_length) for _, context, continuation in requests]
        order = sorted(range(len(requests)), key=lambda i: cut[i][0])
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        bar = progress(len(requests), "scored", " continuations")
        for context, indices in itertools.groupby(order, key=lambda i: cut[i][0]):
            self._score_all(context, list(indices), cut, found, bar)
        bar.close()
        for (key, *_), score in zip(requests, found):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, score)
        return found

    def _score_all(self, context: list[int], indices: list[int], cut: list, found: list, bar: Any) -> None:
        """The continuations of one context."""
        state = self.model.new_state()
        first = self.model.forward(context, state, last_only=True)
        mark = state.mark()
        for i in indices:
            continuation = cut[i][1]
            logits = first
            if len(continuation) > 1:
                state.rewind(mark)
                logits = np.concatenate([first, self.model.forward(continuation[:-1], state)])
            logs = [log_softmax(row) for row in logits]
            score = sum(float(row[token]) for row, token in zip(logs, continuation))
            greedy = all(row[token] == row.max() for row, token in zip(logs, continuation))
            found[i] = score, greedy
            bar.update(1)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length - 1, context_len=1
            )
            pieces = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(score for score, _ in self._loglikelihood_tokens(pieces, disable_tqdm=True))
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    # ---- answers ----

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found = []
        bar = progress(len(requests), "answered", " prompts")
        for context, given in (request.args for request in requests):
            options = dict(given)
            end = self.model.tokenizer.decode([self.eot_token_id])
            until = handle_stop_sequences(options.pop("until", None), eos=end)
            tokens = options.pop("max_gen_toks", self.max_gen_toks)
            if not options.pop("do_sample", options.get("temperature", 0) > 0):
                options["temperature"] = 0
            ids = self.tok_encode(context)[-max(self.max_length - tokens, 1) :]
            text = self.model.generate(ids, tokens, stop=[one for one in until if one != end], **options).text
            answer = postprocess_generated_text(text, stop=until, think_end_token=CLOSE)
            found.append(answer)
            self.cache_hook.add_partial("generate_until", (context, given), answer)
            bar.update(1)
        bar.close()
        return found


def _last(context: list[int], continuation: list[int], most: int) -> tuple[list[int], list[int]]:
    """As much of their end as there is room for."""
    whole = (context + continuation)[-most:]
    return whole[: len(whole) - len(continuation)], continuation
