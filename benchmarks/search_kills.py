"""The search stage under kill signals: is a trial lost or repeated, is the front another one?

    python benchmarks/search_kills.py --kills 80 --mode local     # the driver is killed
    python benchmarks/search_kills.py --kills 20 --mode ray       # the driver, and Ray's workers

First an undisturbed run of a small model gives the reference.  Each further run starts with the
reference's timings (two timings of a plan are never equal, and the way of the search depends on
them) but without any loss, trial or probe of its own; SIGKILL hits it at random moments, it is
started again with `resume`, until it ends by itself.  After every kill: is all that was on file
still there, is nothing on file twice, was nothing asked again that was on file?  In the end: are
trials, front and plan those of the reference?  Results: results/search-kills/.

One thread each, so that the numbers do not depend on which process computed them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "BLAST_SEARCH_CACHE": "off"}
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import torch
from ray import cloudpickle
from torch import Tensor, nn

from blast_search import panel, search
from blast_search.files import append_row, write_json
from blast_search.latency import environment
from blast_search.runfolder import FIELDS, digest

FOLDER = Path(__file__).resolve().parent.parent / "results" / "search-kills"
ROW = (
    "mode", "seed", "driver_kills", "worker_kills", "lost", "doubled", "asked_again",
    "same_trials", "same_front", "same_plan", "wall_s", "date",
)  # fmt: skip
LOG = "SEARCH_KILLS_LOG"
BUDGET, TRIALS, WIDTH, SLOW = 0.6, 20, 192, 0.03


class Net(nn.Module):
    """(B, T, WIDTH) -> (B, 10); takes at least `SLOW` seconds where it is judged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        if LOG in os.environ:
            time.sleep(SLOW)
        out: Tensor = self.head(x.mean(1))
        return out


class Kills:
    """The task: agreement of classes on random data."""

    name = "kills"
    metric = ("agreement", True)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(1, 0, WIDTH)
        self.data = torch.randn(8, 16, 64, WIDTH, generator=generator) @ mix / 6

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return Net()

    def workload(self) -> Tensor:
        return self.data[0]

    def calibration(self) -> list[Tensor]:
        return list(self.data)

    def evaluate(self, model: nn.Module) -> float:
        x, dense = self.data[0], self.model().eval()
        return float((model(x).argmax(-1) == dense(x).argmax(-1)).float().mean())

    def train_batches(self, seed: int) -> Iterator[Tensor]:
        yield from self.data

    def loss(self, model: nn.Module, batch: Tensor, teacher: nn.Module) -> Tensor:
        return (model(batch) - teacher(batch)).square().mean()


def drive(folder: Path, mode: str, log: str = "") -> None:
    """One life of a driver; with a `log` of every plan that it asks to be judged, it resumes."""
    if log:
        os.environ[LOG] = log  # here, because a fork server keeps the environment of its start
    torch.set_num_threads(1)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    panel.PAYS = 0.0  # Ray's workers, however little there is to do
    ask = panel.Panel.ask

    def noted(self: panel.Panel, questions: Any, on_answer: Any, *deadline: Any) -> None:
        if log:
            with open(log, "a") as stream:
                stream.writelines(f"{digest(q.choices)} {len(q.order)}\n" for q in questions)
        ask(self, questions, on_answer, *deadline)

    panel.Panel.ask = noted  # type: ignore[method-assign]
    search(
        Kills(), BUDGET, workers=mode, trials=TRIALS, retrain_steps=0, out=folder,
        resume=bool(log),
    )  # fmt: skip


def start(folder: Path, mode: str, log: Path) -> Any:
    """A driver in a process of its own, forked from one that has the imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "blast_search.pipeline", "optuna"])
    driver = context.Process(target=drive, args=(folder, mode, str(log)))
    driver.start()
    return driver


def measured(folder: Path) -> list[dict[str, str]]:
    """Rows of measured.csv and probes.csv, a torn last line left out."""
    rows = []
    for name in ("measured.csv", "probes.csv"):
        path = folder / name
        text = path.read_text() if path.exists() else ""
        rows += list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    return rows


def trials(folder: Path) -> list[tuple[Any, ...]]:
    """Number, state, parameters, values and plan of every stored trial."""
    import optuna

    if not (folder / "study.db").exists():
        return []
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.load_study(
            study_name="blast-search", storage=f"sqlite:///{folder}/study.db"
        )
    except KeyError:  # killed while the tables were made
        return []
    found = study.get_trials(deepcopy=False)
    return [
        (t.number, t.state.name, sorted(t.params.items()), t.values, t.user_attrs.get("plan"))
        for t in found
    ]


def beginning(reference: Path, folder: Path) -> None:
    """A run folder that has the reference's timings, and nothing that the search found."""
    folder.mkdir()
    for name in ("config.yaml", "latency.csv"):
        shutil.copy(reference / name, folder / name)
    for row in csv.DictReader((reference / "measured.csv").open()):
        if not row["kind"].startswith(("loss", "metric")):
            append_row(folder / "measured.csv", FIELDS, row)


def disturbed(reference: Path, mode: str, seed: int, most: int) -> dict[str, Any]:
    """One run, killed at random moments up to `most` times, to its end."""
    chance, began = random.Random(seed), time.monotonic()
    result: dict[str, Any] = dict.fromkeys(ROW, 0) | {"mode": mode, "seed": seed}
    with tempfile.TemporaryDirectory() as name:
        folder, log, code = Path(name) / "run", Path(name) / "log", None
        beginning(reference, folder)
        while code != 0:
            rows, stored = measured(folder), trials(folder)
            known = {row["digest"] for row in rows if row.get("kind") == "loss"}
            log.unlink(missing_ok=True)
            driver = start(folder, mode, log)
            code = disturb(driver, mode, chance, result, most)
            if code not in (0, -signal.SIGKILL):
                raise SystemExit(f"the driver ended with {code}")
            after, trials_after = measured(folder), trials(folder)
            result["lost"] += sum(row not in after for row in rows)
            result["lost"] += trials_after[: len(stored)] != stored
            keys = [tuple(list(row.values())[:3]) for row in after if "kind" in row]
            result["doubled"] += len(keys) - len(set(keys))
            plans = [json.dumps(t[4]) for t in trials_after]
            result["doubled"] += len({t[0] for t in trials_after}) != len(plans)
            asked = log.read_text().split("\n") if log.exists() else []
            result["asked_again"] += sum(line.split(" ")[0] in known for line in asked if line)
        result["same_trials"] = int(trials(folder) == trials(reference))
        for what, file in (("same_front", "front.csv"), ("same_plan", "plan.json")):
            texts = [(f / file).read_text() for f in (folder, reference)]
            if file == "plan.json":
                texts = [json.dumps(json.loads(text)["layers"]) for text in texts]
            result[what] = int(texts[0] == texts[1])
    result |= {"wall_s": round(time.monotonic() - began, 1)}
    return result | {"date": datetime.now(UTC).date().isoformat()}


def disturb(
    driver: Any, mode: str, chance: random.Random, result: dict[str, Any], most: int
) -> int:
    """Kill a worker now and then, and the driver in the end; the driver's exit code."""
    life = chance.uniform(0.5, 6.0) + (20 if mode == "ray" else 0)
    until, spared = (
        time.monotonic() + life,
        result["driver_kills"] + result["worker_kills"] >= most,
    )
    next_worker = time.monotonic() + chance.uniform(1, life)
    while driver.exitcode is None:
        driver.join(0.05)
        if spared:
            continue
        if time.monotonic() > next_worker and mode == "ray":
            next_worker = time.monotonic() + chance.uniform(0.3, 2)
            result["worker_kills"] += kill_worker(driver.pid, chance)
        if time.monotonic() > until and driver.exitcode is None:
            driver.kill()
            driver.join()
            result["driver_kills"] += driver.exitcode == -signal.SIGKILL
    return int(driver.exitcode)


def kill_worker(driver: int, chance: random.Random) -> int:
    """Kill one of the driver's Ray workers that judge plans; how many died (0 or 1)."""
    import psutil

    try:
        below = psutil.Process(driver).children(recursive=True)
        workers = [p for p in below if p.cmdline()[:1] and "ray::Worker" in p.cmdline()[0]]
        if not workers:
            return 0
        chance.choice(workers).kill()
    except psutil.NoSuchProcess:
        return 0
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("local", "ray"), default="local")
    parser.add_argument("--kills", type=int, default=80)
    parser.add_argument("--each", type=int, default=12, help="kills per run, at most")
    parser.add_argument("--seed", type=int, default=0)
    values = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    done = 0
    with tempfile.TemporaryDirectory() as name:
        reference = Path(name) / "reference"
        drive(reference, "local")
        while done < values.kills:
            most = min(values.each, values.kills - done)
            row = disturbed(reference, values.mode, values.seed, most)
            append_row(FOLDER / "kills.csv", ROW, row)
            print(row, flush=True)
            done += row["driver_kills"] + row["worker_kills"]
            values.seed += 1
    rows = list(csv.DictReader((FOLDER / "kills.csv").open()))
    total: dict[str, Any] = {key: sum(int(row[key]) for row in rows) for key in ROW[2:10]}
    total |= {"runs": len(rows), "environment": environment(torch.device("cpu"))}
    write_json(FOLDER / "kills.json", total)
    print(total)


if __name__ == "__main__":
    main()
