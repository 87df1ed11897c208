"A stage looks at everything it promises: what is missing or damaged is made again, by the command that made it."

import shutil
from pathlib import Path

import numpy as np
import pytest

from kalm.core.files import load_json, save_json
from kalm.core.results import read_results
from kalm.core.rollouts import Rollouts
from kalm.run.command import main

pytestmark = pytest.mark.usefixtures("cache")

ARGS = ["run", "--domain", "worlds:discrete_line", "--preset", "smoke", "--out"]
PROMISED = ["data/rollouts.npz", "grounded/kalm.json", "grounded/model.safetensors", "grounded/state.safetensors"]
PROMISED += [f"imagined/rephrase/{name}" for name in ("rollouts.npz", "quality.json", "shards/00000.npz")]
PROMISED += ["policies/bc-0/step-40/policy.safetensors", "policies/cql+kalm-rephrase-0/step-40/policy.safetensors"]
PROMISED += ["policies/bc/training.safetensors", "acted/bc/offline.npz"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, session_cache) -> Path:
    "A whole run, in this process."
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KALM_CACHE", str(session_cache))
        patch.setattr("kalm.run.workers.os.cpu_count", lambda: 1)
        assert main([*ARGS, str(out)]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    "A copy of it."
    monkeypatch.setattr("kalm.run.workers.os.cpu_count", lambda: 1)
    return shutil.copytree(finished, tmp_path / "run")


def rows(out: Path) -> list[tuple]:
    return sorted(tuple(r.values()) for r in read_results(out / "results.csv"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip], ids=["missing", "cut", "flipped"])
def test_whatever_is_lost_is_made_again(damage, run, finished):
    for name in PROMISED:
        damage(run / name)
    assert main([*ARGS, str(run)]) == 0
    assert rows(run) == rows(finished)
    for name in PROMISED:
        if "state" not in name and name != "policies/bc/training.safetensors":   # a finished job needs them no more
            assert (run / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip], ids=["missing", "cut", "flipped"])
def test_tables_of_training_are_written_again_without_training_again(damage, run, finished, monkeypatch):
    "Their rows are stored with the checkpoints."
    tables = ["grounded/log.csv", "policies/bc-0/curve.csv", "policies/cql+kalm-rephrase-0/curve.csv"]
    for name in tables:
        damage(run / name)
    monkeypatch.setattr("kalm.rl.train.Learner.step", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr("kalm.lm.ground.Training.step", lambda *args: pytest.fail("grounded again"))
    assert main([*ARGS, str(run)]) == 0
    for name in tables:
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert rows(run) == rows(finished)


@pytest.mark.parametrize(
    "stage, name", [("train", "policies/bc-0/step-40"), ("imagine", "imagined"), ("ground", "grounded")]
)
def test_the_stage_that_a_message_names_is_the_remedy(stage, name, run):
    shutil.rmtree(run / name)
    assert main([stage, *ARGS[1:], str(run)]) == 0
    assert (run / name).exists()


def test_a_quality_file_of_another_shape_is_made_again(run, finished):
    path = run / "imagined" / "rephrase" / "quality.json"
    for other in ([], 3, dict(rollouts=8)):
        save_json(path, other)
        assert main(["imagine", *ARGS[1:], str(run)]) == 0
        assert path.read_bytes() == (finished / "imagined" / "rephrase" / "quality.json").read_bytes()


def test_shards_of_another_model_or_of_other_rollouts_are_made_again(run, finished):
    marks = run / "imagined" / "rephrase" / "shards" / "00000.json"
    for change in (dict(model="another"), dict(rollouts="others"), dict(passed=["False"] * 8), dict(passed=[True])):
        shutil.copytree(finished / "imagined", run / "imagined", dirs_exist_ok=True)
        (run / "imagined" / "rephrase" / "quality.json").unlink()
        save_json(marks, load_json(marks) | change)
        assert main(["imagine", *ARGS[1:], str(run)]) == 0
        assert load_json(marks) == load_json(finished / "imagined" / "rephrase" / "shards" / "00000.json")


def test_one_changed_value_in_a_finished_run_is_noticed(run, finished):
    "Nothing later reads these files again."
    changed = {"grounded/kalm.json": dict(hidden=7), "imagined/rephrase/quality.json": dict(imagined=9)}
    for name, value in changed.items():
        save_json(run / name, load_json(run / name) | value)
    assert main([*ARGS, str(run)]) == 0
    for name in changed:
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name


CHANGED = ["config", "method", "level", "kind", "seed", "episodes", "successes", "rate", "high"]


@pytest.mark.parametrize("column", CHANGED)
def test_a_changed_result_is_refused_by_its_line(column, run, capsys):
    path = run / "results.csv"
    lines = path.read_text().splitlines()
    place = lines[0].split(",").index(column)
    cells = lines[3].split(",")
    cells[place] = "7" if column != "method" else "bd"
    path.write_text("\n".join([*lines[:3], ",".join(cells), *lines[4:]]) + "\n")
    assert main([*ARGS, str(run)]) == 1
    assert f"{path} line 4" in capsys.readouterr().err


def test_results_go_with_the_policies_they_are_about(run, finished):
    "Policies that are trained anew are evaluated anew, whatever results.csv says of older ones."
    for home in (run / "policies").iterdir():
        shutil.rmtree(home)
    path, old = run / "results.csv", rows(run)
    lines = path.read_text().replace(",cql,offline,", ",bc+kalm,offline,").splitlines()
    path.write_text("\n".join(dict.fromkeys(lines)) + "\n")   # what other policies might have done
    assert main(["train", *ARGS[1:], str(run)]) == 0
    assert {r["method"] for r in read_results(path)} <= {"random", "expert"}
    assert main(["evaluate", *ARGS[1:], str(run)]) == 0
    assert rows(run) == old


def other_rollouts(path: Path) -> None:
    made = Rollouts.load(path)
    made[np.arange(len(made))[::-1]].save(path)


@pytest.mark.parametrize(
    "name, stage, says",
    [("data", "ground", "grounded holds a model"), ("data", "train", "policies/bc holds policies"),
     ("imagined/rephrase", "train", "policies/bc+kalm-rephrase holds policies")],
)
def test_what_was_made_of_other_data_is_not_passed_off_as_made_of_these(name, stage, says, run, capsys):
    other_rollouts(run / name / "rollouts.npz")
    assert main([stage, *ARGS[1:], str(run)]) == 1
    assert f"{run}/{says} with other settings ({name}" in capsys.readouterr().err


def test_rollouts_of_another_model_are_not_passed_off_as_this_ones(run, capsys):
    "As when kalm ships another checkpoint than it did when the run began."
    save_json(run / "imagined" / "rephrase" / "imagined_by.json", dict(model="another"))
    assert main(["imagine", *ARGS[1:], str(run)]) == 1
    assert 'model was "another"' in capsys.readouterr().err


def test_a_run_keeps_to_the_sentences_that_it_began_with(run, capsys):
    "As when kalm brings other sentences than it did when the run began."
    about = load_json(run / "sentences.json")
    save_json(run / "sentences.json", dict(sentences=about["sentences"] | dict(rephrase="others")))
    assert main(["evaluate", *ARGS[1:], str(run)]) == 1
    assert 'sentences.rephrase was "others"' in capsys.readouterr().err
