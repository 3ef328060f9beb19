"""Plans judged here and by real Ray workers: one answer each, whoever dies on the way."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from toy import ToyTask

from blast_search import cluster, fitting, panel
from blast_search.calibrate import collect_grams
from blast_search.deadline import Deadline
from blast_search.errors import IncompatibleInputError
from blast_search.fitting import Fitter
from blast_search.judge import BROKEN, Judge, Question
from blast_search.latency import describe, fingerprint
from blast_search.layers import Workload, inventory
from blast_search.panel import Panel
from blast_search.progress import Reporter
from blast_search.space import Candidate, SearchSpace


class Sayings(Reporter):
    def __init__(self) -> None:
        super().__init__(0)
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


def judge(kind: type[Judge] = Judge, **more: object) -> Judge:
    task = ToyTask()
    model, batches = task.model(), task.calibration()
    layers, _ = inventory(model, [Workload("default", task.workload())], SearchSpace())
    fitter = Fitter(
        model, layers, collect_grams(model, layers, batches), {ly.name: 64 for ly in layers}
    )
    return kind(model, layers, fitter, batches, **more)  # type: ignore[arg-type]


def questions(some: Judge) -> list[Question]:
    return [
        Question({ly.name: Candidate(b, 16) for ly in some.layers[: k + 1]}, (0, 1))
        for k in range(3) for b in (1, 2)
    ]  # fmt: skip


def make(some: Judge, ray: bool = False) -> Panel:
    device = fingerprint(describe("cpu", "float32"))
    return Panel(some, Sayings(), ray, None, device)


def answers(seats: Panel, asked: list[Question], **more: Deadline) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}

    def record(index: int, losses: list[float]) -> None:
        assert index not in found
        found[index] = losses

    with seats.session(len(asked)):
        seats.ask(asked, record, **more)
    return found


def test_a_hopeless_plan_is_given_up_and_a_good_one_is_not():
    some = judge()
    choices = {some.layers[0].name: Candidate(1, 8)}
    losses = some.losses(Question(choices, (1, 0)))
    assert len(losses) == 2
    assert some.losses(Question(choices, (1, 0), (losses[0] / 1.4, 1.0))) == losses
    assert some.losses(Question(choices, (1, 0), (losses[0] / 1.6, 1.0))) == losses[:1]


def test_the_dense_model_is_back_after_judging_and_partial_choices_leave_the_rest_alone():
    some = judge()
    before = some.model(some.batches[0])
    for question in questions(some):
        assert all(loss > 0 for loss in some.losses(question))
    assert torch.equal(some.model(some.batches[0]), before)
    assert some.losses(Question({}, (0, 1))) == [0.0, 0.0]


def test_factors_are_kept_within_bounds_and_not_passed_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fitting, "CACHE_BYTES", 1 << 18)
    names = [ly.name for ly in judge().layers]
    weights = sum(4 * ly.in_features * ly.out_features for ly in judge().layers)
    rooms = []
    for part in (8, 1 << 60):  # of the machine's memory: enough, and nothing
        monkeypatch.setattr(fitting, "MEMORY_SHARE", part)
        fitter = judge().fitter
        rooms.append(fitter._room)
        kept = [fitter.factors(n, Candidate(2, r)) for n in names for r in (8, 16, 24, 32)]
        held = sum(fitting._size(factors) for factors in fitter._cache.values())
        assert held == fitter._cached_bytes <= fitter._room
        assert len(fitter._cache) < len(kept) or part == 8
        assert fitter.factors(names[-1], Candidate(2, 32)) is kept[-1]
        copy = pickle.loads(pickle.dumps(fitter))
        assert not copy._cache
        assert torch.equal(copy.factors(names[0], Candidate(2, 8)).U, kept[0].U)
    assert rooms == [fitting.AROUND * weights, 1 << 18]


def test_a_passed_deadline_begins_nothing():
    some = judge()
    assert answers(make(some), questions(some), deadline=Deadline(time.monotonic() - 1)) == {}


def test_workers_are_for_long_sessions_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Panel, "_start", lambda _: pytest.fail("started for a second of work"))
    some = judge()
    assert len(answers(make(some, ray=True), questions(some))) == 6


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch, two_cpus: None) -> None:
    monkeypatch.setattr(panel, "PAYS", 0.0)
    # Several workers, whatever this process has grown to in other tests.
    monkeypatch.setattr(cluster.resource, "getrusage", lambda _: type("R", (), {"ru_maxrss": 1}))


@dataclass
class Dying(Judge):
    """Ends its process: where it is not the driver's, and `once` is gone or not given."""

    once: Path | None = None
    driver: int = field(default_factory=os.getpid)

    def losses(self, question: Question) -> list[float]:
        if os.getpid() != self.driver:
            if self.once is None:
                os._exit(1)
            try:
                self.once.rename(self.once.with_suffix(".gone"))
            except FileNotFoundError:
                pass
            else:
                os._exit(1)
        return super().losses(question)


@pytest.mark.usefixtures("eager")
def test_ray_workers_answer_what_this_process_does_and_one_that_dies_is_replaced(tmp_path: Path):
    (tmp_path / "alive").touch()
    some = judge(Dying, once=tmp_path / "alive")
    seats, asked = make(some, ray=True), questions(some)
    found = answers(seats, asked)
    assert not (tmp_path / "alive").exists()
    assert sorted(found) == list(range(6))
    assert seats.report.said == ["plans are judged by 2 Ray workers"]
    for index, question in enumerate(asked):
        assert found[index] == pytest.approx(some.losses(question), rel=1e-4)


@pytest.mark.usefixtures("eager")
def test_workers_that_always_die_leave_the_work_to_this_process():
    some = judge(Dying)
    seats = make(some, ray=True)
    found = answers(seats, questions(some))
    assert sorted(found) == list(range(6))
    assert "judged in this process" in seats.report.said[-1]


class Refusing(Judge):
    def losses(self, question: Question) -> list[float]:
        if len(question.choices) == 2:
            raise IncompatibleInputError("layer 2 is odd")
        return super().losses(question)


@pytest.mark.usefixtures("eager")
def test_an_error_of_the_model_is_raised_as_itself():
    some = judge(Refusing)
    with pytest.raises(IncompatibleInputError, match="layer 2 is odd"):
        answers(make(some, ray=True), questions(some))


@pytest.mark.usefixtures("eager")
def test_what_cannot_be_sent_to_workers_is_judged_here():
    some = judge()
    some.model.lock = threading.Lock()  # type: ignore[assignment]
    seats = make(some, ray=True)
    assert sorted(answers(seats, questions(some))) == list(range(6))
    assert "judged in this process" in seats.report.said[-1]


def test_a_plan_whose_outputs_are_not_finite_has_a_large_loss():
    some = judge()
    plan = {some.layers[0].name: Candidate(1, 16)}
    basis = some.fitter.basis(some.layers[0].name)
    basis.left[0] = float("nan")
    losses = some.losses(Question(plan, (0, 1)))
    assert losses == [BROKEN, BROKEN]
