"""The models of contenders: built, judged by the task's metric, retrained, kept in models/."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from blast_search.apply import attach, copied, duplicate, final_modules
from blast_search.engine import Contender, Engine
from blast_search.errors import IncompatibleInputError, in_one_line
from blast_search.evaluate import evaluate, worse_by
from blast_search.judge import BROKEN
from blast_search.modelfolder import WEIGHTS, load, save
from blast_search.plan import Plan
from blast_search.recovery import SLOWER, recover
from blast_search.retrain import DEFAULT_STEPS, retrain
from blast_search.runfolder import digest

if TYPE_CHECKING:
    from blast_search.pipeline import Pipeline

SHORT = 5  # a short retraining takes one in so many steps


class Models:
    """The models of one run's contenders."""

    def __init__(self, pipeline: Pipeline, engine: Engine) -> None:
        self.pipeline, self.engine = pipeline, engine
        self.settings, self.prepared = pipeline.settings, pipeline.prepared
        self.records, self.report = pipeline.records, pipeline.report
        self.folder: Path = pipeline.folder / "models"

    def build(self, contender: Contender, plan: Plan | None = None) -> nn.Module:
        """A new model with the contender's layers, factors of final quality.

        Args:
            plan: what the model says of itself (`model.blast_plan`).
        """
        chosen = {name: c for name, c in contender.choices.items() if not c.is_dense}
        model = copied(self.prepared.model, self.prepared.layers, chosen)
        modules: dict[str, nn.Module] = {}
        with self.report.stage(f"factorise {contender.name}", len(chosen)) as advance:
            for name, candidate in chosen.items():
                modules |= final_modules(self.engine.fitter, {name: candidate})
                advance()
        attach(model, self.prepared.layers, modules, plan or Plan(model={}, layers={}))
        return model

    def metric(self, contender: Contender) -> float:
        """The metric before retraining; the worst number there is where it is not finite."""
        task = self.prepared.task

        def judged() -> float:
            model = self.build(contender)
            try:
                return evaluate(task, model)
            except IncompatibleInputError as error:  # no reason to lose the other contenders
                self.report.say(f"{contender.name}: {error}")
                return -BROKEN if task.metric[1] else BROKEN

        return float(
            self.records.once("metric", digest(contender.choices), contender.name, judged)
        )

    @property
    def full_steps(self) -> int:
        """Retraining steps as asked, or the task's recipe."""
        asked = self.settings.retrain_steps
        recipe = getattr(self.prepared.task, "train_steps", DEFAULT_STEPS)
        return int(recipe if asked is None else asked)

    def steps(self, contender: Contender, contenders: int) -> int:
        """Retraining steps: as asked, the task's recipe, or what the time limit leaves."""
        task, limit, steps = self.prepared.task, self.settings.time_limit, self.full_steps
        if limit is None or steps == 0:
            return steps

        def affordable() -> int:
            since = time.monotonic()
            model = self.build(contender)
            begin = time.monotonic()
            building = begin - since
            with suppress(IncompatibleInputError):  # diverged: what counts here is the time
                retrain(task, model, self.prepared.model, 1, self.settings.seed)
                begin = time.monotonic()
                retrain(task, model, self.prepared.model, 3, self.settings.seed)
            per_step = (time.monotonic() - begin) / 3
            begin = time.monotonic()
            with suppress(IncompatibleInputError):
                evaluate(task, model)
            judging = time.monotonic() - begin
            left = 60 * limit - (time.monotonic() - self.pipeline.started)
            each = 0.8 * left / contenders - building - judging
            return max(1, min(steps, int(each / per_step)))

        return int(self.records.once("steps", "steps", "retraining steps", affordable))

    @property
    def short_steps(self) -> int:
        """Steps of the short retraining that decides between close plans; 0: none.

        A time limit is left to the retraining that lasts.
        """
        return 0 if self.settings.time_limit is not None else self.full_steps // SHORT

    def recovered(self, contender: Contender) -> float:
        """How far the metric is behind dense after `short_steps` of retraining."""
        p, steps = self.prepared, self.short_steps

        def train() -> float:
            model, name = self.build(contender), f"short retraining of {contender.name}"
            try:
                retrain(
                    p.task, model, p.model, steps, self.settings.seed, report=self.report,
                    name=name,
                )  # fmt: skip
                return worse_by(p.task, evaluate(p.task, model), self.pipeline.dense_metric)
            except IncompatibleInputError as error:  # diverged: the other plan goes first
                self.report.say(f"{name}: {error}")
                return BROKEN

        kind = f"behind after {steps} steps"
        try:
            return float(self.records.once(kind, digest(contender.choices), contender.name, train))
        except Exception as error:
            # The task's own code.  In a search no plan is on file yet: the retraining that lasts
            # will raise this again, with one on file.  A resumed run comes back to here.
            self.report.say(f"short retraining of {contender.name} failed ({in_one_line(error)})")
            return BROKEN

    def retrained(
        self, key: str, contender: Contender, plan: Plan, steps: int, weights: bool = True
    ) -> float:
        """The metric after `steps` of retraining; the model is kept in models/<key>.

        Without `weights` a value on file will do, even if the model is there no more: of a run
        that is resumed at its end, only the winner's model is wanted.
        """
        folder = self.folder / key
        kind = f"retrained {steps} steps"
        known = (kind, digest(contender.choices))
        if weights and not self.holds(key, contender):
            twin = self.twin(key, contender)
            if twin and known in self.records.measured:  # a uniform plan won: trained once
                copy_folder(twin, folder)
            else:
                # The weights were lost (a kill between two files) or are another plan's: train
                # again, with the same seed.
                self.records.measured.pop(known, None)

        def train() -> float:
            model, value = self.trained(key, contender, steps, self.settings.seed, plan)
            save(model, folder, plan)
            return value

        return float(self.records.once(*known, key, train))

    def twin(self, key: str, contender: Contender) -> Path | None:
        """A folder with the same plan's weights: another contender's, or the finished run's."""
        folders = [*sorted(self.folder.glob("[!.]*")), self.pipeline.folder / "model"]
        return next((f for f in folders if f.name != key and _holds(f, contender)), None)

    def holds(self, key: str, contender: Contender) -> bool:
        """Whether models/<key> holds this contender's weights."""
        return _holds(self.folder / key, contender)

    def trained(
        self, key: str, contender: Contender, steps: int, seed: int, plan: Plan | None = None
    ) -> tuple[nn.Module, float]:
        """The contender's model and metric after `steps` of retraining.

        Retraining that makes the metric worse is thrown away and tried once more at a lower rate,
        where there is time; if that does no better, the fitted factors are kept as they are.
        """
        p, before = self.prepared, self.metric(contender)
        found = recover(
            p.task, lambda: self.build(contender, plan), p.model, before, steps, seed,
            (1, SLOWER) if self.settings.time_limit is None else (1,), self.report, key,
        )  # fmt: skip
        if found.model is not None:
            return found.model, found.metric
        return self.build(contender, plan), before

    def rename(self, source: str, target: str, contender: Contender) -> None:
        """Keep a contender's retrained model under another name, if it is there."""
        if self.holds(source, contender):
            shutil.rmtree(self.folder / target, ignore_errors=True)
            (self.folder / source).rename(self.folder / target)

    def keep(self, key: str, winner: Contender, plan: Plan, trained: bool) -> nn.Module:
        """The winner's model in model/, with the final plan beside its weights."""
        source = self.folder / key
        if trained:
            model = load(source, lambda: duplicate(self.prepared.model))
        else:
            model = self.build(winner, plan)
        target = save(model, self.pipeline.folder / "model", plan)
        model.blast_plan = Plan.load(target)  # type: ignore[assignment]
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        return model


def _holds(folder: Path, contender: Contender) -> bool:
    whole = (folder / "plan.json").is_file() and (folder / WEIGHTS).is_file()  # or half removed
    return whole and Plan.load(folder).choices == contender.choices


def copy_folder(source: Path, target: Path) -> None:
    """A copy that is there in full or not at all, whenever the program is killed."""
    part = target.with_name(f".{target.name}.part")
    for old in (part, target):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(source, part)
    part.rename(target)
