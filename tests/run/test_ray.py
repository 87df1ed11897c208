"A Ray cluster of two nodes on this machine: the same files as without it, and a killed worker costs its call's time."

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from kalm.run.command import main

ray = pytest.importorskip("ray")
ARGS = ["--domain", "worlds:discrete_line", "--preset", "smoke", "--out"]
SAME = ("data/rollouts.npz", "imagined/*/rollouts.npz", "imagined/*/shards/*", "policies/*/curve.csv",
        "policies/*/step-*/policy.safetensors", "acted/*/*.npz")


@pytest.fixture(scope="module")
def cluster(session_cache):
    from ray.cluster_utils import Cluster
    nodes = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    nodes.add_node(num_cpus=1)
    yield nodes.address
    nodes.shutdown()


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for pattern in SAME for p in out.glob(pattern)}


def workers() -> list[int]:
    "Processes of the cluster that are at a call."
    found = subprocess.run(["pgrep", "-f", "ray::_call_there"], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def test_the_same_files_on_a_cluster_though_a_worker_is_killed(cluster, cache, tmp_path, monkeypatch):
    killed, end = [], threading.Event()

    def kill():
        "A worker, in the middle of what it does."
        while not end.is_set() and not killed:
            for pid in workers()[:1]:
                time.sleep(.3)
                with suppress(ProcessLookupError):   # it was done
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(.1)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert main(["run", *ARGS, str(tmp_path/"there"), "--ray", cluster]) == 0
    finally:
        end.set()
        killer.join()
        ray.shutdown()
    assert killed
    monkeypatch.setattr("kalm.run.workers.os.cpu_count", lambda: 1)
    torch.set_num_threads(1)
    assert main(["run", *ARGS, str(tmp_path/"here")]) == 0
    mine, theirs = files(tmp_path/"here"), files(tmp_path/"there")
    assert mine.keys() == theirs.keys() and len(mine) > 20
    assert [name for name in mine if mine[name] != theirs[name]] == []
    rows = [sorted(p.read_text().splitlines()) for p in (tmp_path/"here"/"results.csv", tmp_path/"there"/"results.csv")]
    assert rows[0] == rows[1]


def test_what_a_cluster_cannot_do_is_one_clear_line(cluster, cache, tmp_path, capsys):
    assert main(["collect", *ARGS, str(tmp_path/"a"), "--ray", "127.0.0.1:1"]) == 1
    assert "kalm: no Ray cluster at '127.0.0.1:1'" in capsys.readouterr().err
