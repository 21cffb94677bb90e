"""Real chat templates, conversations for them, and tokenizers whose special tokens they write."""

import functools
import re
from datetime import datetime
from pathlib import Path

from chat_models import assistant, user
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from pyengine.text.gguf_vocabulary import BYTE_OF_CHARACTER
from pyengine.text.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent.parent / "text" / "templates"
PROMPTS = TEMPLATES / "prompts.json"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}

# What templates of these models write as control tokens; <think>, <tool_call> and the like are not.
_SPECIAL = re.compile(r"<[|｜][^<>\s'\"{}+]{1,40}[|｜]>|</?s>|\[/?[A-Z_]{3,}\]|\[gMASK\]|<sop>")
# Phi joins these of their halves and the role.
_JOINED = [f"<|{role}|>" for role in ("system", "user", "assistant", "tool", "end")]


@functools.cache
def source(name):
    return (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def special_texts(name):
    found = dict.fromkeys([*_SPECIAL.findall(source(name)), *_JOINED, *TOKENS.values()])
    return tuple(found)


def backend(special=(), added=("<think>", "</think>", "<tool_call>", "</tool_call>")):
    """Bytes, special tokens, and added ones that are not special."""
    library = Backend(models.BPE(vocab=dict(BYTE_OF_CHARACTER), merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    library.add_tokens([AddedToken(text, normalized=False) for text in added])
    return library


@functools.cache
def tokenizer(name):
    library = backend(special_texts(name))
    return Tokenizer(library, library.get_vocab_size())


def undated(text):
    """Today's date as one word: templates print it."""
    for form in ("%Y-%m-%d", "%d %B %Y", "%B %d, %Y", "%d %b %Y"):
        text = text.replace(datetime.now().strftime(form), "TODAY")
    return text


# ---- conversations -----------------------------------------------------------------------------


def system(text):
    return {"role": "system", "content": text}


def call(name, arguments, number=0):
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, number=0, name="weather"):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": name, "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather <b>now</b> & "soon"',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "né 东京"},
                    "days": {"type": "integer", "enum": [1, 2]},
                },
                "required": ["city"],
            },
        },
    }
]
PARIS = {"city": "Paris", "days": 2, "more": {"a": [1.5, None, True], "é": "<x>"}}
ASKS = [user("weather?"), assistant("", tool_calls=[call("weather", PARIS)])]

# name: (messages, what else apply_chat_template gets)
CONVERSATIONS = {
    "one": ([user("hi")], {}),
    "system": ([system("be brief"), user(" hi \n")], {}),
    "developer": ([{"role": "developer", "content": "be brief"}, user("hi")], {}),
    "turns": ([system("S"), user("a\n\nb "), assistant("c"), user("d"), assistant(" e\n"), user("f")], {}),
    "unicode": ([user("né 东京 👩‍👧 \u202eabc e\u0301"), assistant("مرحبا"), user("<b>&amp;'\"</b>")], {}),
    "reasoning": ([user("a"), assistant("b", reasoning_content="\nwhy\n"), user("c")], {}),
    "reasoning alias": ([user("a"), assistant("b", reasoning="why"), user("c")], {}),
    "thinking inside": ([user("a"), assistant("<think>\nwhy\n</think>\n\nb"), user("c")], {}),
    "thinking off": ([user("a")], {"enable_thinking": False}),
    "thinking on": ([user("a")], {"enable_thinking": True}),
    "history": ([user("a"), assistant("b")], {"add_generation_prompt": False}),
    "tools": ([system("S"), user("weather?")], {"tools": TOOLS}),
    "tool result": ([*ASKS, result('{"t": 20}')], {"tools": TOOLS}),
    "tool turns": ([*ASKS, result("20"), assistant("It is 20."), user("thanks")], {"tools": TOOLS}),
    "two calls": (
        [
            user("both?"),
            assistant("Yes.", tool_calls=[call("weather", {"city": "A"}), call("weather", {"city": "B"}, 1)]),
            result("1"),
            result("2", 1),
        ],
        {"tools": TOOLS},
    ),
    "null content": ([user("a"), assistant(None, tool_calls=[call("weather", {})]), result("20")], {}),
    "null fields": ([user("a"), assistant("b", tool_calls=None, name=None), user("c")], {}),
    "documents": ([user("a")], {"documents": [{"doc_id": 1, "title": "T", "text": "x <y>"}]}),
    "continued": ([user("a"), assistant("The sky is ")], {"continue_final_message": True}),
    "long": ([user("word " * 300)], {}),
    "no user": ([system("S"), assistant("a")], {}),
    "options": ([user("a")], {"bos_token": "<B>", "preserve_thinking": True, "thinking": True}),
}


def arguments_of_transformers(more):
    """The keywords of `apply_chat_template` for `ChatTemplate.render`'s."""
    ask = not more.get("continue_final_message")
    return {"add_generation_prompt": ask, **more}
