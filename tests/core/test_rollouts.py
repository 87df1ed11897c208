"Rollouts: what is refused, what stays together, and files that never lie."
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kalm.core.actions import ContinuousActions, DiscreteActions
from kalm.core.files import digest_of, numpy_rng
from kalm.core.goals import Goal
from kalm.core.rollouts import ARRAYS, IMAGINED, REAL, Rollout, Rollouts

B, T = 3, 4
GOOD = dict(states=np.zeros((B, T + 1, 10)), actions=np.ones((B, T), int))
GOALS = [Goal(f"Words {i}.", task={"task": i}) for i in range(3)]


def made_up(n: int, steps: int = 5, k: int = 0, seed: int = 0, source: int = REAL, least: int = 0) -> Rollouts:
    "Random rollouts of `least` to `steps` steps; the first has the full length. With `k` the actions are continuous."
    rng = numpy_rng(seed, "made up", source)
    lengths = rng.integers(least, steps + 1, n)
    lengths[:1] = steps
    ends = np.eye(4, dtype=bool)[np.arange(n) // 2 % 4]
    codec = ContinuousActions((.5,) * k, (1.,) * k) if k else DiscreteActions(40)
    actions = codec.sample(rng, n * steps).reshape(n, steps, *codec.shape)
    return Rollouts(rng.normal(size=(n, steps + 1, 10)), actions, rng.normal(size=(n, steps)), lengths, *ends[:, :3].T,
                    goal=np.arange(n) % 4 - 1, seed=rng.integers(-1, 2**31 - 1, n), source=np.full(n, source),
                    goals=GOALS, codec=codec, domain="made up")


def same(a: Rollouts, b: Rollouts) -> bool:
    "Equal to the last bit and type."
    pairs = [(getattr(a, name), getattr(b, name)) for name in ARRAYS]
    about = (a.goals, a.codec, a.domain) == (b.goals, b.codec, b.domain)
    return about and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


def same_single(a: Rollout, b: Rollout) -> bool:
    rest = [(r.success, r.failure, r.truncated, r.goal, r.seed, r.source) for r in (a, b)]
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("states", "actions", "rewards"))
    return arrays and rest[0] == rest[1]


# ---------------------------------------------------------------- construction


@pytest.mark.parametrize("change, message", [
    (dict(states=np.zeros((B, T, 10))), "one more than actions"),
    (dict(states=np.zeros((B, T + 1))), "states of shape"),
    (dict(states=np.zeros((B + 1, T + 1, 10))), "states of shape"),
    (dict(states=np.full((B, T + 1, 10), "a")), "expected numbers"),
    (dict(actions=np.ones(T, int)), r"expected \(B, T\)"),
    (dict(actions=np.full((B, T), .5)), "expected whole numbers, or a third axis"),
    (dict(rewards=np.zeros((B, T + 1))), "rewards of shape"),
    (dict(lengths=[T, T]), "lengths of shape"),
    (dict(lengths=[T, T, T + 1]), "expected 0 to 4"),
    (dict(lengths=[T, T, -1]), "expected 0 to 4"),
    (dict(lengths=[T, T, 1.5]), "not whole numbers"),
    (dict(lengths=[T, T, np.nan]), "not whole numbers"),
    (dict(success=[0, 1, 2]), "not yes or no"),
    (dict(seed=[0, 1, -2]), "seed -2: expected 0 or more"),
    (dict(seed=[0, 1, .5]), "not whole numbers"),
    (dict(source=[0, 1, 2]), "source 2: expected 0 for real"),
    (dict(actions=-np.ones((B, T), int)), "negative"),
    (dict(codec=DiscreteActions(1)), "action 1 out of range"),
    (dict(codec=ContinuousActions((0,), (1,))), "actions of shape"),
    (dict(states=np.full((B, T + 1, 10), np.nan)), "NaN"),
    (dict(states=np.full((B, T + 1, 10), np.inf)), "NaN or infinity"),
    (dict(rewards=np.full((B, T), np.nan)), "NaN"),
    (dict(goal=[0]), "goal of shape"),
    (dict(goal=[0, 0, 1], goals=GOALS[:1]), "of a list of 1"),
    (dict(goal=[0, 0, -2], goals=GOALS), "or -1 where"),
    (dict(success=[1, 0, 0], truncated=[1, 0, 0]), "two ways"),
    (dict(success=[1, 0, 0], failure=[1, 0, 0]), "two ways")])
def test_rollouts_that_do_not_fit_together_are_refused(change, message):
    Rollouts(**GOOD)
    with pytest.raises(ValueError, match=message) as e:
        Rollouts(**GOOD | change)
    assert "\n" not in str(e.value)


def test_types_and_defaults():
    r = Rollouts(states=np.zeros((B, T + 1, 10), np.float64), actions=np.zeros((B, T), np.int16))
    types = dict(states=np.float32, actions=np.int64, rewards=np.float32, lengths=np.int64, success=bool, failure=bool,
                 truncated=bool, goal=np.int64, seed=np.int64, source=np.int8)
    assert {name: getattr(r, name).dtype for name in ARRAYS} == types
    assert (r.lengths == T).all() and (r.goal == -1).all() and (r.seed == -1).all() and (r.source == REAL).all()
    assert not (r.success | r.failure | r.truncated).any() and len(r) == B and r.max_steps == T


def test_padding_is_zero_whatever_was_given():
    r = Rollouts(np.full((2, 3, 1), np.float32(7)), np.full((2, 2), 5), np.full((2, 2), np.nan), lengths=[0, 0])
    assert not r.actions.any() and not r.rewards.any() and (r.states[:, 0] == 7).all() and not r.states[:, 1:].any()


def test_padding_need_not_be_a_possible_action():
    r = made_up(6, k=2)   # actions from 0.5 to 1, padding 0
    assert (r.actions[~r.mask] == 0).all() and (r.actions[r.mask] >= .5).all()
    wrong = r.actions.copy()
    wrong[0, 0] = 0
    with pytest.raises(ValueError, match="action 0 .* out of range"):
        replace(r, actions=wrong)


def test_given_arrays_are_not_aliased():
    given = {name: getattr(made_up(4), name).copy() for name in ARRAYS}
    r = Rollouts(**given, goals=GOALS)
    for name in ARRAYS:
        assert not np.shares_memory(getattr(r, name), given[name])


def test_mask_and_last_states_row_by_row():
    r = made_up(60)
    assert set(r.lengths) == set(range(6))
    for i, t in enumerate(r.lengths):
        assert r.mask[i].tolist() == [k < t for k in range(5)]
        np.testing.assert_array_equal(r.last_states[i], r.states[i, t])


# ---------------------------------------------------------------- selecting and joining


@pytest.mark.parametrize("k", [0, 2])
def test_one_rollout_has_no_padding_and_no_alias(k):
    r = made_up(9, k=k)
    i = int(np.argmin(r.lengths))
    one = r[i]
    assert isinstance(one, Rollout) and len(one) == r.lengths[i] == len(one.actions) == len(one.states) - 1
    one.states[:] = 7
    assert not (r.states == 7).any()
    assert same_single(r[-1], r[8])
    with pytest.raises(IndexError):
        r[9]


@pytest.mark.parametrize("key", [slice(2, 7, 2), np.array([5, 0, 5]), [1, 2], [], np.arange(9) % 2 == 0, slice(0, 0)])
def test_selections_keep_rows_together(key):
    r = made_up(9)
    part = r[key]
    rows = np.arange(9)[np.asarray(key, int) if isinstance(key, list) else key]
    assert len(part) == len(rows) and part.goals == r.goals
    assert all(same_single(part[k], r[int(i)]) for k, i in enumerate(rows))


@pytest.mark.parametrize("k", [0, 2])
def test_iteration_and_from_list_are_inverse(k):
    r = made_up(9, k=k)
    again = Rollouts.from_list(iter(r), codec=r.codec, domain=r.domain)
    assert all(same_single(a, b) for a, b in zip(again, r, strict=True))
    assert again.codec == r.codec and again.texts == r.texts


def test_equal_goals_become_one():
    still = Rollout(np.zeros((1, 2)), np.zeros(0, int), np.zeros(0))
    r = Rollouts.from_list([replace(still, goal=Goal("Go.", max_steps=m)) for m in (1, 2, 1)])
    assert r.goal.tolist() == [0, 1, 0] and len(r.goals) == 2


def test_concat_moves_goals_with_their_rollouts():
    a, b = made_up(4, steps=3), made_up(5, steps=6, seed=1, source=IMAGINED)
    b = b.with_goals([GOALS[2], Goal("Another."), GOALS[0]], b.goal)
    both = Rollouts.concat([a, b])
    assert both.texts == a.texts + b.texts and len(both.goals) == 4 and both.max_steps == 6
    assert all(same_single(one, two) for one, two in zip(both, [*a, *b], strict=True))
    assert not both.actions[:4, 3:].any() and not both.states[:4, 4:].any()
    assert both.source.tolist() == [REAL] * 4 + [IMAGINED] * 5


def test_concat_takes_what_one_of_them_knows():
    a = made_up(2)
    unknown = replace(a, codec=None, domain="")
    assert Rollouts.concat([unknown, a]).domain == "made up" and Rollouts.concat([unknown, a]).codec == a.codec
    assert Rollouts.concat([unknown]).codec is None


@pytest.mark.parametrize("change, message", [
    (dict(domain="other"), "different domains, made up and other"),
    (dict(codec=DiscreteActions(41)), "different actions"),
    (dict(states=np.zeros((2, 6, 3))), "widths")])
def test_rollouts_that_do_not_belong_together(change, message):
    a = made_up(2)
    with pytest.raises(ValueError, match=message):
        Rollouts.concat([a, replace(a, **change)])


@pytest.mark.parametrize("make", [Rollouts.concat, Rollouts.from_list])
def test_nothing_to_join(make):
    with pytest.raises(ValueError, match="at least one"):
        make([])


# ---------------------------------------------------------------- transitions and pieces


@pytest.mark.parametrize("k", [0, 2])
def test_transitions_step_by_step(k):
    r = made_up(12, k=k)
    t = r.transitions()
    assert all(len(v) == r.lengths.sum() for v in t.values())
    want = [(i, s) for i in range(12) for s in range(r.lengths[i])]
    assert list(zip(t["rollout"].tolist(), t["step"].tolist())) == want
    for n, (i, s) in enumerate(want):
        np.testing.assert_array_equal(t["states"][n], r.states[i, s])
        np.testing.assert_array_equal(t["next_states"][n], r.states[i, s + 1])
        np.testing.assert_array_equal(t["actions"][n], r.actions[i, s])
        assert (t["rewards"][n], t["goal"][n], t["source"][n]) == (r.rewards[i, s], r.goal[i], r.source[i])
        for name in ("success", "failure"):
            assert t[name][n] == (s == r.lengths[i] - 1 and getattr(r, name)[i])
    assert t["success"].any() and t["failure"].any() and not (t["success"] & t["failure"]).any()


@pytest.mark.parametrize("k", [0, 2])
def test_pieces_are_parts_of_rollouts(k):
    r, rng = made_up(12, k=k, least=2), np.random.default_rng(0)
    rows, low = rng.integers(12, size=40), rng.integers(0, 2, 40)
    high = rng.integers(low, r.lengths[rows] + 1)
    for one, b, i, j in zip(r.pieces(rows, low, high), rows, low, high, strict=True):
        whole = r[int(b)]
        np.testing.assert_array_equal(one.states, whole.states[i:j + 1])
        np.testing.assert_array_equal(one.actions, whole.actions[i:j])
        np.testing.assert_array_equal(one.rewards, whole.rewards[i:j])
        ended = (whole.success, whole.failure, whole.truncated) if j == len(whole) else (False,) * 3
        assert (one.success, one.failure, one.truncated) == ended
        assert one.goal == whole.goal and one.seed == (whole.seed if i == 0 else -1)


def test_special_pieces():
    r = made_up(12, least=2)
    assert same(r.pieces(np.arange(12), np.zeros(12), r.lengths), r)
    assert len(r.pieces([], [], [])) == 0
    end = r.last(2)
    assert np.array_equal(end.lengths, np.minimum(2, r.lengths)) and np.array_equal(end.success, r.success)
    np.testing.assert_array_equal(end.last_states, r.last_states)
    for low, high in ((-1, 1), (2, 1), (0, 99)):
        with pytest.raises(ValueError, match="beyond its rollout"):
            r.pieces([0], [low], [high])
    with pytest.raises(ValueError, match="at least 1"):
        r.last(0)


def test_pieces_without_steps():
    r = made_up(3, least=1)
    still = r.pieces([0, 1], [0, 1], [0, 1])
    assert still.max_steps == 0 and still.pieces([0], [0], [0]).states.shape == (1, 1, 10)


def test_trimmed():
    r = made_up(12)[[int(np.argmin(made_up(12).lengths))]]
    short = r.trimmed()
    assert short.max_steps == r.lengths[0] < r.max_steps and same_single(short[0], r[0])
    assert short.digest() == r.digest()


def test_digest_sees_everything():
    r = made_up(6)
    others = [replace(r, rewards=r.rewards + 1), replace(r, domain="other"), replace(r, codec=DiscreteActions(41)),
              r.with_goals([g.replace(text="Other.") for g in GOALS], r.goal), r[:5], r[::-1],
              replace(r, seed=r.seed * 0)]
    assert len({x.digest() for x in [r, *others]}) == len(others) + 1


# ---------------------------------------------------------------- files


@pytest.fixture
def stored(tmp_path):
    r = made_up(6)
    r.save(tmp_path/"r.npz")
    return r, tmp_path/"r.npz"


@pytest.mark.parametrize("k", [0, 2])
def test_round_trip(k, tmp_path):
    r = made_up(6, k=k)
    r.save(tmp_path/"r.npz")
    assert same(Rollouts.load(tmp_path/"r.npz"), r)


def test_round_trip_without_goals_and_codec(tmp_path):
    r = Rollouts(**GOOD)
    r.save(tmp_path/"r.npz")
    assert same(Rollouts.load(str(tmp_path/"r.npz")), r)


def test_large_numbers_survive_their_narrow_types(tmp_path):
    seeds = [-1, 255, 2**62 + 1]
    Rollouts(**GOOD, seed=seeds).save(tmp_path/"r.npz")
    assert Rollouts.load(tmp_path/"r.npz").seed.tolist() == seeds


def test_an_empty_batch_is_a_batch(tmp_path):
    r = made_up(3)[:0]
    r.save(tmp_path/"r.npz")
    assert len(Rollouts.load(tmp_path/"r.npz")) == 0 and len(r.transitions()["actions"]) == 0
    assert "none" in r._repr_markdown_()


def test_the_same_rollouts_are_the_same_bytes(stored, tmp_path):
    r, path = stored
    r.save(tmp_path/"again.npz")
    assert path.read_bytes() == (tmp_path/"again.npz").read_bytes()


@pytest.mark.parametrize("keep", [0, 1, 100, .5, -1])
def test_truncated_file(stored, keep):
    path, whole = stored[1], stored[1].read_bytes()
    cut = whole[:int(len(whole) * keep) if isinstance(keep, float) else keep]
    path.write_bytes(cut)
    with pytest.raises(ValueError, match="r.npz"):
        Rollouts.load(path)
    assert path.read_bytes() == cut


def refused(path: Path, content: bytes, r: Rollouts) -> bool:
    "Whether loading raised an error that names the file. Anything but that error, or the true rollouts, is a failure."
    path.write_bytes(content)
    try:
        assert same(Rollouts.load(path), r), "changed silently"
    except ValueError as e:
        assert "r.npz" in str(e)
        return True
    return False


def test_no_flipped_bit_passes_for_data(stored):
    "An error, or no difference (a few bytes of the container have no meaning)."
    r, path = stored
    whole = path.read_bytes()
    places = range(0, len(whole), 9)
    damaged = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:] for i in places]
    assert len(places) > 300
    assert sum(refused(path, content, r) for content in damaged) > .6 * len(places)


def test_no_larger_damage_passes_for_data(stored):
    "Bytes overwritten, cut out, put in, in many places at once."
    r, path = stored
    whole, rng, count = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.integers(1, 6)):
            at, n, kind = int(rng.integers(len(content))), int(rng.integers(1, 40)), rng.integers(4)
            if kind == 0:
                content[at:at + n] = rng.bytes(n)
            elif kind == 1:
                del content[at:at + n]
            elif kind == 2:
                content[at:at] = rng.bytes(n)
            else:
                content[at:at + n] = content[:n]
        count += refused(path, bytes(content), r)
    assert count > 250


def rewrite(path: Path, **changes) -> None:
    "The file with other arrays and a checksum that fits: not damaged, but wrong."
    with np.load(path) as z:
        arrays = dict(z) | changes
    del arrays["checksum"]
    arrays = {name: a for name, a in arrays.items() if a is not None}
    np.savez(path, **arrays, checksum=np.frombuffer(digest_of(arrays).encode(), np.uint8))


def as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


ABOUT = dict(format="kalm rollouts 2", domain="made up", actions=None, goals=dict(format="kalm goals 2", goals=[]))


@pytest.mark.parametrize("changes", [
    dict(about=as_bytes("{")), dict(about=as_bytes("[]")), dict(about=as_bytes("null")), dict(about=as_bytes("{}")),
    dict(about=np.frombuffer(b"\xff\xfe", np.uint8)),
    dict(about=as_bytes(json.dumps(ABOUT | dict(format="kalm rollouts 1")))),
    dict(about=as_bytes(json.dumps(ABOUT | dict(goals=[])))),
    dict(about=as_bytes(json.dumps(ABOUT | dict(goals=dict(format="kalm goals 2", goals=[3]))))),
    dict(about=as_bytes(json.dumps(ABOUT | dict(actions=dict(type="discrete"))))),
    dict(about=as_bytes(json.dumps(ABOUT))),   # the goals are gone, the indices are not
    dict(about=None), dict(states=None), dict(extra=np.zeros(1)), dict(states=np.zeros((6, 2, 10))),
    dict(lengths=np.full(6, 99)), dict(actions=np.zeros((6, 5), complex)), dict(goal=np.array(["a"] * 6))])
def test_files_that_are_whole_but_wrong(stored, changes):
    rewrite(stored[1], **changes)
    with pytest.raises(ValueError):
        Rollouts.load(stored[1])


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz does not exist"):
        Rollouts.load(tmp_path/"nothing.npz")
    np.savez(tmp_path/"foreign.npz", a=np.zeros(3))
    np.save(tmp_path/"single.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path/"zip.npz", "w") as z:
        z.writestr("readme.txt", "hello")
    (tmp_path/"folder").mkdir()
    for name in ("foreign.npz", "single.npy", "zip.npz", "folder"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as rollouts"):
            Rollouts.load(tmp_path/name)


def test_members_that_are_not_arrays(stored, tmp_path):
    "The right names, but raw bytes inside."
    with zipfile.ZipFile(stored[1]) as z:
        names = z.namelist()
    with zipfile.ZipFile(tmp_path/"raw.npz", "w") as z:
        for name in names:
            z.writestr(name, b"raw bytes")
    with pytest.raises(ValueError, match="raw.npz cannot be read"):
        Rollouts.load(tmp_path/"raw.npz")


@pytest.mark.parametrize("name", ["huge.npy", "states.npy", "folder/states.npy", "states.txt"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_unknown_members_are_never_unpacked(name, stored, monkeypatch):
    "A large member that is packed into nothing; a second `states.npy` counts as unknown too."
    with zipfile.ZipFile(stored[1], "a", zipfile.ZIP_DEFLATED) as z, z.open(name, "w") as f:
        for _ in range(20):
            f.write(bytes(1_000_000))

    def opened(*args, **kwargs):
        raise AssertionError("unpacked")
    monkeypatch.setattr(zipfile.ZipFile, "open", opened)
    with pytest.raises(ValueError, match="it holds"):
        Rollouts.load(stored[1])


def test_a_bomb_under_a_legal_name_is_never_unpacked(stored, monkeypatch):
    with zipfile.ZipFile(stored[1]) as z:
        contents = {name: z.read(name) for name in z.namelist()}
    with zipfile.ZipFile(stored[1], "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in contents.items():
            with z.open(name, "w") as f:
                f.write(content)
                for _ in range(80 if name == "states.npy" else 0):
                    f.write(bytes(1_000_000))

    def opened(*args, **kwargs):
        raise AssertionError("unpacked")
    monkeypatch.setattr(zipfile.ZipFile, "open", opened)
    with pytest.raises(ValueError, match=r"would unpack to 80,\d{3},\d{3}"):
        Rollouts.load(stored[1])


def test_changed_content_with_a_stale_checksum(stored):
    with np.load(stored[1]) as z:
        arrays = dict(z)
    np.savez(stored[1], **arrays | dict(rewards=arrays["rewards"] + 1))
    with pytest.raises(ValueError, match="checksum"):
        Rollouts.load(stored[1])


class Payload:
    "Unpickling this makes a file."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_never_executed(stored, tmp_path):
    owned = tmp_path/"owned"
    with np.load(stored[1]) as z:
        arrays = dict(z)
    np.savez(tmp_path/"evil.npz", **arrays | dict(goal=np.array([Payload(owned)], object)))
    (tmp_path/"plain.npz").write_bytes(pickle.dumps(Payload(owned)))
    for name in ("evil.npz", "plain.npz"):
        with pytest.raises(ValueError, match=name):
            Rollouts.load(tmp_path/name)
    assert not owned.exists()
    pickle.loads((tmp_path/"plain.npz").read_bytes())
    assert owned.exists()  # the trap was armed


def test_it_describes_itself():
    r = made_up(6)
    assert repr(r) == f"Rollouts(B=6, T=5, {r.lengths.sum()} steps)"
    text = r._repr_markdown_()
    for part in ("6 (6 real) of made up", f"{r.failure.sum()} failure", "| goals | 3 different |"):
        assert part in text


def test_rows_of_several_types_are_not_cut_to_the_first():
    "A narrow first row, an empty one, whole numbers before fractions: all come back as they are, or are refused."
    def two(a, b):
        rows = [Rollout(np.zeros((len(x) + 1, 2)), np.asarray(x), np.zeros(len(x))) for x in (a, b)]
        return Rollouts.from_list(rows)

    assert two(np.array([1], np.int8), [70000]).actions.max() == 70000
    with pytest.raises(ValueError, match="negative"):
        two(np.array([1], np.uint8), [-1])
    assert two(np.zeros(0), [3]).actions.max() == 3
    with pytest.raises(ValueError, match="whole numbers"):
        two([1], [1.72])
    continuous = two(np.array([[1]]), np.array([[.72]])).actions
    np.testing.assert_allclose(continuous[:, 0, 0], [1, .72])


def test_pieces_are_whole_numbers():
    r = Rollouts(np.zeros((1, 4, 2)), np.zeros((1, 3), int))
    with pytest.raises(ValueError, match="a piece holds values that are not whole numbers"):
        r.pieces([.9], [1.5], [2.9])
