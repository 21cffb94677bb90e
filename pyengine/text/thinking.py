"""An answer, split into thinking and text."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"


# ---- answers -----------------------------------------------------------------------------------


class ThinkingText:
    """Splits an answer's characters, as they come, into (thinking, text).  The tags and the line ends
    around the tags belong to neither.

    thinking   whether the last character is inside the tags
    """

    def __init__(self, thinking: bool):
        self.thinking = thinking
        self._begun = thinking  # an answer may also begin with the tag itself
        self._fresh = thinking  # nothing but line ends since a tag
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """-> the characters of each that are certain now."""
        text, self._held = self._held + text, ""
        thought = ""
        if not self._begun:
            text = self._begin(text)
        if self.thinking:
            thought, text = self._think(text)
        return thought, self._trim(text)

    def flush(self) -> tuple[str, str]:
        """The rest, when nothing follows."""
        rest, self._held, self._begun = self._held, "", True
        return (self._trim(rest.rstrip("\n")), "") if self.thinking else ("", rest)

    def _begin(self, text: str) -> str:
        """Held back until it is known whether the answer begins with the tag."""
        start = text.lstrip("\n ")
        if len(start) < len(OPEN) and OPEN.startswith(start):
            self._held = text
            return ""
        self._begun = True
        if not start.startswith(OPEN):
            return text
        self.thinking = self._fresh = True
        return start[len(OPEN) :]

    def _think(self, text: str) -> tuple[str, str]:
        """-> thinking, and the text behind it."""
        thought, tag, rest = text.partition(CLOSE)
        if not tag:
            thought = text[: len(text) - overlap(text, CLOSE)].rstrip("\n")
            self._held = text[len(thought) :]
            return self._trim(thought), ""
        thought = self._trim(thought.rstrip("\n"))
        self.thinking, self._fresh = False, True
        return thought, rest

    def _trim(self, text: str) -> str:
        """Without the line ends that follow a tag."""
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


def overlap(text: str, stop: str) -> int:
    """How many of the text's last characters begin, but are not all of, the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
