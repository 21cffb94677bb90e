"""Renders a chat template, as a process of its own: `python chat_sandbox.py SECONDS`, by chat.py.

A template is code that came with a file.  It runs in jinja2's immutable sandbox, in a process that
has MEMORY bytes of address space, and that the system ends (SIGPROF) when a rendering takes more than
SECONDS of processor time, so that neither a loop without end nor a text without end reaches the
engine.  It is processor time and no clock's: a busy machine refuses nobody.

Lines of JSON: the template comes first, as a string; then each request is a list of objects, the
variables of one rendering each, and each answer {"texts": [...]} or {"error": kind, "message": ...}.
"""

import functools
import json
import signal
import sys
from datetime import datetime

MEMORY = 1 << 30  # bytes
LONGEST = 1 << 26  # characters of all texts of an answer


class Refused(Exception):
    """What a template says with `raise_exception`."""


@functools.cache
def environment():
    """jinja2's, with what Hugging Face's `apply_chat_template` gives to templates."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):
            # jinja2's own prints as nothing, and would let a try that came to nothing pass.
            raise jinja2.exceptions.SecurityError(
                f"access to {attribute!r} of a {type(obj).__name__} is unsafe")

    class Namespace(jinja2.utils.Namespace):
        def __init__(*args, **names):
            for name in names:
                _check_name(name)
            jinja2.utils.Namespace.__init__(*args, **names)

        def __setitem__(self, name, value):
            _check_name(name)
            super().__setitem__(name, value)

    def _check_name(name):
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with {name!r} is unsafe")

    # The whitespace rules and the loop controls are Hugging Face's; templates are written for them.
    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = _tojson
    env.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now,
                    "namespace": Namespace}
    # What draws at random: but for the date, the same conversation must be the same text.
    del env.globals["lipsum"], env.filters["random"]
    return env


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # jinja2's own escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def _raise_exception(message):
    raise Refused(str(message))


def _strftime_now(format):
    return datetime.now().strftime(format)


def render(template, requests) -> dict:
    """A compiled template and the variables of each rendering -> an answer."""
    from jinja2.exceptions import SecurityError

    try:
        texts, room = [], LONGEST
        for variables in requests:
            pieces = []
            for piece in template.generate(**variables):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    return _error("limit", f"more than {LONGEST} characters")
            texts.append("".join(pieces))
        return {"texts": texts}
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


def compile_template(source):
    """-> (compiled template, None) or (None, an answer)."""
    try:
        return environment().from_string(source), None
    except MemoryError:
        return None, _error("limit", f"more than {MEMORY >> 20} MiB")
    except Exception as error:  # syntax, or nested too deep for Python's own compiler
        return None, _error("syntax", error)


def _error(kind, message):
    return {"error": kind, "message": " ".join(str(message).split())[:400]}


def _limit_memory():
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # a system without: the time limit remains
        pass


def main(seconds):
    _limit_memory()
    source = json.loads(sys.stdin.readline())
    signal.setitimer(signal.ITIMER_PROF, seconds)  # nobody handles its signal: the process ends
    template, fault = compile_template(source)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = fault or render(template, json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its trace.py and others would stand before Python's own
    main(float(sys.argv[1]))
