"Rollouts as d3rlpy's files and back, and ONNX policies; d3rlpy itself lives in an environment of its own."

import sys
from dataclasses import replace

import numpy as np
import pytest
from small import BOX
from worlds import line

from kalm.core.actions import DiscreteActions
from kalm.core.episodes import collect
from kalm.core.rollouts import IMAGINED, Rollouts
from kalm.rl.d3rlpy import OnnxPolicy, from_d3rlpy, to_d3rlpy
from kalm.rl.encoder import GivenEncodings

h5py = pytest.importorskip("h5py")


def mixed(continuous: bool) -> Rollouts:
    d = line(continuous)
    r = collect(d, d.goals("offline"), 12)
    ends = np.arange(12) % 4
    return replace(r, success=ends == 0, failure=ends == 1, truncated=ends == 2, seed=np.where(ends == 3, -1, r.seed),
                   source=np.where(ends > 1, IMAGINED, r.source))


def encoder_for(r: Rollouts) -> GivenEncodings:
    return GivenEncodings({g.text: np.arange(3.) + i for i, g in enumerate(r.goals)})


@pytest.mark.parametrize("continuous", [False, True])
def test_everything_survives_a_round_trip(continuous, tmp_path):
    r = mixed(continuous)
    to_d3rlpy(r, encoder_for(r), tmp_path/"r.h5")
    assert from_d3rlpy(tmp_path/"r.h5").digest() == r.digest()
    assert [p.name for p in tmp_path.iterdir()] == ["r.h5"]


@pytest.mark.parametrize("continuous", [False, True])
def test_what_d3rlpy_sees(continuous, tmp_path):
    "Every step is a transition: T rows where it terminated, one more otherwise (d3rlpy's `BasicTransitionPicker`)."
    r = mixed(continuous)
    encoder = encoder_for(r)
    rows = to_d3rlpy(r, encoder, tmp_path/"r.h5")
    over = (rows["terminals"] + rows["timeouts"]).astype(bool)
    assert over.sum() == len(r) and not (rows["terminals"].astype(bool) & rows["timeouts"].astype(bool)).any()
    at = 0
    with h5py.File(tmp_path/"r.h5") as f:
        assert [c.decode() for c in f["columns"][()]] == ["observations", "actions", "rewards", "terminated"]
        assert int(f["num_episodes"][()]) == len(r) and f["version"][()] == b"2.1"
        for i, one in enumerate(r):
            done = one.success or one.failure
            n = len(one) + (not done)
            seen = rows["observations"][at:at + n]
            np.testing.assert_array_equal(seen[:, :2], one.states[:n])
            np.testing.assert_array_equal(seen[:, 2:], np.tile(encoder.encode([one.goal.text]), (n, 1)))
            np.testing.assert_array_equal(rows["rewards"][at:at + len(one), 0], one.rewards)
            np.testing.assert_array_equal(rows["actions"][at:at + len(one)].reshape(one.actions.shape), one.actions)
            assert over[at:at + n].tolist() == [False] * (n - 1) + [True] and rows["terminals"][at + n - 1] == done
            np.testing.assert_array_equal(f[f"observations_{i}"][()], seen)
            assert bool(f[f"terminated_{i}"][()]) == done
            at += n
    assert at == len(over)


def test_data_of_others(tmp_path):
    with h5py.File(tmp_path/"theirs.h5", "w") as f:
        f["num_episodes"] = 2
        for i, done in enumerate((True, False)):
            f.update({f"observations_{i}": np.full((4, 3), i, np.float32), f"actions_{i}": np.full((4, 1), i),
                      f"rewards_{i}": np.ones((4, 1), np.float32), f"terminated_{i}": done})
    r = from_d3rlpy(tmp_path/"theirs.h5", "Walk on.", DiscreteActions(2))
    assert r.lengths.tolist() == [4, 3]
    assert r.failure.tolist() == [True, False] and r.truncated.tolist() == [False, True]
    assert r.texts == ["Walk on."] * 2 and r.actions[1, :3].tolist() == [1, 1, 1]
    assert from_d3rlpy(tmp_path/"theirs.h5").goal.tolist() == [-1, -1]


def test_what_is_refused(tmp_path):
    r = mixed(False)
    with pytest.raises(FileNotFoundError, match="nowhere.h5 does not exist"):
        from_d3rlpy(tmp_path/"nowhere.h5")
    (tmp_path/"text.h5").write_text("no HDF5")
    with h5py.File(tmp_path/"other.h5", "w") as f:
        f["x"] = 1
    for name in ("text.h5", "other.h5"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as d3rlpy's data"):
            from_d3rlpy(tmp_path/name)
    for bad in (r[[]], replace(r, goal=r.goal * 0 - 1)):
        with pytest.raises(ValueError, match="leave out rollouts without steps or goal"):
            to_d3rlpy(bad, encoder_for(r))


def onnx_file(path, kind: str):
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 5]),
            helper.make_tensor_value_info("y", TensorProto.INT64 if kind == "argmax" else TensorProto.FLOAT, None)]
    w = helper.make_tensor("w", TensorProto.FLOAT, (5, 2), [0, 1, 0, 0, 0, 0, 0, 0, 1, 0])
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h" if kind == "argmax" else "y"])]
    if kind == "argmax":
        nodes.append(helper.make_node("ArgMax", ["h"], ["y"], axis=1, keepdims=0))
    model = helper.make_model(helper.make_graph(nodes, "policy", ends[:1], ends[1:], [w]),
                              opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)


def test_a_policy_in_onnx(tmp_path):
    pytest.importorskip("onnxruntime")
    encoder = GivenEncodings({"a": [0., 0., .5], "b": [0., 0., 9.]})
    onnx_file(tmp_path/"p.onnx", "argmax")
    policy = OnnxPolicy(tmp_path/"p.onnx", encoder, DiscreteActions(2))
    states = np.array([[1., 0.], [2., 0.], [0., 0.]])   # compared with the last number of the encoding
    assert policy.act(states, "a").tolist() == [1, 1, 0] and policy.act(states, ["a", "b", "b"]).tolist() == [1, 0, 0]
    onnx_file(tmp_path/"c.onnx", "plain")
    acted = OnnxPolicy(tmp_path/"c.onnx", encoder, BOX).act(states, "b")
    assert acted.shape == (3, BOX.k) and acted.dtype == np.float32
    BOX.check(acted)   # within bounds, whatever the graph gave
    (tmp_path/"bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="bad.onnx is not an ONNX model"):
        OnnxPolicy(tmp_path/"bad.onnx", encoder, BOX)
    with pytest.raises(FileNotFoundError, match="none.onnx does not exist"):
        OnnxPolicy(tmp_path/"none.onnx", encoder, BOX)


def test_without_its_extra_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "h5py", None)
    r = mixed(False)
    with pytest.raises(ImportError, match=r'pip install "kalm\[d3rlpy\]"'):
        to_d3rlpy(r, encoder_for(r), tmp_path/"r.h5")
    assert not list(tmp_path.iterdir())
