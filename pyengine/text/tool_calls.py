"""Tool calls in the text of an answer, in the two ways that this family writes them.

    <tool_call>                                        <tool_call>
    {"name": "weather", "arguments": {"day": 3}}       <function=weather>
    </tool_call>                                       <parameter=day>
                                                       3
                                                       </parameter>
                                                       </function>
                                                       </tool_call>

The left one is Qwen3's, the right one Qwen3-Coder's and Qwen3.5's.  A parameter's text on the right is a JSON
value, unless the tool's schema says that it is a string.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from .grammar import json_rule
from .thinking import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_FUNCTION = "<function="

Tools = list[dict[str, Any]]


class CallPart(NamedTuple):
    """A piece of the call `number`, from 0.

    name       of the call's first piece
    arguments  characters of a JSON object
    """

    number: int
    name: str | None
    arguments: str


class ToolCallText:
    """Splits an answer's characters, as they come, into text and pieces of calls.

    The text ends where the first call begins, without the white space between.  What looks like a call and is
    none stays text, where no call came before it.
    calls   number of calls that have begun
    """

    def __init__(self, tools: Tools):
        self.calls = self.complete = 0
        self._types = {name: _types(parameters) for name, parameters in _functions(tools)}
        self._held = ""
        self._inside: str | None = None  # None: text; "": a call of a kind not known yet; "json"; the name
        self._arguments = 0  # of the call that is read, so far

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """-> the characters of the text, and the pieces of calls, that are certain now."""
        self._held += text
        said = ""
        parts: list[CallPart] = []
        while True:
            before = self._inside, self._held
            if self._inside is None:
                said += self._text()
            elif self._inside == "":
                self._begin(parts)
            elif self._inside == "json":
                said += self._json(parts)
            else:
                self._parameters(parts)
            if before == (self._inside, self._held):
                return said, parts

    def flush(self) -> tuple[str, list[CallPart]]:
        """The rest, when nothing follows."""
        rest, self._held = self._held, ""
        if self.calls:
            return "", []
        return (rest if self._inside is None else OPEN + rest), []

    def _text(self) -> str:
        text, tag, rest = self._held.partition(OPEN)
        if tag:
            self._inside, self._held = "", rest
            return "" if self.calls else text.rstrip()
        end = len(text) - overlap(text, OPEN)
        end = len(text[:end].rstrip())
        self._held = text[end:]
        return "" if self.calls else text[:end]

    def _begin(self, parts: list[CallPart]) -> None:
        text = self._held.lstrip()
        if text.startswith(_FUNCTION):
            found = re.match(r"<function=([^>\n]+)>", text)
            if found:
                self._inside, self._held, self._arguments = found[1].strip(), text[found.end() :], 0
                parts.append(CallPart(self.calls, self._inside, ""))
                self.calls += 1
        elif text and not _FUNCTION.startswith(text):
            self._inside = "json"

    def _json(self, parts: list[CallPart]) -> str:
        """A whole call, or nothing yet: an argument may hold the closing tag too."""
        end = self._held.find(CLOSE)
        while end >= 0:
            call = _call(self._held[:end])
            if call:
                parts.append(CallPart(self.calls, *call))
                self.calls += 1
                self.complete += 1
                self._inside, self._held = None, self._held[end + len(CLOSE) :]
                return ""
            if not self._held[:end].lstrip().startswith("{"):
                said, self._held = OPEN + self._held[: end + len(CLOSE)], self._held[end + len(CLOSE) :]
                self._inside = None
                return "" if self.calls else said
            end = self._held.find(CLOSE, end + 1)
        return ""

    def _parameters(self, parts: list[CallPart]) -> None:
        found = re.match(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", self._held, re.DOTALL)
        if found:
            name = found[1].strip()
            types = self._types.get(self._inside or "", {}).get(name)
            pair = f"{json.dumps(name, ensure_ascii=False)}: {_value(found[2], types)}"
            self._add(parts, (", " if self._arguments else "{") + pair)
            self._arguments += 1
            self._held = self._held[found.end() :]
            return
        end = re.match(r"\s*(?:</function>\s*)?</tool_call>", self._held)
        if end:
            self._add(parts, "}" if self._arguments else "{}")
            self.complete += 1
            self._inside, self._held = None, self._held[end.end() :]

    def _add(self, parts: list[CallPart], arguments: str) -> None:
        parts.append(CallPart(self.calls - 1, None, arguments))


def _call(text: str) -> tuple[str, str] | None:
    """(name, arguments) of Qwen3's JSON, or None."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # some write the object as a text, as OpenAI's messages have it
        return call["name"], arguments
    return call["name"], json.dumps(arguments, ensure_ascii=False)


def _value(text: str, types: set[str] | None) -> str:
    """A parameter's text as JSON."""
    if types == {"string"}:
        return json.dumps(text, ensure_ascii=False)
    try:
        value = json.loads(text)
    except ValueError:
        return json.dumps(text, ensure_ascii=False)
    if types and "string" in types and not isinstance(value, (dict, list)) and value is not None:
        return json.dumps(text, ensure_ascii=False)  # a text that looks like a number
    return json.dumps(value, ensure_ascii=False)


def _functions(tools: Tools) -> list[tuple[str, dict[str, Any]]]:
    """(name, JSON schema of the parameters) of each."""
    functions = [tool.get("function", tool) for tool in tools]
    return [
        (function["name"], function.get("parameters") or {"type": "object", "properties": {}})
        for function in functions
        if isinstance(function, dict) and isinstance(function.get("name"), str)
    ]


def _types(schema: dict[str, Any]) -> dict[str, set[str]]:
    """The JSON types of each parameter, where its schema says them."""
    properties = schema.get("properties")
    found = {}
    for name, one in properties.items() if isinstance(properties, dict) else ():
        kinds = one.get("anyOf", [one]) if isinstance(one, dict) else []
        types: set[str] = set()
        for kind in kinds:
            said = kind.get("type") if isinstance(kind, dict) else None
            types.update([said] if isinstance(said, str) else said if isinstance(said, list) else [])
        if types:
            found[name] = types
    return found


# ---- calls that are demanded -----------------------------------------------------------------------


def grammar_of_calls(tools: Tools, template: str, most: int | None = None, name: str | None = None) -> str:
    """A Lark grammar, rule `answer`: one call or more of the tools, as the chat template writes calls.

    most: number of calls; name: the only tool.
    """
    functions = [one for one in _functions(tools) if name in (None, one[0])]
    again = "" if most == 1 else ' ("\\n" call)*'
    if _FUNCTION in template:
        rules = [_function_rules(i, *one) for i, one in enumerate(functions)]
        calls = " | ".join(f"function_{i}" for i in range(len(functions)))
        return (
            f'answer: call{again}\ncall: "{OPEN}\\n" ({calls}) "\\n{CLOSE}"\n'
            + "".join(rules)
            + r'text[suffix="\n</parameter>\n"]: /(?s:.*)/'
            + "\n"
        )
    objects = [
        {
            "type": "object",
            "properties": {"name": {"const": one}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for one, schema in functions
    ]
    schema = json_rule(objects[0] if len(objects) == 1 else {"anyOf": objects})
    return f'answer: call{again}\ncall: "{OPEN}\\n" body "\\n{CLOSE}"\nbody: %json {schema}\n'


def _function_rules(index: int, name: str, schema: dict[str, Any]) -> str:
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    items, rules = [], ""
    for j, (parameter, one) in enumerate(properties.items()):
        rule = f"parameter_{index}_{j}"
        items.append(rule if parameter in required else f"{rule}?")
        begin = json.dumps(f"<parameter={parameter}>\n", ensure_ascii=False)
        if isinstance(one, dict) and one.get("type") == "string" and "maxLength" in one:
            length = f"{{{one.get('minLength', 0)},{one['maxLength']}}}"
            rules += f'{rule}: {begin} /(?s:.{length})/ "\\n</parameter>\\n"\n'
        elif isinstance(one, dict) and one.get("type") == "string" and "enum" not in one:
            rules += f"{rule}: {begin} text\n"
        elif isinstance(one, dict) and one.get("type") == "string":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in one["enum"])
            rules += f'{rule}: {begin} ({texts}) "\\n</parameter>\\n"\n'
        else:
            rules += f'{rule}: {begin} value_{index}_{j} "\\n</parameter>\\n"\n'
            rules += f"value_{index}_{j}: %json {json_rule(one)}\n"
    begin = json.dumps(f"<function={name}>\n", ensure_ascii=False)
    return f'function_{index}: {begin} {" ".join(items)} "</function>"\n{rules}'
