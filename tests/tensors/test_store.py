"Streams keep their numbers, files are whole or refused, and a damaged byte is noticed."
import pickle

import numpy as np
import pytest
import torch

from kalm.core import files
from kalm.core.files import sha256
from kalm.tensors.store import (
    fast_dtype,
    load_state,
    load_tensors,
    one_thread,
    read_header,
    save_state,
    save_tensors,
    torch_rng,
)

FORMAT = "kalm.test"


def weights() -> dict:
    g = torch_rng(0, "weights")
    return {"a": torch.randn(2, 3, generator=g).T, "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(7)}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def flip(path, at: int) -> None:
    "One bit of one byte."
    whole = bytearray(path.read_bytes())
    whole[at] ^= 1
    path.write_bytes(bytes(whole))


def resign(path) -> None:
    path.with_name(path.name + ".sha256").write_text(sha256(path) + "\n")


# ---------------------------------------------------------------- streams

def test_streams_are_what_they_always_were():
    "Numbers of the code as it was before the wings: seeds and names give the same draws."
    first = torch.randn(3, generator=torch_rng(0, "adapter"))
    torch.testing.assert_close(first, torch.tensor([0.3985522389411926, -1.7875112295150757, 0.5794823169708252]))
    assert torch.randint(0, 1000, (4,), generator=torch_rng(5, "batches", 2)).tolist() == [624, 14, 919, 68]


def test_streams_differ_by_seed_and_by_name():
    keys = (0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0,)
    draws = [torch.rand(4, generator=torch_rng(*key)).tolist() for key in keys]
    assert len({tuple(d) for d in draws}) == 5
    assert torch.rand(4, generator=torch_rng(0, "a")).tolist() == draws[0]
    with pytest.raises(ValueError, match="seed -1"):
        torch_rng(-1, "a")


def test_one_thread_gives_the_threads_back():
    before = torch.get_num_threads()
    with pytest.raises(KeyError):
        with one_thread("cpu"):
            assert torch.get_num_threads() == 1
            raise KeyError
    assert torch.get_num_threads() == before
    with one_thread(torch.device("meta")):
        assert torch.get_num_threads() == before


def test_fast_dtype_is_that_of_the_hardware(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
        assert fast_dtype("cpu") == dtype
        assert fast_dtype("cuda") == torch.bfloat16


# ---------------------------------------------------------------- weights

def test_tensors_come_back(tmp_path):
    path, w = tmp_path/"t.safetensors", weights()
    save_tensors(path, w, {"format": "kalm.test", "x": 1})
    assert equal(load_tensors(path), w)
    assert read_header(path, FORMAT) == dict(format=FORMAT, x=1)
    with pytest.raises(ValueError, match="is not a kalm.other file"):
        read_header(path, "kalm.other")


def test_damaged_tensors_are_refused(tmp_path):
    path = tmp_path/"t.safetensors"
    save_tensors(path, weights())
    whole = path.read_bytes()
    flip(path, len(whole) - 3)
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_tensors(path)
    for bad in (whole[:-4], b"", b"\xff" * 50, pickle.dumps(print)):
        path.write_bytes(bad)
        resign(path)
        with pytest.raises(ValueError, match="cannot be read"):
            load_tensors(path)
        with pytest.raises(ValueError, match="cannot be read"):
            read_header(path, FORMAT)
    for read in (load_tensors, lambda p: read_header(p, FORMAT)):
        with pytest.raises(FileNotFoundError, match="none"):
            read(tmp_path/"none")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_full_disk_leaves_a_file_that_can_be_read(n, tmp_path, monkeypatch):
    "Whichever of the three renames fails (checksum of both, file, checksum), what lies there is old or new, and whole."
    path = tmp_path/"t.safetensors"
    save_tensors(path, {"w": torch.zeros(300)})
    calls, replace = [], files.os.replace

    def full(a, b):
        calls.append(b)
        if len(calls) == n:
            raise OSError(28, "No space left on device")
        replace(a, b)

    with monkeypatch.context() as m:
        m.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            save_tensors(path, {"w": torch.ones(300)})
    assert load_tensors(path)["w"].unique().tolist() == [float(n == 3)]
    assert not list(tmp_path.glob(".*"))


# ---------------------------------------------------------------- training states

def test_a_state_comes_back(tmp_path):
    path, w = tmp_path/"state.safetensors", weights()
    shared = {"whole": w["a"], "part": w["a"][:2]}     # memory that two names share
    save_state(path, w | shared, dict(step=3, config=dict(lr=.1)), FORMAT)
    tensors, about = load_state(path, FORMAT)
    assert equal(tensors, w | shared)
    assert about == dict(step=3, config=dict(lr=.1))
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_any_damaged_byte_of_a_state_is_noticed(tmp_path):
    path = tmp_path/"state.safetensors"
    save_state(path, weights(), dict(step=3), FORMAT)
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for at in np.linspace(begin, len(whole) - 1, 7).astype(int):
        path.write_bytes(whole)
        flip(path, at)
        with pytest.raises(ValueError, match="state.safetensors"):
            load_state(path, FORMAT)
    path.write_bytes(whole)
    assert load_state(path, FORMAT)[1] == dict(step=3)


@pytest.mark.parametrize("change", [
    dict(format="kalm.other"), dict(tensors="0" * 64), dict(tensors=None)], ids=str)
def test_a_state_with_another_header_is_refused(change, tmp_path):
    from safetensors.torch import save_file
    path = tmp_path/"state.safetensors"
    save_state(path, weights(), dict(step=3), FORMAT)
    header = read_header(path, FORMAT) | change
    save_file({k: v.contiguous() for k, v in weights().items()}, path, metadata={"kalm": files.json.dumps(header)})
    with pytest.raises(ValueError, match="is not a kalm.test file|differs from its checksum"):
        load_state(path, FORMAT)


def test_what_is_no_state_is_refused(tmp_path):
    path = tmp_path/"state.safetensors"
    for bad in (b"", b"kalm", pickle.dumps(print)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="cannot be read"):
            load_state(path, FORMAT)
    save_tensors(path, weights())
    with pytest.raises(ValueError, match="is not a kalm.test file"):
        load_state(path, FORMAT)


# ---------------------------------------------------------------- headers, and what is never stored

def test_a_changed_header_of_a_state_is_noticed(tmp_path):
    "How far a training is counts as much as its weights."
    path = tmp_path/"s.safetensors"
    save_state(path, weights(), dict(step=8), FORMAT)
    path.write_bytes(path.read_bytes().replace(b'\\"step\\": 8', b'\\"step\\": 0'))
    assert read_header(path, FORMAT)["step"] == 0
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_state(path, FORMAT)


@pytest.mark.parametrize("what", ["weights", "header"])
def test_damage_is_noticed_where_the_checksum_beside_is_missing(what, tmp_path):
    path = tmp_path/"t.safetensors"
    save_tensors(path, weights(), dict(format=FORMAT, temperature=1.5))
    path.with_name(path.name + ".sha256").unlink()
    whole = path.read_bytes()
    if what == "header":
        path.write_bytes(whole.replace(b"1.5", b"9.5"))
    else:
        flip(path, len(whole) - 3)
    with pytest.raises(ValueError, match="differs from the checksum in its header"):
        load_tensors(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_stored(value, tmp_path):
    bad = weights() | dict(bad=torch.tensor([0., value]))
    for save in (lambda: save_tensors(tmp_path/"t.safetensors", bad),
                 lambda: save_state(tmp_path/"s.safetensors", bad, {}, FORMAT),
                 lambda: save_tensors(tmp_path/"t.safetensors", {"big": torch.tensor([3.4e38]).to(torch.bfloat16)})):
        with pytest.raises(ValueError, match="holds NaN or infinity, nothing is stored"):
            save()
    assert list(tmp_path.iterdir()) == []


def test_the_same_weights_are_the_same_bytes(tmp_path):
    for k in range(8):
        save_tensors(tmp_path/f"{k}.safetensors", weights(), dict(a=1, format=FORMAT))
    assert len({(tmp_path/f"{k}.safetensors").read_bytes() for k in range(8)}) == 1


def test_a_damaged_checksum_does_not_stop_a_new_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(2)})
    path.with_name(path.name + ".sha256").write_bytes(bytes(range(128, 160)))
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(2)})
    assert load_tensors(path)["a"].tolist() == [1, 1]
