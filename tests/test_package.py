"What a user installs: an sdist, a wheel made from it, and a run from the wheel in an empty folder."

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = ["collect", "ground", "imagine", "train", "evaluate", "figures"]


def run(*command: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    "Both archives; the wheel is built from the unpacked sdist alone."
    out = tmp_path_factory.mktemp("dist")
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    "A folder with what the wheel holds, as an installer puts it."
    folder = tmp_path_factory.mktemp("site")
    wheel = str(next(dist.glob("*.whl")))
    done = run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder),
               wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_archives_hold_the_package_and_no_more(dist):
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as z:
        inside = z.namelist()
    tracked = run("git", "ls-files", "kalm", cwd=ROOT).stdout.split()
    assert {*tracked} <= {*inside} or not (ROOT/".git").exists()
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"kalm"}
    with tarfile.open(next(dist.glob("*.tar.gz"))) as t:
        names = {name.split("/", 1)[-1] for name in t.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names


WORLD = """
from kalm.core.gym_domain import GymDomain

pole = GymDomain("CartPole-v1", {"offline": ["Keep the pole up."], "rephrase": ["Balance it."]}, success="survive",
                 max_steps=8)
"""


def test_the_wheel_runs_in_an_empty_folder(installed, tmp_path):
    "All stages in a world of the user's own; the world that the package brings, with its files."
    (tmp_path/"mine.py").write_text(WORLD)
    env = dict(PYTHONPATH=str(installed), PYTHONWARNINGS="ignore")
    done = run(str(installed/"bin"/"kalm"), "run", "--domain", "mine:pole", "--preset", "smoke", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("[")] == STAGES
    assert (tmp_path/"runs"/"pole-smoke"/"figures"/"success.png").exists()
    done = run(str(installed/"bin"/"kalm"), "collect", "--preset", "smoke", cwd=tmp_path, **env)
    assert done.returncode == 0 and (tmp_path/"runs"/"smoke"/"data"/"rollouts.npz").exists(), done.stderr
    where = run(sys.executable, "-c", "import kalm; print(kalm.__file__)", cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(where.stdout.strip()).is_relative_to(installed)
