"""Writes tests/text/templates/prompts.json: what transformers' `apply_chat_template` renders of the
conversations of tests/support/chat_cases.py with each template there; null where it refuses.

    python tools/golden/make_chat_prompts.py        (needs the golden extra)
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tests" / "support"))

from chat_cases import (
    CONVERSATIONS,
    NAMES,
    PROMPTS,
    TOKENS,
    arguments_of_transformers,
    backend,
    source,
    undated,
)
from transformers import PreTrainedTokenizerFast


def prompt(name, messages, more):
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend(), chat_template=source(name), **TOKENS)
    try:
        text = theirs.apply_chat_template(messages, tokenize=False, **arguments_of_transformers(more))
    except Exception:  # whatever a template or transformers raises
        return None
    return undated(text)


def main():
    prompts = {
        name: {title: prompt(name, *conversation) for title, conversation in CONVERSATIONS.items()}
        for name in NAMES
    }
    PROMPTS.write_text(json.dumps(prompts, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
