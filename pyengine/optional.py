"""Packages that an extra installs: imported when they are needed, with one message where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import InputError

DISTRIBUTION = "pyengine-lm"  # the name on the package index; `pyengine` there is another project


def require(module: str, *, extra: str, what: str, package: str | None = None) -> ModuleType:
    """The imported module, for instance "jinja2" or "starlette.routing".

    extra    the extra of pyproject.toml that installs the module
    what     the part of pyengine that needs the module; the message begins with it
    package  the name of the module's distribution; None: the first part of the module's name
    Errors: InputError where the module is not installed, or where its import fails.
    """
    package = package or module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module + ".").startswith(error.name + "."):
            raise InputError(f"{what}: want the package {package}: {advice(extra)}") from None
        problem: Exception = error
    except Exception as error:  # of a stranger's module: a library of its own that does not load, as a rule
        problem = error
    raise InputError(
        f"{what}: want the package {package}, got one whose import fails: {problem}"
    ) from problem


def advice(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
