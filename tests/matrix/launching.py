"""Start the two processes, watch that they go on, and collect what they say."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

SILENCE = 300
"""After so many seconds without an answer a job hangs."""
TESTS = str(Path(__file__).parents[1])
ANSWERS = ("equal", "refused", "wrong", "failed", "ended", "hangs")
"""From good to bad."""


def launch(jobs, folder):
    """Run jobs in two processes; yield each with what the processes say of it. A job that gives no answer ends the launch."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    address |= {"PYTHONPATH": TESTS, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(2)]
    lines = [folder / f"{rank}.jsonl" for rank in range(2)]
    for path in lines:
        path.unlink(missing_ok=True)
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "matrix", str(rank), str(folder)], stdout=logs[rank], stderr=subprocess.STDOUT,
            env=os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        ) for rank in range(2)
    ]  # fmt: skip
    try:
        for number, job in enumerate(jobs):
            since = time.monotonic()
            while True:
                ended = any(process.poll() is not None for process in started)
                said = [path.read_text().splitlines() if path.exists() else [] for path in lines]
                if all(len(of_rank) > number for of_rank in said):
                    yield job, [json.loads(of_rank[number]) for of_rank in said]
                    break
                if ended or time.monotonic() - since > SILENCE:
                    time.sleep(1)
                    tail = "\n".join(Path(log.name).read_text()[-1500:] for log in logs)
                    yield job, [{"what": "ended" if ended else "hangs", "why": tail}] * 2
                    return
                time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for log in logs:
            log.close()


def run(jobs, folder):
    """Run all jobs, in as many launches as it takes; yield each with what came of it."""
    left = list(jobs)
    while left:
        for _job, said in launch(left, folder / str(len(left))):
            worst = max(said, key=lambda one: ANSWERS.index(one["what"]))
            if {one["what"] for one in said} == {"equal", "refused"}:
                worst = {"what": "wrong", "why": f"the processes differ: {said}"}
            yield left.pop(0), worst
