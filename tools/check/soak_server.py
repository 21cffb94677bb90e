#!/usr/bin/env python3
"""Many clients at `pyengine serve` for some minutes: memory stays flat, states are freed, no answer is wrong.

    tools/check/soak_server.py --minutes 30 --clients 50

The server is a process of its own on a loopback address, with the embedded model.  Each client sends requests
one after the other: chats that go on, completions, log-probabilities of prompts, forms, streams; some clients
leave in the middle.  Each answer is compared with the first one to the same request.
Exit code 1: an error, an answer that differs, a request that does not end, or, in a run of ten minutes or
more, memory that grows.  (Before that the memory for prefixes fills.)
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

SEED = 1729
GROWTH = 0.1  # of the memory, from the first quarter of the time to the last
VERSES = ["And the LORD said", "In the beginning", "Who is Moses?", "Blessed are the poor", "The end"]


class Soak:
    """counts: by what happened;  faults: lines;  memory: MiB of the server, one per second"""

    def __init__(self, address: str, seconds: float):
        self.address, self.end = address, time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.memory: list[float] = []
        self._answers: dict[str, str] = {}
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        draw = random.Random(SEED + number)
        talk: list[dict] = []
        while time.monotonic() < self.end and len(self.faults) < 20:
            path, body = self._request(draw, talk)
            if draw.random() < 0.15:
                self._leave(path, body, draw)
                continue
            answer = self._ask(path, body)
            if answer is None:
                continue
            if "messages" in body:
                talk += [body["messages"][-1], {"role": "assistant", "content": answer}]
                del talk[: max(0, len(talk) - 6)]
            with self._lock:
                self.counts["answers"] += 1
                key = json.dumps([path, body], sort_keys=True)
                if self._answers.setdefault(key, answer) != answer:
                    self.faults.append(f"another answer to {key[:200]}")

    def _request(self, draw: random.Random, talk: list[dict]) -> tuple[str, dict]:
        body: dict = {
            "max_tokens": draw.randint(1, 24),
            "seed": draw.randrange(3),
            "temperature": draw.choice([0, 1]),
        }
        kind = draw.random()
        if kind < 0.5:
            said = {"role": "user", "content": draw.choice(VERSES)}
            return "/v1/chat/completions", body | {"messages": [*(talk if draw.random() < 0.7 else []), said]}
        body["prompt"] = " ".join(draw.choices(VERSES, k=draw.randint(1, 20)))
        if kind < 0.6:
            body |= {"echo": True, "logprobs": 1}
        elif kind < 0.7:
            body |= {"guided_regex": "[a-z ]{1,20}"}
        elif kind < 0.8:
            body |= {"n": 2}
        return "/v1/completions", body

    def _post(self, path: str, body: dict):
        request = urllib.request.Request(self.address + path, json.dumps(body).encode())
        return urllib.request.urlopen(request, timeout=300)

    def _ask(self, path: str, body: dict) -> str | None:
        try:
            with self._post(path, body) as answer:
                choices = json.load(answer)["choices"]
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            if "context_length_exceeded" in text:
                return None
            self.faults.append(f"{path}: {error.code} {text[:300]}")
            return None
        except OSError as error:
            self.faults.append(f"{path}: {error}")
            return None
        return "|".join(one["text"] if "text" in one else one["message"]["content"] for one in choices)

    def _leave(self, path: str, body: dict, draw: random.Random) -> None:
        try:
            with self._post(path, body | {"stream": True, "max_tokens": 200}) as answer:
                answer.read(draw.randrange(1, 2000))
            self.counts["left"] += 1
        except OSError as error:
            self.faults.append(f"{path}: {error}")

    def watch(self, process: subprocess.Popen) -> None:
        while time.monotonic() < self.end:
            status = Path(f"/proc/{process.pid}/status").read_text()
            self.memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024)
            time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--parallel", type=int, default=8)
    options = parser.parse_args()
    command = [
        sys.executable,
        "-m",
        "pyengine",
        "serve",
        "-m",
        "default",
        "--port",
        "0",
        "-np",
        str(options.parallel),
    ]
    # Not in the folder it was called from: a clone's sources would stand before the package.
    process = subprocess.Popen(
        [*command, "--cache-memory", "64M"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=tempfile.gettempdir(),
    )
    try:
        address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
        soak = Soak(address, options.minutes * 60)
        threads = [threading.Thread(target=soak.client, args=[i]) for i in range(options.clients)]
        threads.append(threading.Thread(target=soak.watch, args=[process]))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 60
        while (health := _health(address))["running"] or health["waiting"]:
            if time.monotonic() > deadline:
                soak.faults.append(f"requests that do not end: {health}")
                break
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait()
    quarter = max(1, len(soak.memory) // 4)
    first, last = (
        sorted(part)[len(part) // 2] for part in (soak.memory[quarter : 2 * quarter], soak.memory[-quarter:])
    )
    if options.minutes >= 10 and last > first * (1 + GROWTH):
        soak.faults.append(f"memory grew from {first:.0f} to {last:.0f} MiB")
    print(f"{soak.counts['answers']} answers, {soak.counts['left']} clients left, {len(soak.faults)} faults")
    print(f"memory: {first:.0f} MiB in the second quarter of the time, {last:.0f} MiB in the last (medians)")
    for fault in soak.faults:
        print(fault)
    return 1 if soak.faults else 0


def _health(address: str) -> dict:
    with urllib.request.urlopen(f"{address}/health") as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
