"""A model that says what a test wants: its own tokenizer, template and states, and logits of a script."""

import numpy as np


def scripted(model, answer):
    """model, whose every answer is the text: the next token has the greatest logit by far.

    answer: a text, or a function of the prompt's text, which must be computed as a whole (no cached prefix).
    """
    tokenizer, forward = model.tokenizer, model.forward
    end = tokenizer.end_ids[0]

    def logits_after(ids, state):
        if len(ids) > 1 or not hasattr(
            state, "script"
        ):  # a piece of a prompt; the script follows the last one
            state.prompt = getattr(state, "prompt", "") + tokenizer.decode(ids)
            text = answer(state.prompt) if callable(answer) else answer
            state.script = [*tokenizer.encode(text, special=True), end]
            state.begin = state.position
        spoken = state.position - state.begin
        row = np.zeros(model.config.vocab_size, np.float32)
        row[state.script[min(spoken, len(state.script) - 1)]] = 50
        return row

    def spoken(ids, state=None, *, last_only=False, **options):
        forward(ids, state, last_only=True, **options)
        return logits_after(ids, state)[None]

    model.forward = spoken
    model.forward_batch = lambda sequences, *, last_only: [spoken(ids, state) for ids, state in sequences]
    return model
