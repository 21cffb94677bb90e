"""A tool, a chat template that shows tools, and a call as a model writes it."""

from chat_models import with_template

import pyengine

NAME = "small"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 9},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
MESSAGES = [{"role": "user", "content": "How is it in Ur?"}]
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <function= {% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARAMETERS = "<parameter=city>\nUr\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
CALL = f"<tool_call>\n<function=weather>\n{PARAMETERS}</function>\n</tool_call>"


def new_model(path):
    return pyengine.load(with_template(path, TEMPLATE), threads=1)
