"""The thread that owns a session's models: answers wait, enter a batch of their model when it has room, and leave.

The thread waits for more where there is none to generate: a new one would have to start torch's own threads anew.
"""

import logging
import threading
from collections import deque
from collections.abc import Mapping

from smolvlm_exp.deploy.session.answer import Answer
from smolvlm_exp.deploy.session.runner import ModelRunner, describe

log = logging.getLogger(__name__)

PREFILL_TOKENS = 8192  # of prompts that are read together
PATIENCE = 5.0  # seconds that `close` waits for the model
IDLE = 60.0  # seconds without an answer after which the thread ends


class Scheduler:
    def __init__(self, runners: Mapping[bool, ModelRunner], lock: threading.Lock, rows: int) -> None:
        """
        Args:
            runners: by `Answer.base`; they take turns, a step each.
            lock: the runners' too.
            rows: answers that are generated at a time, by all of them.
        """
        self.runners, self.lock, self.rows = runners, lock, rows
        self.waiting, self.closed = deque[Answer](), False
        self.arrived = threading.Condition(lock)
        self.thread: threading.Thread | None = None

    @property
    def active(self) -> list[Answer]:
        return [answer for runner in self.runners.values() for answer in runner.active]

    def submit(self, answer: Answer) -> None:
        with self.lock:
            if not self.closed:
                self.waiting.append(answer)
                self.arrived.notify()
                if self.thread is None:
                    self.thread = threading.Thread(target=self.work, name="answers", daemon=True)
                    self.thread.start()
                return
        answer.end("stopped")

    def close(self) -> None:
        """Stop all answers, those to come too, and wait for the model's step to end."""
        with self.lock:
            self.closed, thread = True, self.thread
            for answer in (*self.waiting, *self.active):
                answer.stop()
            self.arrived.notify()
        if thread:
            thread.join(PATIENCE)

    def work(self) -> None:
        while True:
            with self.lock:
                if not (self.waiting or self.active):
                    self.arrived.wait_for(lambda: self.waiting or self.closed, IDLE)
                    if not self.waiting:
                        self.thread = None
                        return
            for runner in self.runners.values():
                try:
                    if runner.active or self.is_next(runner):
                        runner.prepare()
                        runner.enter(self.next_answers(runner))
                        runner.advance()
                except Exception as error:
                    log.exception("generating answers failed")
                    self.abandon(runner, error)

    def is_next(self, runner: ModelRunner) -> bool:
        """Whether the answer that waited longest is for this runner."""
        return bool(self.waiting) and self.runners[self.waiting[0].base] is runner

    def abandon(self, runner: ModelRunner, error: Exception) -> None:
        """End a runner's active answers after an error of their batch; where there was none, those that wait for it."""
        with self.lock:
            failed = [*runner.active] or [answer for answer in self.waiting if self.runners[answer.base] is runner]
            self.waiting = deque(answer for answer in self.waiting if answer not in failed)
            runner.active, runner.begun = [], None
        runner.free()
        for answer in failed:
            if not answer.ended:
                answer.end("stopped", describe(error))

    def next_answers(self, runner: ModelRunner) -> list[Answer]:
        """Those that waited longest, up to one for another runner: as there is room for, and a prefill's tokens."""
        chosen, tokens = list[Answer](), 0
        with self.lock:
            stopped = [answer for answer in self.waiting if answer.stopping.is_set()]
            for answer in stopped:
                self.waiting.remove(answer)
            active = len(self.active)
            while self.is_next(runner) and active + len(chosen) < self.rows:
                tokens += self.waiting[0].prompt_tokens
                if chosen and tokens > PREFILL_TOKENS:
                    break
                if not runner.fits([*chosen, self.waiting[0]]):
                    if chosen or active:
                        break
                    for each in self.runners.values():  # what earlier answers needed is set aside still
                        each.free()
                chosen.append(self.waiting.popleft())
        for answer in stopped:
            answer.end("stopped")
        return chosen
