"Any language model: text as the backbone's own, several sequences in a row, adapters, checkpoints; or one clear line."

import pytest
import torch
from architectures import ARCHITECTURES, REFUSED, WINDOW, tiny_lm

from kalm.core.actions import ContinuousActions
from kalm.core.domain import Features
from kalm.core.files import numpy_rng
from kalm.lm.backbone import weights_id
from kalm.lm.model import ACTION, STATE, TEXT, Adapter, KalmLM
from kalm.tensors.store import torch_rng

SPEC = dict(
    state_dim=4, codec=ContinuousActions((-1.0, 0.0), (1.0, 3.0)), hidden=16, features=Features(points=((0, 1), (2, 3)))
)


@pytest.fixture(params=ARCHITECTURES)
def arch(request):
    return request.param


def text(lm, n: int = 40):
    "Plain text as a model takes it, longer than any window."
    ids = torch.randint(3, 200, (2, n), generator=torch_rng(0, "text"))
    return dict(kind=torch.full_like(ids, TEXT), ids=ids, states=torch.zeros(2, n, lm.state_dim))


def mixed(lm, n: int = 60):
    "Words, then states and actions."
    g = torch_rng(0, "mixed")
    actions = torch.from_numpy(lm.codec.sample(numpy_rng(0, "mixed"), n))[None]
    return dict(
        kind=torch.tensor([[TEXT] * 10 + [STATE, ACTION] * (n // 2 - 5)]),
        actions=actions,
        ids=torch.randint(3, 200, (1, n), generator=g),
        states=torch.randn(1, n, lm.state_dim, generator=g),
    )


def parts(row: dict, at) -> dict:
    return {k: v[:, list(at)] for k, v in row.items()}


def awake(lm):
    "An adapter that does something."
    lm.adapt(Adapter(rank=2))
    g = torch_rng(0, "awake")
    with torch.no_grad():
        for name, p in lm.own_parameters().items():
            if "lora_B" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return lm


def test_text_gives_the_backbones_logits_exactly(arch):
    lm = tiny_lm(arch, **SPEC)
    with torch.no_grad():
        row = text(lm)
        want = lm.backbone(row["ids"]).logits
        assert torch.equal(lm.text_logits(lm(**row)), want)
        lm.adapt(Adapter(rank=2))
        assert torch.equal(lm.text_logits(lm(**row)), want)  # a new adapter changes nothing
        among = torch.tensor([200, 3, 3, 77])
        torch.testing.assert_close(lm.text_logits(lm(**row), among=among), want[..., among], atol=1e-5, rtol=1e-4)
        next(p for n, p in lm.named_parameters() if "lora_B" in n).fill_(0.3)
        assert not torch.allclose(lm.text_logits(lm(**row)), want, atol=1e-3)  # a trained one does


def test_sequences_side_by_side_are_read_as_one_by_one(arch):
    lm = awake(tiny_lm(arch, **SPEC))
    row = mixed(lm)
    where = dict(
        tree=torch.tensor([[0] * 40 + [1] * 20]),
        branch=torch.tensor([[0] * 10 + [1] * 15 + [2] * 15 + [0] * 20]),
        positions=torch.tensor([[*range(25), *range(10, 25), *range(20)]]),
    )
    with torch.no_grad():
        packed = lm(**row, **where)[0]
        for at in (range(25), [*range(10), *range(25, 40)], range(40, 60)):
            alone = lm(**parts(row, at))[0]
            torch.testing.assert_close(packed[list(at)], alone, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(lm(**row)[0, 40:], packed[40:], atol=1e-2)  # the comparison can fail


def test_windows_are_respected(arch):
    "In a layer with a window an element does not see what lies further back; two such layers reach twice as far."
    lm = tiny_lm(arch, **SPEC)
    row = text(lm)
    other = dict(row, ids=row["ids"].clone())
    other["ids"][:, 0] += 1
    with torch.no_grad():
        changed = (lm(**other) - lm(**row)).abs().amax((0, 2)) > 1e-6
    reaches = 40 if None in lm.windows.values() else 2 * (WINDOW - 1) + 1
    assert changed[:reaches].any() and changed[reaches - 1 : reaches].all() and not changed[reaches:].any()


def test_left_padding_changes_nothing(arch):
    lm = awake(tiny_lm(arch, **SPEC))
    row = mixed(lm, 30)
    pad = {k: torch.full_like(v[:, :7], -1 if k == "kind" else 1) for k, v in row.items()}
    left = dict(attend=torch.tensor([[0] * 7 + [1] * 30]), positions=torch.tensor([[0] * 7 + list(range(30))]))
    with torch.no_grad():
        alone = lm(**row)
        padded = lm(**{k: torch.cat([pad[k], row[k]], 1) for k in row}, **left)
        torch.testing.assert_close(padded[:, 7:], alone, atol=1e-4, rtol=1e-3)


def test_a_checkpoint_comes_back_and_merging_computes_the_same(arch, tmp_path):
    lm = awake(tiny_lm(arch, tmp_path / "backbone", **SPEC))
    found = [n for n in lm.own_parameters() if "lora_A" in n]
    assert len(found) >= 8 and not any("lm_head" in n or "embed_out" in n for n in found)
    row = mixed(lm)
    lm.save_pretrained(tmp_path / "lm", dtype=None)
    back = KalmLM.from_pretrained(tmp_path / "lm")
    assert back.header() == lm.header() and back.begin == lm.begin
    with torch.no_grad():
        h = lm(**row)
        assert torch.equal(back(**row), h)
        before = weights_id(lm.backbone)
        with lm.merged():
            torch.testing.assert_close(lm(**row), h, atol=1e-4, rtol=1e-3)
            assert weights_id(lm.backbone) != before
        assert torch.equal(lm(**row), h) and weights_id(lm.backbone) == before


def test_every_own_weight_learns_and_no_other(arch):
    lm = awake(tiny_lm(arch, **SPEC)).train()
    row, g = mixed(lm), torch_rng(0, "gradient")
    with torch.no_grad():
        lm.word_head.out.weight.copy_(0.3 * torch.randn(lm.word_head.out.weight.shape, generator=g))
    h = lm(**row)
    (
        lm.text_logits(h, row["states"]).logsumexp(-1).sum()
        + lm.action_outputs(h, row["states"]).logsumexp(-1).sum()
        + lm.next_states(h, row["states"]).pow(2).sum()
    ).backward()
    own = lm.own_parameters()
    silent = [n for n, p in own.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    assert all(p.grad is None for n, p in lm.named_parameters() if n not in own)


def test_states_and_actions_arrive_at_the_size_of_words(arch):
    lm = tiny_lm(arch, **SPEC)
    row = mixed(lm)
    row["states"] = row["states"] * 0.3  # the standard deviation that a fresh normaliser supposes
    with torch.no_grad():
        x = lm.embed(**row)[0]
    sizes = [float(x[row["kind"][0] == kind].pow(2).mean().sqrt()) for kind in (TEXT, STATE, ACTION)]
    assert max(sizes) < 2.5 * min(sizes), sizes


def test_texts_begin_as_the_model_expects(arch):
    lm = tiny_lm(arch, **SPEC)
    begins = ARCHITECTURES[arch][2]
    assert lm.begin == ([lm.tokenizer.bos_token_id] if begins else [])
    ids = lm.tokenizer("ab", add_special_tokens=False).input_ids
    assert lm.tokenizer("ab").input_ids == lm.begin + ids


def test_too_long_a_sequence_is_refused(arch):
    lm = tiny_lm(arch, **SPEC)
    lm.max_length = 40
    with torch.no_grad():
        lm(**text(lm, 40))
        with pytest.raises(ValueError, match="a sequence of 41 elements: .* reads at most 40"):
            lm(**text(lm, 41))
        short = dict(
            tree=torch.arange(60)[None].expand(2, 60) // 30,
            branch=torch.zeros(2, 60, dtype=torch.long),
            positions=torch.arange(60)[None].expand(2, 60) % 30,
        )
        lm(**text(lm, 60), **short)  # a long row of short sequences


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=REFUSED[name][2]) as e:
        tiny_lm(name, **SPEC)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_trial_leaves_the_backbone_in_the_mode_it_was_in(tmp_path):
    from architectures import tiny_backbone

    from kalm.lm.backbone import load_backbone

    model, tokenizer = load_backbone(tiny_backbone("gpt2", tmp_path))
    KalmLM(model.train(), tokenizer, "gpt2", **SPEC)  # its dropout would make the trial fail
    assert model.training
