"The command line from data to figures, in small: worlds of other kinds, CLEVR-Robot, stopping, bad input."

import json
import shlex
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import python

import kalm
from kalm.clevr.domain import ClevrRobot
from kalm.clevr.sentences import goal_set
from kalm.core.domain import domain
from kalm.core.files import owned, read_csv
from kalm.core.results import read_results
from kalm.run.command import STAGES, configure, main, parser, run_stages
from kalm.run.folder import Run
from kalm.run.policies import jobs, rows_of
from kalm.run.presets import Imagined, preset, presets_for

pytestmark = pytest.mark.usefixtures("cache")


def test_continuous_worlds_get_three_algorithms():
    methods = {job.method for job in jobs(preset(domain("worlds:continuous_line"), "smoke"))}
    assert methods == {"bc", "bc+kalm", "cql", "cql+kalm", "td3bc", "td3bc+kalm"}


@pytest.fixture(scope="module")
def clevr_run(tmp_path_factory, session_cache):
    "A run of CLEVR-Robot with every baseline, on very little: one sentence in eighteen."
    small = preset(domain("clevr"), "smoke")
    levels = dict(rephrase=Imagined(4), easy=Imagined(4, tries=2), hard=Imagined(4, parts=True))
    run = Run(
        replace(small, episodes=4, imagined=levels, checkpoints=1), "clevr", tmp_path_factory.mktemp("clevr") / "run"
    )
    run.spec = ""  # in this process
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KALM_CACHE", str(session_cache))
        patch.setattr(ClevrRobot, "goals", lambda self, level: goal_set(level)[::18])
        assert run_stages(run, list(STAGES))
    return run


def test_clevr_robot_runs_with_every_baseline(clevr_run):
    rows = read_results(clevr_run.out / "results.csv", kind="")
    assert {(r["method"], r["level"], r["seed"], r["step"]) for r in rows} == {row.key for row in rows_of(clevr_run)}
    assert {r["method"] for r in rows} >= {"bc+kalm", "cql+oracle", "lm", "lm-bc", "expert", "random"}


def test_results_tell_kinds_of_sentences_apart(clevr_run):
    kinds = {r["kind"] for r in read_results(clevr_run.out / "results.csv", level="hard")}
    assert "" in kinds and len(kinds) > 1


def test_a_policy_of_a_run_acts_on_a_sentence(clevr_run):
    policy = kalm.load_policy(clevr_run.out / "policies" / "bc+kalm-0" / "step-60")
    states = kalm.domain("clevr").start(kalm.domain("clevr").goals("offline"), [0, 1], [5, 6]).states
    actions = policy.act(states, "Put the red ball left of the blue one.")
    assert actions.shape == (2,) and ((0 <= actions) & (actions < 40)).all()


def test_a_stage_says_what_it_needs(tmp_path, capsys):
    args = ["--domain", "worlds:discrete_line", "--preset", "smoke", "--out", str(tmp_path / "r")]
    assert main(["train", *args]) == 1
    assert f"run `kalm collect {shlex.join(args)}` first" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()   # a wrong --out creates nothing


def test_a_folder_is_the_place_of_one_run(tmp_path, capsys):
    args = ["collect", "--domain", "worlds:discrete_line", "--preset", "smoke", "--out", str(tmp_path / "r")]
    assert main(args) == 0
    assert main([*args, "--seed", "3"]) == 1
    err = capsys.readouterr().err
    assert "holds a run with other settings" in err and "ground.seed was 0, is 3" in err and err.count("was") == 2


def test_two_processes_do_not_share_a_folder(tmp_path, capsys):
    with owned(tmp_path / "r"):
        assert (
            main(["collect", "--domain", "worlds:discrete_line", "--preset", "smoke", "--out", str(tmp_path / "r")])
            == 1
        )
    assert "another process works in" in capsys.readouterr().err


def test_a_time_limit_stops_cleanly_and_the_same_command_continues(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kalm.run.workers.os.cpu_count", lambda: 1)   # in this process: workers import for long
    args = ["run", "--domain", "worlds:discrete_line", "--preset", "smoke", "--out", str(tmp_path / "r")]
    assert main([*args, "--max-minutes", "1e-9"]) == 0
    assert "The same command continues" in capsys.readouterr().out
    assert main(args) == 0
    before = (tmp_path / "r" / "results.csv").read_bytes()
    assert main(args) == 0  # nothing to do
    assert (tmp_path / "r" / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    "args, message",
    [
        (["run", "--preset", "bset"], "has no preset 'bset'"),
        (["run", "--domain", "mars"], "unknown domain 'mars'"),
        (["run", "--domain", "worlds:nothing"], "cannot import domain"),
        (["run", "--domain", "worlds:SENTENCES"], "is not a domain"),
        (["run", "--seed", "-1"], "--seed -1: expected 0 or more"),
        (["run", "--max-minutes", "nan"], "--max-minutes nan: expected more than 0"),
        (["run", "--preset", "smoke", "--backbone", "nonsense"], "no causal language model 'nonsense'"),
        (["evaluate", "--out", "typo"], "typo is not there"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 1
    err = capsys.readouterr().err.strip()
    assert message in err and "\n" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_run_folder(tmp_path, capsys):
    (tmp_path / "r").write_text("")
    assert main(["collect", "--domain", "worlds:discrete_line", "--preset", "smoke", "--out", str(tmp_path / "r")]) == 1
    assert "is a file: expected a folder" in capsys.readouterr().err


def test_what_a_domain_does_not_have_is_refused_before_anything_is_written(tmp_path):
    p, d = preset(domain("worlds:discrete_line"), "smoke"), domain("worlds:discrete_line")
    wrong = [(dict(behaviour="expert"), "behaviour 'expert'"), (dict(baselines=("orcale",)), "baseline 'orcale'")]
    wrong += [(dict(imagined=dict(hard=Imagined(4))), "level 'hard'")]
    for change, message in wrong:
        with pytest.raises(ValueError, match=f"asks for {message}, domain 'discrete_line' has"):
            Run(replace(p, **change), d, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_the_version_is_told_and_the_package_is_a_command():
    done = subprocess.run([sys.executable, "-m", "kalm", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith(f"kalm {kalm.__version__}") and done.returncode == 0


def test_the_commit_is_that_of_kalm_and_no_other(tmp_path, monkeypatch):
    "Installed inside somebody's repository, kalm does not take their commit for its own."
    from kalm.run import folder

    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    package = tmp_path / "venv" / "site-packages" / "kalm"
    package.mkdir(parents=True)
    monkeypatch.setattr(folder.kalm, "__file__", str(package / "__init__.py"))
    assert folder.commit() == ""


def test_options_reach_the_preset():
    a = parser().parse_args("run --preset quick --backbone some/model --seed 5".split())
    p = configure(a)
    assert not p.shipped and p.ground.backbone == "some/model" and p.seed == p.ground.seed == 5


def test_presets_are_json_and_say_what_they_are_for():
    for name, p in presets_for(domain("clevr")).items():
        assert name == p.name and p.about and json.dumps(asdict(p))


def test_the_command_is_installed():
    done = subprocess.run([str(Path(sys.executable).with_name("kalm")), "presets"], capture_output=True, text=True)
    assert done.returncode == 0 and "smoke" in done.stdout


def test_several_processes_ground_together_and_only_that(cache, tmp_path, monkeypatch, capsys):
    args = ["--domain", "worlds:discrete_line", "--preset", "smoke", "--out", str(tmp_path/"r")]
    assert main(["ground", *args, "--processes", "2"]) == 1   # nobody launched two
    assert main(["collect", *args, "--processes", "1"]) == 0
    assert main(["ground", *args, "--processes", "2"]) == 1
    assert "--processes 2, but the launcher started 1" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["run", *args]) == 1
    assert "only grounding shares its work" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kalm", "ground", *args,
                  "--processes", "2", "--shard", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("[1/1] ground") == 1 and (tmp_path/"r"/"grounded"/"kalm.json").exists()
    steps = [row["step"] for row in read_csv(tmp_path/"r"/"grounded"/"log.csv")]
    assert steps and len(steps) == len({*steps})


def test_a_domain_of_this_folder_is_found(tmp_path):
    code = "import kalm\nworld = kalm.GymDomain('CartPole-v1', {'offline': ['Go.']}, 'survive')\n"
    (tmp_path/"my_world.py").write_text(code)
    command = [str(Path(sys.executable).with_name("kalm")), "presets", "--domain", "my_world:world"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "smoke" in done.stdout, done.stderr


def test_act_without_a_run_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kalm.run.command.KalmLM.grounded", lambda name: None)
    assert main(["act", "Put red left of blue."]) == 1
    assert capsys.readouterr().err.strip().endswith("in runs/quick: run `kalm train` first")


def test_a_folder_of_policies_is_no_policy(tmp_path):
    (tmp_path/"bc-0").mkdir()
    (tmp_path/"bc-0"/"policy.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="expected the folder of one policy, such as .*bc-0"):
        kalm.load_policy(tmp_path)
