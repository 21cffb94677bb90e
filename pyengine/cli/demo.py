"""demo: the embedded model, end to end."""

from __future__ import annotations

from .options import new_command


def add_commands(commands):
    new_command(
        commands,
        "demo",
        _demo,
        "Show the embedded model, end to end: quantize, continue a prompt, check the bits.",
    )


def _demo(options):
    from ..demo.demo import demo

    return 0 if demo(print) else 1
