"""Jobs in order of arrival, several at a time in one pass of the model."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import numpy as np

from ..text.generate import Generation
from ..text.model import TextModel
from ..text.prefixes import Prefixes, Reuse
from ..text.session import Session, advance_batch
from ..text.tokens import Token
from .errors import ApiError, closing

MOST_WAITING = 1024  # requests
JOIN_SECONDS = 0.5  # for the thread to end: a forward pass in the middle may take longer
SAVE_SECONDS = 60  # the same, where it writes its prefixes to a directory first
PROMPT_TOKENS_BESIDE_ANSWERS = 128  # per pass: what other answers wait for between two of their tokens

Event = tuple[int, Token | None] | Exception | None


class Job:
    """Generations of one client, and their events.

    events   (index, Token), (index, None) at the end of each, an error, and None at the end of all
    """

    def __init__(self, generations: list[Generation]):
        self.generations, self.cancelled = generations, False
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.started = self.ended = 0  # generations: in the queue's thread
        self.reuse: list[Reuse] = []  # of each generation that has started
        self._loop = asyncio.get_running_loop()

    def cancel(self) -> None:
        self.cancelled = True
        for generation in self.generations:
            generation.cancel()

    def fail(self, error: Exception) -> None:
        """End it with an error, now."""
        self.cancel()
        self.put(error)
        self.put(None)

    def put(self, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class _Running:
    """A generation that is computed.  wanted: the ids to compute next."""

    def __init__(self, job: Job, index: int, session: Session):
        self.job, self.index, self.session = job, index, session
        self.generation = job.generations[index]
        self.wanted: np.ndarray | None = None

    @property
    def in_prompt(self) -> bool:
        return not self.generation.tokens


class JobQueue:
    """A thread that runs jobs in the order of their arrival, `parallel` generations at a time.

    Every pass of the model computes the next token of each answer that has begun, and pieces of the prompts
    of the others: whole pieces while nobody waits for a token, and small ones otherwise, in turn.  No
    answer's bits depend on the others.

    waiting   number of jobs before their turn;  running  the jobs that are being computed
    """

    def __init__(self, model: TextModel, prefixes: Prefixes, parallel: int = 1) -> None:
        self.model, self.prefixes, self.parallel = model, prefixes, parallel
        self._jobs: list[Job] = []  # not all of whose generations have started
        self._alive: set[Job] = set()  # waiting or running
        self._runs: list[_Running] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._stopped = False

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(not job.started for job in self._jobs)

    @property
    def running(self) -> list[Job]:
        return list(dict.fromkeys(run.job for run in tuple(self._runs)))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._serve, name="pyengine-jobs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more jobs, and end all that there are with an error.  Waits for nothing."""
        with self._changed:
            self._closed, jobs = True, list(self._alive)
        for job in jobs:
            job.fail(closing())

    def stop(self) -> None:
        """Close, and end the thread, unless it is in the middle of a long forward pass."""
        self.close()
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread:
            self._thread.join(SAVE_SECONDS if self.prefixes.directory else JOIN_SECONDS)

    def add(self, job: Job) -> None:
        """Errors: ApiError, status 503."""
        if self.waiting >= MOST_WAITING:
            raise ApiError(
                f"{MOST_WAITING} requests are waiting already",
                status=503,
                code="overloaded",
                kind="server_error",
            )
        with self._changed:
            if self._closed:
                raise closing()
            self._alive.add(job)
            self._jobs.append(job)
            self._changed.notify()

    # ---- the thread ----

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._runs or self._stopped):
                    self._changed.wait()
                if self._stopped:
                    break
            self._start_generations()
            self._compute(self._next_pass())
        self.prefixes.close()

    def _start_generations(self) -> None:
        """As many as there is room for, in order of arrival."""
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            while not job.cancelled and job.started < len(job.generations) and self._has_room_for(job):
                self._start(job)
            if job.cancelled:
                self._leave(job)
            elif job.started == len(job.generations):
                with self._changed:
                    self._jobs.remove(job)

    def _has_room_for(self, job: Job) -> bool:
        """Equal prompts begin one after the other, so that the second finds what the first has computed."""
        ids = job.generations[job.started].prompt_ids
        return len(self._runs) < self.parallel and not any(
            run.in_prompt and np.array_equal(run.generation.prompt_ids, ids) for run in self._runs
        )

    def _start(self, job: Job) -> None:
        index, job.started = job.started, job.started + 1
        generation = job.generations[index]
        try:
            shared = slice(0) if generation.wants_every else slice(None)
            session, reuse = self.prefixes.take(generation.prompt_ids[shared])
        except Exception as error:  # no memory
            job.put(error)
            job.cancel()
            return
        generation.compute_in(session)
        job.reuse.append(reuse)
        run = _Running(job, index, session)
        self._runs.append(run)
        self._step(run, None)

    def _leave(self, job: Job) -> None:
        """None of the job's other generations is started."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
            if not any(run.job is job for run in self._runs):
                self._alive.discard(job)
                job.put(None)

    def _next_pass(self) -> list[_Running]:
        """The generations whose wanted ids are computed together."""
        answers = [run for run in self._runs if not run.in_prompt]
        prompts = [run for run in self._runs if run.in_prompt]
        if not answers:
            return prompts[:1]
        room, chosen = PROMPT_TOKENS_BESIDE_ANSWERS, []
        for run in prompts:
            if run.wanted is not None and (not chosen or len(run.wanted) <= room):
                chosen.append(run)
                room -= len(run.wanted)
        return [*answers, *chosen]

    def _compute(self, runs: list[_Running]) -> None:
        work = [
            (run.session, run.wanted, run.generation.wants_every, run.generation.wants_largest)
            for run in runs
            if run.wanted is not None
        ]
        for run, logits in zip(runs, advance_batch(self.model, work)):
            if run.in_prompt and run in self._runs:  # prompts take turns
                self._runs.remove(run)
                self._runs.append(run)
            self._step(run, logits)

    def _step(self, run: _Running, logits: np.ndarray | Exception | None) -> None:
        """Take the logits of what was wanted, up to the next ids that are wanted, or to the end."""
        busy = len(self._runs) > 1
        run.generation.piece = PROMPT_TOKENS_BESIDE_ANSWERS if busy else Generation.piece
        try:
            if isinstance(logits, Exception):
                raise logits
            step = run.generation.next_step(logits)
            while isinstance(step, Token):
                run.job.put((run.index, step))
                step = run.generation.next_step()
        except Exception as error:
            run.job.put(error)
            run.job.cancel()
            step = None
        run.wanted = step
        if step is None:
            self._end(run)

    def _end(self, run: _Running) -> None:
        job = run.job
        self._runs.remove(run)
        self.prefixes.give_back(run.session)
        job.put((run.index, None))
        job.ended += 1
        if job.cancelled:
            self._leave(job)
        elif job.ended == len(job.generations):
            with self._changed:
                self._alive.discard(job)
            job.put(None)
