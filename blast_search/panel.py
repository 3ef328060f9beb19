"""Plans judged in this process or, where that pays, by many Ray workers at once.

Each worker holds the dense model and what fits its layers (judge.py), loaded once.  Nothing is
timed by them, so several share one machine's cores; they are gone before anything is timed.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from blast_search import cluster
from blast_search.deadline import FOREVER, Deadline
from blast_search.judge import Judge, Question
from blast_search.modes import float32_products, set_float32_products
from blast_search.progress import Reporter

# Seconds of work ahead from which on workers are started.  On two busy cores they needed half a
# minute (Ray, PyTorch, the model), and two processes of one thread are little faster than one of
# two: with 45 s here, 36 probes took 87 s instead of about 40.
PAYS = 180.0
START_SECONDS = 120.0
RESTARTS = 2  # of a worker, and attempts at a question

OnAnswer = Callable[[int, list[float]], None]


class Worker:
    """What runs in a Ray worker.

    The judge comes as bytes, because its model may be of a module to which only the driver's path
    leads; and with every question, because a worker that is started again has lost it.
    """

    def __init__(self, path: list[str], threads: int, float32: str) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        torch.set_num_threads(threads)
        set_float32_products(float32)
        self.judge: Judge | None = None

    def losses(self, judge: list[Any], question: Question | None) -> list[float]:
        """Answers a question; None: only loads the judge.

        Args:
            judge: Ray's reference to the pickled judge, in a list so that Ray does not fetch it.
        """
        import ray

        if self.judge is None:
            self.judge = ray.cloudpickle.loads(ray.get(judge[0]))
        return self.judge.losses(question) if question else []


@dataclass
class Panel:
    """Where a run's plans are judged.

    Attributes:
        ray: Ray workers may be used; else everything happens in this process.
        device: the fingerprint of the run's device; only nodes that have it take part.
    """

    judge: Judge
    report: Reporter
    ray: bool = False
    ray_address: str | None = None
    device: str = ""
    device_type: str = "cpu"
    dtype: str = "float32"
    _workers: list[Any] = field(default_factory=list)
    _judge: list[Any] = field(default_factory=list)  # Ray's reference to it
    _stack: ExitStack | None = None
    _ahead: int = 0  # questions that are expected in this session
    _asked: int = 0
    _seconds: float = 0.0  # that they took in this process

    @contextmanager
    def session(self, questions: int) -> Iterator[None]:
        """Within it, workers are started where the expected number of questions is worth it."""
        self._ahead, self._asked, self._seconds = questions, 0, 0.0
        with ExitStack() as self._stack:
            try:
                yield
            finally:
                self._stack, self._workers, self._judge = None, [], []

    def ask(
        self, questions: Sequence[Question], on_answer: OnAnswer, deadline: Deadline = FOREVER
    ) -> None:
        """Have plans judged; answers arrive in any order.

        Args:
            on_answer: told the question's index and its losses (see Judge.losses).
            deadline: once it has passed, no further question is begun.
        """
        waiting = deque(range(len(questions)))
        while waiting and not deadline.expired():
            if not self._workers and self._worth_it():
                self._start()
            if self._workers:
                self._spread(questions, waiting, on_answer, deadline)
                continue
            index, began = waiting.popleft(), time.monotonic()
            losses = self.judge.losses(questions[index])
            self._seconds += time.monotonic() - began
            self._asked += 1
            on_answer(index, losses)

    def _worth_it(self) -> bool:
        if not (self.ray and self._stack and self._asked):
            return False
        return (self._ahead - self._asked) * self._seconds / self._asked > PAYS

    def _start(self) -> None:
        """Start one worker per GPU, or as many per node as its cores and memory allow."""
        import ray

        assert self._stack
        with ExitStack() as stack:
            try:
                stack.enter_context(cluster.attached(self.ray_address))
                found = cluster.places(self.device, self.dtype, self.device_type, lambda _: None)
                seats = cluster.seats(found.nodes, self.device_type)
                if len(seats) < 2:  # no more than this process is
                    self.ray = False
                    return
                self._judge = [ray.put(ray.cloudpickle.dumps(self.judge))]
                workers = [
                    _placed(seat).remote(sys.path, seat.threads, float32_products())
                    for seat in seats
                ]
                loaded = [worker.losses.remote(self._judge, None) for worker in workers]
                ray.get(loaded, timeout=START_SECONDS)
            except Exception as error:  # whatever it is, this process can do the work
                self._alone(error)
                return
            self._workers = workers
            self._stack.push(stack.pop_all())
        self.report.say(f"plans are judged by {len(seats)} Ray workers")

    def _spread(
        self,
        questions: Sequence[Question],
        waiting: deque[int],
        on_answer: OnAnswer,
        deadline: Deadline,
    ) -> None:
        """Hand questions to the workers; on an error they go back to `waiting`."""
        import ray

        free, running = deque(self._workers), dict[Any, tuple[Any, int]]()
        while (waiting and not deadline.expired()) or running:
            while waiting and free and not deadline.expired():
                worker, index = free.popleft(), waiting.popleft()
                running[worker.losses.remote(self._judge, questions[index])] = worker, index
            (done, *_), _ = ray.wait(list(running), num_returns=1)
            worker, index = running.pop(done)
            try:
                losses = ray.get(done)
            except ray.exceptions.RayError as error:
                # Also an error of the model's: it is raised again, as itself, in this process.
                waiting.extendleft([i for _, i in running.values()] + [index])
                self._alone(error)
                return
            on_answer(index, losses)
            free.append(worker)

    def _alone(self, error: Exception) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker)  # what it still computes would only slow this process
        self.ray, self._workers = False, []
        cause = " ".join(str(error).split())[:200]
        self.report.say(f"plans are judged in this process: Ray's workers failed ({cause})")


def _placed(seat: cluster.Seat) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return ray.remote(Worker).options(
        **seat.resources, max_restarts=RESTARTS, max_task_retries=RESTARTS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(seat.node, soft=False),
    )  # fmt: skip
