"The short form of `experiments/attack_runs.py`: kills and damages."

import json
import os
import subprocess
import sys

from conftest import ROOT

SCRIPT = ROOT/"experiments"/"attack_runs.py"


def attacked(session_cache, out, *args) -> list[dict]:
    done = subprocess.run([sys.executable, str(SCRIPT), *args, "--domains", "worlds:discrete_line", "--out", str(out)],
                          env=os.environ | dict(KALM_CACHE=str(session_cache)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(out.read_text())[args[0]]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_files(session_cache, tmp_path):
    row, = attacked(session_cache, tmp_path/"a.json", "kills", "--kills", "3", "--cores", "1")
    assert row["kills"] == 3 and row["files"] > 20
    assert row["different"] == [] and row["orphans"] == 0


def test_damaged_files_are_made_again_or_named(session_cache, tmp_path):
    rows = attacked(session_cache, tmp_path/"a.json", "damage", "--damages", "4", "--seed", "1")
    assert len(rows) == 4 and {row["outcome"] for row in rows} <= {"same", "refused"}, rows


def test_the_long_form_found_nothing():
    "What results/attacks.json says, so that README and notes say no other."
    found = json.loads((ROOT/"results"/"attacks.json").read_text())
    assert sum(row["kills"] for row in found["kills"]) >= 200
    assert all(row["different"] == [] and row["orphans"] == 0 for row in found["kills"])
    assert len(found["damage"]) >= 300
    assert {row["outcome"] for row in found["damage"]} <= {"same", "refused"}
