"""The command in a pseudo-terminal."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time


class Terminal:
    """pyengine in a pseudo-terminal."""

    def __init__(self, arguments, cwd, term="dumb", path=""):
        """path: a folder whose modules come before all others."""
        parent, child = pty.openpty()
        environment = {**os.environ, "TERM": term, "INPUTRC": "/dev/null"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyengine", *arguments],
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(child)
        self.fd, self.seen = parent, ""

    def expect(self, pattern, seconds=60):
        """Everything up to where the pattern is found."""
        deadline, regex = time.monotonic() + seconds, re.compile(pattern)
        while not (found := regex.search(self.seen)):
            assert select.select([self.fd], [], [], max(0, deadline - time.monotonic()))[0], self.seen[-2000:]
            try:
                self.seen += os.read(self.fd, 1 << 16).decode("utf-8", "replace").replace("\r\n", "\n")
            except OSError:  # the other end is closed
                assert regex.search(self.seen), self.seen[-2000:]
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def say(self, line, until=r"\n> $"):
        self.type(line + "\n")
        self.expect(re.escape(line) + r"\r?\n")  # the echo
        return self.expect(until)

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self, pattern):
        """Ctrl-C at the prompt, again if need be: CPython does not see the signal that comes between
        its printing of the prompt and its wait for a line."""
        for _ in range(60):
            self.type("\x03")
            if select.select([self.fd], [], [], 1)[0]:
                time.sleep(0.2)
                return self.expect(pattern)
        raise AssertionError(self.seen[-2000:])


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C is a signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background job would ignore
