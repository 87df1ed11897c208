"Worker processes: they end with their parent, begin nothing after a stop, and give up what is half done."

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = pytest.mark.usefixtures("cache")

PARENT = """
import os, sys, time
from pathlib import Path

from kalm.core.domain import domain
from kalm.run.folder import Run
from kalm.run.workers import in_processes
from kalm.run.presets import preset


def job(run, name, seconds):
    "Say that it began, work, say that it is done."
    (run.out/f"{name}.tmp").write_text(str(os.getpid()))
    (run.out/f"{name}.tmp").rename(run.out/f"{name}.began")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(10_000))
    (run.out/f"{name}.done").touch()
    return name


if __name__ == "__main__":
    os.cpu_count = lambda: 2
    run = Run(preset(domain("worlds:discrete_line"), "smoke"), "worlds:discrete_line", sys.argv[1])
    seconds = [float(s) for s in sys.argv[2:]]
    found = dict(in_processes(run, job, [(i, (i, s)) for i, s in enumerate(seconds)]))
    assert found == {i: i for i in range(len(seconds))}, found
"""


def start(folder: Path, *seconds: float) -> subprocess.Popen:
    "A parent whose jobs take so long, in a process group of its own."
    script = folder / "parent.py"
    script.write_text(PARENT)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(folder)])
    command = [sys.executable, str(script), str(folder / "run"), *map(str, seconds)]
    # a shell that runs tests in the background has made them, and what they start, deaf to Ctrl-C
    return subprocess.Popen(command, env=os.environ | dict(PYTHONPATH=paths), start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def names(folder: Path, what: str) -> set[str]:
    return {p.stem for p in (folder / "run").glob(f"*.{what}")}


def until(condition, seconds: float = 90) -> bool:
    "Wait for it."
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def alive(pid: int) -> bool:
    "Whether a process is there and no zombie."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_all_jobs_are_done_and_come_back(tmp_path):
    assert start(tmp_path, 0, 0.2, 0).wait(timeout=120) == 0
    assert names(tmp_path, "done") == {"0", "1", "2"}


@pytest.mark.parametrize(
    "number, whole_group",
    [(signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGINT, False)],
    ids=["killed", "terminated", "interrupted", "interrupted_alone"],
)
def test_workers_end_with_their_parent_and_begin_nothing(tmp_path, number, whole_group):
    "No orphan goes on, and an interrupt starts no work that had not begun."
    parent = start(tmp_path, 600, 600, 600, 600)
    try:
        assert until(lambda: len(names(tmp_path, "began")) == 2)
        workers = [int(p.read_text()) for p in (tmp_path / "run").glob("*.began")]
        (os.killpg if whole_group else os.kill)(parent.pid, number)
        assert parent.wait(timeout=30) != 0
        assert until(lambda: not any(map(alive, workers)), 30)
        assert names(tmp_path, "began") == {"0", "1"} and not names(tmp_path, "done")
    finally:
        try:
            os.killpg(parent.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
