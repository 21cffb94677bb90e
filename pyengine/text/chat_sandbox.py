"""Renders a chat template, as a process of its own: `python chat_sandbox.py SECONDS`, by chat.py.

A template is code that comes with a file.  It runs in jinja2's immutable sandbox, in a process with
MEMORY bytes of address space.  The system ends the process (SIGPROF) when a rendering takes more than
SECONDS of processor time, so infinite loops and infinite output are stopped.  Processor time is limited,
not wall time, so a busy machine causes no failures.

The process reads and writes lines of JSON.  The first line is an object: the templates by name.  Each
further line is a request: a list of renderings {"template": name, "variables": {...}, "written": {...}}.
`written` has further variables, whose texts are written in the sense of template_text.py.  An answer is
{"texts": [...], "written": [[[start, stop], ...], ...]}, which gives the runs of written characters of
each text, or {"error": kind, "message": ...}.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import types
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Compiled = tuple[Any, None] | tuple[None, dict[str, Any]]  # a template of jinja2, or an answer

if TYPE_CHECKING or __package__:
    from . import template_text
else:  # the process: this folder is searched last, since its module names would hide Python's own
    sys.path.append(sys.path.pop(0))
    import template_text

MEMORY = 1 << 30  # bytes
LONGEST = 1 << 26  # characters of all texts of an answer

# Some templates spell control tokens as `'<|' + message.role + '|>'`.  A request may choose between these
# roles anyway, so they are written; any other role is a text of the request.
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Refused(Exception):
    """A template called `raise_exception`."""


@functools.cache
def environment() -> Any:
    """jinja2's, with what Hugging Face's `apply_chat_template` gives to templates."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

    # To mypy, whatever comes from jinja2 is Any: see pyproject.toml.
    class Environment(ImmutableSandboxedEnvironment):  # type: ignore[misc]
        code_generator_class = _code_generator()
        concat = staticmethod(template_text.concat)
        literal = staticmethod(functools.lru_cache(1 << 14)(template_text.written))

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # jinja2's default renders as empty and hides the attempt.
            kind = "str" if isinstance(obj, template_text.TemplateText) else type(obj).__name__
            raise jinja2.exceptions.SecurityError(f"access to {attribute!r} of a {kind} is unsafe")

        def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
            # A text of the request into which the template puts its own texts: their origin is kept.
            if isinstance(obj, types.BuiltinMethodType) and obj.__name__ in ("replace", "join"):
                text = obj.__self__
                if type(text) is str:
                    obj = getattr(template_text.foreign(text), obj.__name__)
            return super().call(context, obj, *args, **kwargs)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            text = getattr(value, "__self__", None)
            if wrapped is None or not isinstance(text, template_text.TemplateText):
                return wrapped

            def wrapper(*args: Any, **kwargs: Any) -> str:
                if value.__name__ == "format_map":
                    wrapped(*args, **kwargs)  # which checks the arguments
                    kwargs, args = args[0], ()
                formatter = Formatter(self)
                return formatter.tracked(text, args, kwargs)

            return functools.update_wrapper(wrapper, value)

    class Formatter(SandboxedFormatter):  # type: ignore[misc]
        def tracked(self, text: template_text.TemplateText, args: tuple[Any, ...], kwargs: Any) -> str:
            self._fields: list[str] = []
            plain = str.__str__(text)
            result: str = self.vformat(plain, args, kwargs)
            parsed = list(self.parse(plain))
            if any("{" in (specification or "") for _, _, specification, _ in parsed):
                return result
            fields = iter(self._fields)
            literals = [""]
            values: list[str] = []
            for literal, name, _, _ in parsed:
                literals[-1] += literal
                if name is not None:
                    values.append(next(fields))
                    literals.append("")
            return template_text.formatted(text, result, literals, values)

        def format_field(self, value: Any, specification: str) -> str:
            text: str = super().format_field(value, specification)
            self._fields.append(template_text.within(text, value))
            return text

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc]
        def __init__(*args: Any, **names: Any) -> None:
            self, args = args[0], args[1:]
            names = dict(*args, **names)
            for name in names:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, names)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name: object) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with {name!r} is unsafe")

    # The whitespace rules and the extensions are Hugging Face's; templates are written for them.
    env = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), "jinja2.ext.loopcontrols"]
    )
    env.filters |= {"tojson": _tojson, **_filters()}
    env.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": Namespace,
    }
    # No randomness: the same conversation must give the same text, except for the date.
    del env.globals["lipsum"], env.filters["random"]
    return env


def _code_generator() -> type:
    """jinja2's code generator, but the strings of a template's source become written `TemplateText`."""
    import markupsafe
    from jinja2.compiler import CodeGenerator, optimizeconst

    brackets: dict[type, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), set: ("{", "}")}

    def source(value: Any) -> str:
        if type(value) is str:
            return f"environment.literal({value!r})"
        if type(value) in (list, tuple, set):
            inner = "".join(source(item) + "," for item in value)
            left, right = brackets[type(value)]
            return f"{left}{inner}{right}" if value or type(value) is not set else "set()"
        if type(value) is dict:
            return "{" + "".join(f"{source(k)}:{source(v)}," for k, v in value.items()) + "}"
        if type(value) is markupsafe.Markup:
            return f"environment.filters['safe']({source(str.__str__(value))})"
        return str(value) if isinstance(value, float) else repr(value)

    class Generator(CodeGenerator):  # type: ignore[misc]
        def visit_Const(self, node: Any, frame: Any) -> None:
            self.write(source(node.as_const(frame.eval_ctx)))

        def visit_TemplateData(self, node: Any, frame: Any) -> None:
            self.write(source(str(node.as_const(frame.eval_ctx))))

        def _output_const_repr(self, group: Iterable[Any]) -> str:
            return source("".join(group))

        @optimizeconst  # type: ignore[untyped-decorator]
        def visit_Concat(self, node: Any, frame: Any) -> Any:
            if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
                return super().visit_Concat(node, frame)
            self.write("environment.concat(map(str, (")
            for part in node.nodes:
                self.visit(part, frame)
                self.write(", ")
            self.write(")))")

    return Generator


def _generation_tag() -> type:
    """`{% generation %}` renders its body.  The body is a scope of its own, as in Hugging Face."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):  # type: ignore[misc]
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_generation"), [], [], body).set_lineno(line)

        def _generation(self, caller: Callable[[], Any]) -> Any:
            return caller()

    return GenerationTag


def _filters() -> dict[str, Any]:
    """jinja2's filters that join texts, but the texts keep their origins."""
    import markupsafe
    from jinja2 import filters, pass_environment, pass_eval_context

    class Safe(markupsafe.Markup):
        _text: str

        def __new__(cls, base: Any = "", *args: Any) -> Safe:
            self = super().__new__(cls, base, *args)
            self._text = base if isinstance(base, template_text.TemplateText) else str.__str__(self)
            return self

        def __str__(self) -> str:
            return self._text

        def __iter__(self) -> Iterator[str]:
            return iter(self._text)

        def __add__(self, other: Any) -> Any:
            return Safe._joined(super().__add__(other), (self, other))

        def __radd__(self, other: Any) -> Any:
            return Safe._joined(super().__radd__(other), (other, self))

        @staticmethod
        def _joined(value: Any, parts: Iterable[Any]) -> Any:
            if value is NotImplemented:
                return value
            parts = [str(p) if hasattr(p, "__html__") else template_text.escaped(p) for p in parts]
            return Safe(template_text.checked(str.__str__(value), parts))

    @pass_eval_context  # type: ignore[untyped-decorator]
    def join(eval_ctx: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
        if not eval_ctx.autoescape:
            d = template_text.foreign(str(d))
        return filters.do_join(eval_ctx, value, d, attribute)

    @pass_eval_context  # type: ignore[untyped-decorator]
    def replace(eval_ctx: Any, s: Any, old: Any, new: Any, count: Any = None) -> Any:
        if not eval_ctx.autoescape:
            s = template_text.foreign(str(s))
        return filters.do_replace(eval_ctx, s, old, new, count)

    def title(s: Any) -> str:
        text = filters.soft_str(s)
        return template_text.in_place(filters.do_title(s), text)

    @pass_environment  # type: ignore[untyped-decorator]
    def wordwrap(environment: Any, s: Any, *args: Any, **kwargs: Any) -> str:
        return template_text.respaced(filters.do_wordwrap(environment, s, *args, **kwargs), s)

    return {"join": join, "replace": replace, "safe": Safe, "title": title, "wordwrap": wordwrap}


def _tojson(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    # jinja2's own escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> NoReturn:
    raise Refused(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


# ---- a rendering -------------------------------------------------------------------------------


def render(template: Any, requests: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A compiled template and the variables of each rendering -> an answer."""
    return _guarded(lambda: _texts([(template, variables) for variables in requests]))


def answer(templates: dict[str, Compiled], requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Compiled templates by name, and a request's renderings -> an answer."""
    for one in requests:
        if (fault := templates[one["template"]][1]) is not None:
            return fault
    return _guarded(lambda: _texts([(templates[one["template"]][0], _variables(one)) for one in requests]))


def _variables(rendering: dict[str, Any]) -> dict[str, Any]:
    written = {name: template_text.written(text) for name, text in rendering["written"].items()}
    variables: dict[str, Any] = written | rendering["variables"]
    for message in variables["messages"]:
        if message["role"] in ROLES:
            message["role"] = template_text.written(message["role"])
    return variables


def _texts(renderings: Iterable[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    texts: list[str] = []
    spans: list[list[list[int]]] = []
    room = LONGEST
    for template, variables in renderings:
        pieces: list[str] = []
        for piece in template.generate(variables):
            pieces.append(piece)
            room -= len(piece)
            if room < 0:
                return _error("limit", f"more than {LONGEST} characters")
        text = template_text.concat(pieces)
        texts.append(text)
        spans.append(template_text.written_spans(text))
    return {"texts": texts, "written": spans}


def _guarded(rendering: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    from jinja2.exceptions import SecurityError

    try:
        return rendering()
    except Refused as error:
        return _error("refused", error)
    except SecurityError as error:
        return _error("unsafe", error)
    except MemoryError:
        return _error("limit", f"more than {MEMORY >> 20} MiB")
    except RecursionError:
        return _error("limit", "calls nested too deep")
    except Exception as error:  # a template can raise whatever Python can
        return _error("failed", f"{type(error).__name__}: {error}")


def compile_template(source: str) -> Compiled:
    """-> (compiled template, None) or (None, an answer)."""
    try:
        return environment().from_string(source), None
    except MemoryError:
        return None, _error("limit", f"more than {MEMORY >> 20} MiB")
    except Exception as error:  # syntax, or nested too deep for Python's own compiler
        return None, _error("syntax", error)


def _error(kind: str, message: object) -> dict[str, Any]:
    return {"error": kind, "message": " ".join(str(message).split())[:400]}


# ---- the process -------------------------------------------------------------------------------


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # a system without: the time limit remains
        pass


def _read(line: str) -> tuple[Any, dict[str, Any] | None]:
    try:
        return json.loads(line), None
    except RecursionError:
        return None, _error("nested", "values nested too deep")


def main(seconds: float) -> None:
    _limit_memory()
    sources = json.loads(sys.stdin.readline())
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal: the process ends
    templates = {name: compile_template(source) for name, source in sources.items()}
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        requests, fault = _read(line)
        sys.stdout.write(json.dumps(fault or answer(templates, requests)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
