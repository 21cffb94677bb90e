"""Checkpoints that chat: a golden one with a template in the manner of this family."""

from gguf.constants import GGUFValueType
from paths import GOLDEN
from rewrite import rewrite

from pyengine.files.gguf import GGUF
from pyengine.text.gguf_vocabulary import CONTROL, UNUSED

# Thinking as Qwen3.5 has it: the answer begins inside the tag, or behind an empty pair of them, and
# earlier answers are written with their thinking.  Tools, refusals, macros, namespaces, the date.
FAMILY = """\
{%- set seen = namespace(user=false) -%}
{%- macro turn(role, body) -%}
{{ '<|im_start|>' ~ role ~ '\\n' ~ body ~ '<|im_end|>\\n' }}
{%- endmacro -%}
{%- if tools %}
{{- '<|im_start|>system\\nTools:\\n' }}
    {%- for tool in tools %}
{{- tool | tojson ~ '\\n' }}
    {%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('no such role: ' ~ message.role) }}
    {%- endif %}
    {%- if message.role == 'user' %}{% set seen.user = true %}{% endif %}
    {%- if message.role != 'assistant' %}
{{- turn('user' if message.role == 'tool' else message.role, message.content | trim) }}
        {%- continue %}
    {%- endif %}
    {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
{{- '<|im_start|>assistant\\n<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' ~ call.function.name }}
        {%- for name, value in call.function.arguments | items %}
{{- ' ' ~ name ~ '=' ~ (value | tojson if value is mapping else value) }}
        {%- endfor %}
{{- '</tool_call>' }}
    {%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if not seen.user %}{{ raise_exception('nobody asks') }}{% endif %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
    {%- else %}
{{- '<think>\\n' }}
    {%- endif %}
{%- endif %}"""

MODEL = GOLDEN / "pattern31.gguf"


def with_template(path, template=FAMILY, special_tags=False, **sampling):
    """The golden model with another chat template, and general.sampling.* where given.

    special_tags: the thinking tags are two special tokens of the vocabulary.
    """
    values = {"tokenizer.chat_template": (template, GGUFValueType.STRING)}
    if special_tags:
        values |= _special_tags()
    for name, value in sampling.items():
        kind = GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.INT32
        values[f"general.sampling.{name}"] = (value, kind)
    return rewrite(MODEL, path, metadata=values)


def _special_tags():
    metadata = GGUF.open(MODEL).metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = metadata["tokenizer.ggml.token_type"].tolist()
    for tag in ("<think>", "</think>"):
        place = tokens.index(tag) if tag in tokens else types.index(UNUSED)
        tokens[place], types[place] = tag, CONTROL
    return {
        "tokenizer.ggml.tokens": (tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": (types, GGUFValueType.ARRAY, GGUFValueType.INT32),
    }


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}
