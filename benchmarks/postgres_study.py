"""Many workers on one Optuna study in a real PostgreSQL server, started and stopped here.

    python benchmarks/postgres_study.py --workers 4 --trials 40

Needs a PostgreSQL server (initdb and postgres on PATH, in /usr/lib/postgresql/*/bin, or in
PG_BIN) and the driver (`pip install psycopg2-binary`).  Each worker is a process of its
own that works on the study as a run with `--storage` does; losses are known numbers, so that only
sampling and storage are timed.  Prints one JSON object; exits with 3 where there is no server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARAMETERS = [f"type:{k}" for k in "abcdefgh"] + [f"depth:{k}" for k in range(3)]


def server_folder() -> Path | None:
    """Where initdb and postgres are, newest version first; None: nowhere."""
    found = [Path(os.environ["PG_BIN"])] if "PG_BIN" in os.environ else []
    on_path = shutil.which("initdb")
    found += [Path(on_path).resolve().parent] if on_path else []
    versions = Path("/usr/lib/postgresql").glob("*/bin")
    found += sorted(versions, key=lambda p: -float(p.parent.name))
    return next(
        (p for p in found if (p / "initdb").is_file() and (p / "postgres").is_file()), None
    )


def as_server_user(folder: Path) -> list[str]:
    """A command prefix: PostgreSQL refuses to run as root, so root hands its folder to nobody."""
    if os.geteuid() != 0:
        return []
    shutil.chown(folder, "nobody")
    return ["setpriv", "--reuid=nobody", "--clear-groups"]


@contextmanager
def postgres(binaries: Path) -> Iterator[str]:
    """A server of our own in a temporary folder, on a free port of this machine only."""
    with tempfile.TemporaryDirectory(prefix="blast-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        user = as_server_user(folder)
        data, log = folder / "data", (folder / "log").open("w+")
        subprocess.run(
            [*user, binaries / "initdb", "-D", data, "-U", "blast", "--auth=trust", "-N"],
            check=True, stdout=log, stderr=log,
        )  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen(
            [*user, binaries / "postgres", "-D", data, "-p", str(port), "-k", folder,
             "-c", "listen_addresses=127.0.0.1"],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            _wait(server, port, folder / "log")
            yield f"postgresql+psycopg2://blast@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # "fast": does not wait for its clients
            server.wait(30)
            log.close()


def _wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import psycopg2

    for _ in range(300):
        if server.poll() is not None:
            break
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="blast", dbname="postgres").close()
            return
        except psycopg2.OperationalError:
            time.sleep(0.1)
    raise RuntimeError(f"the server did not start: {log.read_text()[-500:]}")


def work(url: str, name: str, trials: int, seconds: float) -> None:
    """One worker: trials until the study has `trials`; an evaluation takes `seconds`."""
    from blast_search.storage import Storage
    from blast_search.study import Outcome, Study

    study = Study(PARAMETERS, Storage(url, "shared", name), seed=0)
    spent, own = 0.0, 0

    def judge(values: dict[str, float]) -> Outcome:
        nonlocal spent
        began = time.monotonic()
        time.sleep(seconds)
        loss = 0.1 + sum((v - 0.5) ** 2 for v in values.values())
        spent += time.monotonic() - began
        return Outcome([loss], 0.3, -0.01, {"layer": "b1r8"}, "weights", pruned=loss > 20)

    began = time.monotonic()
    while (done := study.sync()) < trials:
        (asked,) = study.ask(done, done + 1, [] if done else [{}])
        study.tell(asked, judge(asked.values), (done, 1))
        own += 1
    overhead = (time.monotonic() - began - spent) / max(own, 1)
    print(json.dumps({"worker": name, "trials": own, "overhead_ms": round(overhead * 1e3, 1)}))


def measure(url: str, workers: int, trials: int, seconds: float) -> dict[str, object]:
    """Run the workers side by side, then read the study as anyone would."""
    import optuna

    from blast_search.study import worker_of

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    command = [sys.executable, __file__, "--trials", str(trials), "--seconds", str(seconds)]
    began = time.monotonic()
    running = [
        subprocess.Popen([*command, "--url", url, "--name", f"w{k}"], stdout=subprocess.PIPE)
        for k in range(workers)
    ]
    said = [json.loads(process.communicate()[0]) for process in running]
    study = optuna.load_study(study_name="shared", storage=url)
    found = study.get_trials(deepcopy=False)
    params = Counter(tuple(sorted(t.params.items())) for t in found)
    zero = tuple((name, 0.0) for name in sorted(PARAMETERS))
    return {
        "workers": said,
        "trials": len(found),
        "by_worker": dict(Counter(worker_of(t) for t in found)),
        "unique_ids": len({t.user_attrs["id"] for t in found}),
        "states": dict(Counter(t.state.name for t in found)),
        "start": params.pop(zero, 0),
        "sampled_twice": sum(n - 1 for n in params.values()),
        "best_loss": min(t.values[0] for t in found if t.values),
        "wall_s": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.05, help="an evaluation's time")
    parser.add_argument("--url", help="an existing server's storage URL; with --name: a worker's")
    parser.add_argument("--name")
    args = parser.parse_args()
    if args.name:
        work(args.url, args.name, args.trials, args.seconds)
        return 0
    if args.url:
        print(json.dumps(measure(args.url, args.workers, args.trials, args.seconds)))
        return 0
    binaries = server_folder()
    if not binaries:
        print(
            "no PostgreSQL server found: install one (Debian: postgresql), or name its folder in "
            "PG_BIN.",
            file=sys.stderr,
        )
        return 3
    with postgres(binaries) as url:
        print(json.dumps(measure(url, args.workers, args.trials, args.seconds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
