"Rollouts as Minari data sets and back; data of others; nothing half-written, one clear line for what is wrong."

import os
import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
from worlds import line

from kalm.core import minari as module
from kalm.core.episodes import collect
from kalm.core.goals import Goal
from kalm.core.minari import from_minari, to_minari
from kalm.core.rollouts import IMAGINED, Rollouts

minari = pytest.importorskip("minari")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path/"minari"))
    return tmp_path/"minari"


def mixed(continuous: bool) -> Rollouts:
    "Real and imagined, all three ends and none, goals that nobody pursued, one without a goal, some without seeds."
    d = line(continuous)
    r = collect(d, d.goals("offline"), 12)
    ends = np.arange(12) % 4
    return replace(r, success=ends == 0, failure=ends == 1, truncated=ends == 2, goals=(Goal("Unused."), *r.goals),
                   goal=np.where(np.arange(12) == 5, -1, r.goal + 1), seed=np.where(ends == 3, -1, r.seed),
                   source=np.where(ends > 1, IMAGINED, r.source))


@pytest.mark.parametrize("continuous", [False, True])
def test_everything_survives_a_round_trip(continuous, root):
    r = mixed(continuous)
    made = to_minari(r, "kalm/deep/line-v3", author="we")
    assert from_minari("kalm/deep/line-v3").digest() == r.digest() == from_minari(made).digest()
    assert [*minari.list_local_datasets()] == ["kalm/deep/line-v3"]
    assert not [p for p in root.rglob(".*") if p.name.startswith(".stage")]


def test_what_others_see_in_it(root):
    r = mixed(False)
    made = to_minari(r, "line-v0", description="mine")
    for episode, mine, note in zip(made, r, made.storage.get_episode_metadata(made.episode_indices), strict=True):
        np.testing.assert_array_equal(episode.observations, mine.states)
        np.testing.assert_array_equal(episode.actions, mine.actions)
        assert episode.terminations[-1] == (mine.success or mine.failure) and episode.truncations[-1] == mine.truncated
        assert not episode.terminations[:-1].any() and not episode.truncations[:-1].any()
        assert note["options"]["goal"] == (mine.goal.text if mine.goal else "")
        assert note.get("seed", -1) == mine.seed
    assert made.action_space == gym.spaces.Discrete(2) and made.storage.metadata["description"] == "mine"


def test_some_episodes_alone():
    r = mixed(False)
    some = to_minari(r, "line-v0").filter_episodes(lambda episode: episode.id in (2, 7))
    assert from_minari(some).digest() == r[[2, 7]].digest()


def test_a_failed_write_leaves_nothing(root, monkeypatch):
    before = os.environ["MINARI_DATASETS_PATH"]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(minari, "create_dataset_from_buffers", full)
    with pytest.raises(OSError, match="No space"):
        to_minari(mixed(False), "kalm/line-v0")
    assert not list(root.iterdir()) and os.environ["MINARI_DATASETS_PATH"] == before


def test_what_is_refused():
    r = mixed(False)
    to_minari(r, "line-v0")
    with pytest.raises(ValueError, match="a Minari data set line-v0 already: .*minari.delete_dataset"):
        to_minari(r, "line-v0")
    with pytest.raises(ValueError, match="do not know which actions"):
        to_minari(replace(r, codec=None), "line-v1")
    with pytest.raises(ValueError, match="at least one step"):
        to_minari(r[[]], "line-v1")
    with pytest.raises(FileNotFoundError, match=r"no Minari data set 'line-v7' .*there are: line-v0"):
        from_minari("line-v7")
    with pytest.raises(ValueError, match="terminated 'maybe': expected"):
        from_minari("line-v0", terminated="maybe")


def theirs(name: str, space: gym.Space, actions: gym.Space, infos=None):
    from minari.data_collector.episode_buffer import EpisodeBuffer
    ends = np.arange(3) == 2
    seen = np.stack([space["x"].sample() if isinstance(space, gym.spaces.Dict) else space.sample() for _ in range(4)])
    episodes = [EpisodeBuffer(observations={"x": seen} if isinstance(space, gym.spaces.Dict) else seen,
                              actions=np.stack([actions.sample() for _ in range(3)]), rewards=np.ones(3),
                              terminations=ends & (i == 0), truncations=ends & (i == 1),
                              infos=infos and {"success": np.array([False] * 3 + [infos[i]])}) for i in range(3)]
    about = dict(description="d", author="a", author_email="a@example.invalid", code_permalink="c", algorithm_name="n")
    return minari.create_dataset_from_buffers(name, episodes, observation_space=space, action_space=actions, **about)


@pytest.mark.filterwarnings("ignore")
def test_data_of_others():
    box = gym.spaces.Box(-1, 1, (3,), np.float64)
    theirs("theirs-v0", box, gym.spaces.Discrete(4))
    r = from_minari("theirs-v0", goal=Goal("Walk on.", max_steps=9))
    assert r.failure.tolist() == [True, False, False] and r.truncated.tolist() == [False, True, False]
    assert not r.success.any() and r.texts == ["Walk on."] * 3 and (r.seed == -1).all() and r.codec.n == 4
    assert from_minari("theirs-v0", terminated="success").success.tolist() == [True, False, False]
    assert from_minari("theirs-v0").goal.tolist() == [-1, -1, -1]
    theirs("said-v0", box, gym.spaces.Box(-2, 2, (2,), np.float32), infos=[False, True, False])
    r = from_minari("said-v0", goal="Walk on.")   # the environment said what was a success
    assert r.success.tolist() == [False, True, False] and r.failure.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="expected vectors"):
        from_minari(theirs("dict-v0", gym.spaces.Dict(x=box), gym.spaces.Discrete(2)))
    with pytest.raises(ValueError, match="expected Discrete"):
        from_minari(theirs("many-v0", box, gym.spaces.MultiDiscrete([2, 2])))


def test_without_minari_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "kalm\[minari\]"'):
        module._minari()
