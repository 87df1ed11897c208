"What the model is charged for, and training that can be stopped anywhere."

import errno
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from architectures import tiny_backbone
from conftest import ROOT, python
from lively import made_up
from safetensors.torch import load_file, save
from worlds import line

import kalm.lm.examples as examples_module
import kalm.lm.ground as ground_module
from kalm.core import files
from kalm.core.domain import codec_of
from kalm.core.episodes import collect
from kalm.core.files import numpy_rng, owned, read_csv
from kalm.lm.examples import Examples, Planned, collate
from kalm.lm.ground import Grounder, Losses, Training, ground, learning_rate, prepare, share_out
from kalm.lm.model import PAD, Adapter, KalmLM, Normaliser
from kalm.lm.sequences import ARROW, MEANING, prompts_of
from kalm.lm.settings import TASKS, GroundConfig, TaskWeights
from kalm.lm.tasks import Generate
from kalm.tensors.store import torch_rng

pytestmark = pytest.mark.usefixtures("cache")

CONFIG = GroundConfig(
    backbone="tiny-random",
    adapter=Adapter(rank=2),
    steps=8,
    batch_tokens=400,
    bf16=False,
    task_weights=TaskWeights(caption=0.25, question=0.25),
    checkpoint_every=3,
    log_every=2,
)
EQUAL = TaskWeights(**{name: 1.0 for name in TASKS})
LOSSES = ["loss", "action", "state", "text", "consequence", "action_accuracy"]
CORPUS = ["The five boxing wizards jump quickly. " * 9, "Pack my box with five dozen liquor jugs, twice. " * 4]


@pytest.fixture(params=[False, True], ids=["discrete", "continuous"])
def domain(request):
    return line(continuous=request.param)


@pytest.fixture
def data(domain):
    return made_up(domain, 24, 5)


discrete_only = pytest.mark.parametrize("domain", [line()], ids=["discrete"])


def lively(domain, rollouts) -> KalmLM:
    "An untrained model whose answers depend on what it reads, words included."
    lm = KalmLM.from_pretrained(
        "tiny-random",
        state_dim=2,
        codec=codec_of(domain),
        features=domain.features,
        prompts=prompts_of(domain.words),
        domain=domain.name,
    )
    lm.normalise(Normaliser.fit(rollouts, lm.features_spec)).adapt(Adapter(rank=2))
    g = torch_rng(0, "lively")
    with torch.no_grad():
        for name, p in lm.own_parameters().items():
            if "lora_B" in name or name in ("word_head.out.weight",):
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
        lm.action_head.out.weight.mul_(20)
        lm.state_head.out.weight.mul_(5)
    return lm.eval()


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(steps=0), "steps 0: expected a whole number, at least 1"),
        (dict(steps=2.5), "steps 2.5"),
        (dict(steps=True), "steps True"),
        (dict(lr=math.nan), "lr nan: expected a number, at least 0"),
        (dict(lr=math.inf), "lr inf"),
        (dict(head_lr=-1e-3), "head_lr -0.001"),
        (dict(lr="1"), "lr '1'"),
        (dict(batch_tokens=100), "batch_tokens 100: .* at least 128"),
        (dict(warmup=1.5), "warmup 1.5: .* 0 to 1"),
        (dict(clip=0.0), "clip 0.0"),
        (dict(branches=0), "branches 0"),
        (dict(width=-1), "width -1"),
        (dict(unrewarded_weight=-0.1), "unrewarded_weight"),
        (dict(text_weight=math.nan), "text_weight nan"),
        (dict(keyword_weight=-1.0), "keyword_weight"),
        (dict(negatives=-1), "negatives"),
        (dict(compose=-0.1), "compose"),
        (dict(scenes=-0.1), "scenes"),
        (dict(huber=-0.1), "huber"),
        (dict(max_length=-1), "max_length"),
        (dict(weight_decay=math.nan), "weight_decay"),
        (dict(seed=-1), "seed -1"),
        (dict(log_every=0), "log_every"),
        (dict(checkpoint_every=0), "checkpoint_every"),
        (dict(meanings=1), "meanings 1: expected True or False"),
        (dict(bf16="yes"), "bf16 'yes'"),
        (dict(adapter=4), "adapter 4: expected Adapter"),
        (dict(adapter=dict(rank=0)), "rank 0"),
        (dict(adapter=dict(rank=math.nan)), "rank nan"),
        (dict(scratch=True, start="shipped"), "scratch"),
        (dict(task_weights=(1.0, 1.0)), r"task_weights \(1.0, 1.0\)"),
        (dict(task_weights=dict(explain=math.nan)), "explain nan"),
        (dict(task_weights=dict(text=-1)), "text -1"),
        (dict(task_weights={name: 0 for name in ("generate", "dynamics", "explain", "consequence")}), "no task"),
    ],
    ids=str,
)
def test_settings_out_of_bounds_are_refused_where_they_are_made(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **wrong)


def test_settings_survive_json():
    config = replace(CONFIG, adapter=Adapter(rank=3), task_weights=TaskWeights(text=1), lr=1, bf16=None)
    assert GroundConfig(**json.loads(json.dumps(asdict(config)))) == config
    assert isinstance(config.lr, float) and isinstance(config.task_weights.text, float)


def test_the_learning_rate_grows_and_falls():
    config = GroundConfig(steps=100, warmup=0.1)
    rates = [learning_rate(step, config) for step in range(100)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0 and all(a > b for a, b in zip(rates[10:], rates[11:])) and 0.02 <= rates[-1] < 0.03
    np.testing.assert_allclose(rates[55], 0.02 + 0.98 / 2, atol=1e-12)  # half of the way down


# ---------------------------------------------------------------- the loss


def of_actions(lm, outputs, wanted, done) -> tuple[float, list]:
    "Negative log likelihood of an action or *done*, and what is right of it, from the definitions."
    if not lm.codec.shape:
        at = lm.codec.n if done else int(wanted)
        return float(torch.logsumexp(outputs, 0) - outputs[at]), [float(outputs.argmax() == at)]
    mean, log_std, logit = lm.maps.split(outputs)
    ended = float(nn_softplus(-logit if done else logit))
    if done:
        return ended, []
    scaled = (torch.as_tensor(wanted) - torch.as_tensor(lm.codec.centre)) / torch.as_tensor(lm.codec.scale)
    nll = -torch.distributions.Normal(mean, log_std.exp()).log_prob(scaled).sum()
    return float(nll) + ended, (abs(scaled - mean) < 0.1).float().tolist()


def nn_softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(x))


class Naive:
    "Losses of one example at a time: nothing branches, nothing is padded, every word is computed."

    def __init__(self, lm: KalmLM, ex: Examples):
        self.lm, self.ex, self.m = lm, ex, ex.material
        self.out = {name: [] for name in (*LOSSES[1:], "action_weights", "text_weights")}

    def words(self, text: str) -> list[torch.Tensor]:
        table = self.lm.backbone.get_input_embeddings().weight
        return [table[i] for i in self.m.writer.ids(text)]

    def state(self, s) -> list[torch.Tensor]:
        return [self.lm.state_embed(self.lm.features(torch.as_tensor(s)))]

    def action(self, a) -> list[torch.Tensor]:
        a = torch.as_tensor(a)
        return [self.lm.action_embed(self.lm.maps.scaled(a) if self.lm.codec.shape else a)]

    def story(self, states, actions) -> list[torch.Tensor]:
        pairs = [v for s, a in zip(states, actions) for v in self.state(s) + self.action(a)]
        return pairs + self.state(states[-1])

    def hidden(self, x: list[torch.Tensor]) -> torch.Tensor:
        return self.lm.backbone.get_decoder()(inputs_embeds=torch.stack(x)[None]).last_hidden_state[0]

    def answer(self, before: list, key: str, rest: list[int], state=None) -> torch.Tensor:
        "Words asked for after `before`: key words, then others. Hidden vectors of `before`."
        ids = self.m.writer.ids(key)
        table = self.lm.backbone.get_output_embeddings().weight
        x = before + [self.lm.backbone.get_input_embeddings().weight[i] for i in ids + rest]
        h = self.hidden(x)
        for at, i in enumerate(ids + rest):
            v = h[len(before) - 1 + at]
            if state is not None:
                v = v + self.lm.word_head(v, self.lm.features(torch.as_tensor(state)))
            logits = table @ v
            self.out["text"].append(float(torch.logsumexp(logits, 0) - logits[i]))
            self.out["text_weights"].append(self.ex.config.keyword_weight if at < len(ids) else 1.0)
        return h[: len(before)]

    def gap(self, name: str, h, state, change, unit) -> None:
        predicted = self.lm.state_head(h, self.lm.features(torch.as_tensor(state)))
        error, huber = (predicted - torch.as_tensor(change) / unit).abs(), self.ex.config.huber
        cost = torch.where(error < huber, error**2 / (2 * huber), error - huber / 2) if huber else error**2
        self.out[name].append(float(cost.mean()))

    def steps(self, h, states, actions) -> None:
        "Changes asked for after the actions of a story, whose hidden vectors are `h`."
        for t in range(len(actions)):
            self.gap("state", h[2 * t + 1], states[t], states[t + 1] - states[t], torch.tensor(self.lm.normaliser.step))

    def example(self, task: str, i: int, first: int, wording: int) -> None:
        m, lm = self.m, self.lm
        states, actions = m.steps(i)
        sentence, meaning, eos = m.sentence(i), m.meaning(i), m.writer.end
        before, after = lm.prompts[task][wording % len(lm.prompts[task])]
        x = self.words(before.replace("{goal}", m.sentence(wording)))
        n = len(x)
        if task == "generate":
            h = self.hidden(x + self.story(states, actions))[n:]
            self.steps(h, states, actions)
            for t in range(len(actions) + int(m.rollouts.success[i])):
                done = t == len(actions)
                loss, right = of_actions(
                    lm, lm.action_outputs(h[2 * t], torch.as_tensor(states[t])), None if done else actions[t], done
                )
                rewarded = done or m.rollouts.rewards[i, t] > 0
                self.out["action"].append(loss)
                self.out["action_accuracy"] += right
                self.out["action_weights"].append(1.0 if rewarded else self.ex.config.unrewarded_weight)
        elif task == "dynamics":
            h = self.hidden(x + self.state(states[first]) + self.action(actions[first]))[n:]
            self.steps(h, states[first : first + 2], actions[first : first + 1])
        elif task == "consequence":
            h = self.hidden(x + self.state(states[0]) + self.words(after))[-1]
            self.gap("consequence", h, states[0], states[-1] - states[0], torch.tensor(lm.normaliser.jump))
        elif task == "explain":
            rest = m.writer.ids((ARROW if meaning else "") + " " + sentence) + [eos]
            story = x + self.story(states, actions) + self.words(after)
            h = self.answer(story, f" {meaning}" if meaning else "", rest, states[-1])
            self.steps(h[n:], states, actions)
        elif task == "caption":
            states, actions = states[first : first + 2], actions[first : first + 1]
            caption = m.words.caption(*states)
            h = self.answer(x + self.story(states, actions) + self.words(after), f" {caption}", [eos], states[-1])
            self.steps(h[n:], states, actions)

    def sequence(self, planned: Planned) -> None:
        task, wording = self.ex.tasks[planned.task].name, int(planned.rows[0, 0])
        if task == "text":
            ids = self.m.passages[wording]
            table = self.lm.backbone.get_input_embeddings().weight
            self.answer([table[ids[0]]], "", ids[1:])
        elif task == "question":
            i, t = planned.rows[0].tolist()
            before, after = self.lm.prompts[task][i % 4]
            state = self.m.rollouts.states[i, t]
            for question, answer in self.m.questions(i, t):
                x = self.words(before) + self.state(state) + self.words(after) + self.words(f" {question}")
                self.answer(x, f" {answer}", [], state)
        else:
            for i, first in planned.rows.tolist():
                self.example(task, i, first, wording)
        if task == "generate" and (meaning := self.m.meaning(wording)):
            x = self.words(self.lm.prompts[task][0][0].replace("{goal}", self.m.sentence(wording)) + MEANING)
            self.answer(x, f" {meaning}", [self.m.writer.end])

    def means(self) -> dict[str, float]:
        weighted = {name: self.out[f"{name}_weights"] for name in ("action", "text")}
        return {
            name: float(np.average(self.out[name], weights=weighted.get(name))) if self.out[name] else 0.0
            for name in LOSSES[1:]
        }


@pytest.mark.parametrize(
    "change",
    [
        dict(width=0),
        dict(width=400, unrewarded_weight=0.25, branches=3),
        dict(meanings=False, keyword_weight=0.5, text_weight=2.0),
        dict(width=400, huber=0.2),
    ],
    ids=str,
)
def test_the_loss_is_that_of_a_loop_over_examples(change, domain, data):
    lm = lively(domain, data)
    weights = replace(EQUAL, generate=0.7, text=0.3)
    config = replace(CONFIG, batch_tokens=400, negatives=0, task_weights=weights, **change)
    ex = Examples(lm, data, domain.words, config, corpus=CORPUS)
    seen, packed = set(), False
    for k, planned in enumerate(ex.plan(0)[:7]):
        naive, batch = Naive(lm, ex), ex.at((0, k))
        with torch.no_grad():
            for p in planned:
                naive.sequence(p)
            got = Grounder(lm, config.text_weight, huber=config.huber)(batch)
        want = naive.means()
        np.testing.assert_allclose(got[0, 1:], [want[name] for name in LOSSES[1:]], rtol=2e-4, atol=2e-5)
        parts = want["action"] + want["state"] + config.text_weight * want["text"] + 0.3 * want["consequence"]
        np.testing.assert_allclose(got[0, 0], parts, rtol=2e-4)
        counts = [len(naive.out[name]) for name in ("action", "state", "text", "consequence")]
        assert got[1, 1:5].tolist() == counts and got[1, 0] == len(batch["kind"])
        seen |= {p.task for p in planned}
        packed |= len(batch["kind"]) < len(planned)
    assert seen == set(range(7)) and packed == bool(config.width)


def test_padding_is_free(domain, data):
    lm = lively(domain, data)
    ex = Examples(lm, data, domain.words, CONFIG)
    sequences = [ex.write(p) for p in ex.plan(0)[0]]
    long = ex.write(Planned(2, np.array([[int(data.lengths.argmax()), 0]]))).say([5] * 600)
    for token in long.tokens:  # a longer row that is asked nothing
        token.ask = 0
    k = len(domain.codec.shape)
    a, b = collate(sequences, 2, k), collate([*sequences, long], 2, k)
    with torch.no_grad():
        x, y = Grounder(lm)(a), Grounder(lm)(b)
    assert (b["kind"] == PAD).sum() > (a["kind"] == PAD).sum()
    torch.testing.assert_close(x[0], y[0], rtol=1e-4, atol=1e-5)


def test_weights_weigh_the_actions(domain, data):
    lm = lively(domain, data)
    ex = Examples(lm, data, domain.words, CONFIG)
    batch = collate([Generate(ex.material).write(np.array([[0, 0], [4, 0]]))], 2, len(domain.codec.shape))
    at = ((batch["ask"] == ground_module.ACT) | (batch["ask"] == ground_module.DONE)).nonzero()
    n = len(at)

    def action(weights):
        w = torch.zeros_like(batch["weight"])
        w[at[:, 0], at[:, 1]] = torch.as_tensor(weights, dtype=w.dtype)
        with torch.no_grad():
            return float(Grounder(lm)(batch | dict(weight=w))[0, 1])

    each = [action([float(k == i) for k in range(n)]) for i in range(n)]
    some = np.linspace(0, 1, n)
    assert n > 4 and max(each) - min(each) > 0.1
    got = [action(np.ones(n)), action(np.full(n, 0.3)), action(some)]
    np.testing.assert_allclose(got, [np.mean(each), np.mean(each), np.average(each, weights=some)], rtol=1e-4)
    assert action(np.zeros(n)) == 0


def test_random_candidates_make_the_expected_denominator_right():
    domain = line()
    data = made_up(domain, 8, 4)
    lm = lively(domain, data)
    ex, grounder = Examples(lm, data, domain.words, replace(CONFIG, negatives=20)), Grounder(lm)
    batch = dict(ask=torch.tensor([[0, 1, 1, 1, 0, 1]]), answer=torch.tensor([[0, 70, 9, 70, 0, 200]]))
    h = 2 * torch.from_numpy(numpy_rng(0, "words").normal(size=(3, 64))).float()
    states = torch.from_numpy(numpy_rng(1, "words").uniform(-0.4, 0.4, (1, 3, 2))).float()
    at, about = torch.ones(1, 3, dtype=torch.bool), dict(states=states, known=torch.ones(1, 3, dtype=torch.bool))
    with torch.no_grad():
        full = lm.text_logits(h, states[0]).exp().sum(-1)
        drawn = [grounder.words(h, at, about | ex.candidates(batch, (0, k))).exp().sum(-1) for k in range(600)]
    drawn = torch.stack(drawn)
    assert (drawn.std(0) > 0.1 * full).all()  # single draws are off
    error = (drawn.mean(0) / full - 1) / (drawn.std(0) / full / 600**0.5)  # in standard errors
    assert (error.abs() < 4).all()


@pytest.mark.parametrize("world", [2, 3, "more"])
@discrete_only
def test_several_processes_average_to_what_one_computes(world, domain, data):
    "Gradients and losses, however unequal the shares are; with more processes than sequences too."
    config = replace(CONFIG, task_weights=EQUAL, unrewarded_weight=0.1, keyword_weight=4.0, negatives=64)
    lm = lively(domain, data)
    examples = Examples(lm, data, domain.words, config, corpus=CORPUS)
    position = min(((0, i) for i in range(len(examples.plan(0)))), key=lambda p: len(examples.plan(0)[p[1]]))
    world = len(examples.plan(0)[position[1]]) + 2 if world == "more" else world

    def gradients(rank: int, world: int) -> tuple[torch.Tensor, torch.Tensor]:
        lm.zero_grad()
        losses = Grounder(lm, config.text_weight, world)(examples.at(position, rank, world))
        losses[0, 0].backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in lm.own_parameters().values()]
        return torch.cat([g.flatten() for g in grads]).clone(), losses[0].detach()

    (one, told), several = gradients(0, 1), [gradients(rank, world) for rank in range(world)]
    mean = torch.stack([g for g, _ in several]).mean(0)
    assert float((mean - one).norm() / one.norm()) < 1e-4
    torch.testing.assert_close(torch.stack([losses for _, losses in several]).mean(0), told, rtol=1e-3, atol=1e-4)


def test_the_record_names_what_is_logged():
    assert list(Losses.__dataclass_fields__) == LOSSES


@pytest.mark.parametrize("arch", ["gemma2", "gpt2", "mistral-window", "llama-bos"])
def test_other_backbones_learn_too_and_read_branches_as_if_they_were_alone(arch, domain, data, tmp_path):
    config = replace(CONFIG, backbone=tiny_backbone(arch, tmp_path / "backbone"), steps=3, negatives=40)
    training = Training(Accelerator(cpu=True), domain, data, config, None)
    before = {name: p.detach().clone() for name, p in training.lm.own_parameters().items()}
    for k in range(3):
        training.step((0, k))
    learnt = [name for name, p in training.lm.own_parameters().items() if not torch.equal(p, before[name])]
    assert any("lora_A" in name for name in learnt) and any("action_head" in name for name in learnt)
    lm, ex = training.lm.eval(), training.examples
    k = len(domain.codec.shape)
    sequences = [ex.write(p) for p in ex.plan(0)[0]]
    with torch.no_grad():
        alone = Grounder(lm)(collate(sequences, 2, k))
        together = Grounder(lm)(collate(sequences, 2, k, width=200))
    torch.testing.assert_close(alone[0], together[0], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- training


class Kill(BaseException):
    pass


def killer(step):
    def callback(lm, at):
        if at == step:
            raise Kill

    return callback


def log(folder) -> list[dict]:
    "The log without its seconds."
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / "log.csv")]


def same_weights(a, b) -> bool:
    x, y = (load_file(folder / "model.safetensors") for folder in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture(scope="module")
def runs() -> dict:
    "A run that was not interrupted, for each codec: made once."
    return {}


@pytest.fixture
def whole(domain, data, runs, tmp_path, tmp_path_factory):
    "A copy of a run that was not interrupted."
    if domain.codec not in runs:
        runs[domain.codec] = tmp_path_factory.mktemp("whole")
        ground(domain, data, CONFIG, out=runs[domain.codec])
    return shutil.copytree(runs[domain.codec], tmp_path / "whole")


@pytest.mark.parametrize("step", [3, 6])
def test_an_interrupted_run_continued_equals_an_uninterrupted_one(step, whole, domain, data, tmp_path):
    out = tmp_path / "part"
    with pytest.raises(Kill):
        ground(domain, data, CONFIG, out=out, callback=killer(step))
    assert not (out / "kalm.json").exists()
    ground(domain, data, CONFIG, out=out)
    assert same_weights(whole, out) and log(whole) == log(out)
    assert [row["step"] for row in log(out)] == ["2", "4", "6", "8"] and list(log(out)[0])[3:] == LOSSES


@discrete_only
def test_no_time_at_all_keeps_the_beginning(whole, domain, data, tmp_path):
    out = tmp_path / "part"
    ground(domain, data, CONFIG, out=out, max_minutes=0)
    assert (out / "state.safetensors").exists() and not (out / "kalm.json").exists()
    ground(domain, data, CONFIG, out=out)
    assert same_weights(whole, out)


@discrete_only
def test_a_finished_run_is_not_trained_again(whole, domain, data):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    ground(domain, data, CONFIG, out=whole)
    assert before == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_the_checkpoint_is_what_training_returned(whole, domain, data):
    lm, back = ground(domain, data, CONFIG), KalmLM.from_pretrained(whole)
    for a, b in zip(lm.own_parameters().values(), back.own_parameters().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-8, atol=0)
    assert back.normaliser == Normaliser.fit(data, domain.features) and back.adapter == CONFIG.adapter
    assert back.domain == domain.name and back.codec == domain.codec and not lm.training
    assert back.prompts == lm.prompts and len(back.normaliser.step) == 2  # a scale for each coordinate


@discrete_only
@pytest.mark.parametrize(
    "change",
    [
        dict(lr=1.0),
        dict(seed=1),
        dict(adapter=Adapter(rank=3)),
        dict(steps=9),
        dict(task_weights=TaskWeights()),
        dict(meanings=False),
    ],
    ids=str,
)
def test_other_settings_in_the_folder_are_refused(change, whole, domain, data):
    before = {p.name: p.read_bytes() for p in whole.iterdir()}
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"holds a grounding run with other settings .*{name}[.a-z]* was"):
        ground(domain, data, replace(CONFIG, **change), out=whole)
    assert before == {p.name: p.read_bytes() for p in whole.iterdir()}


@discrete_only
def test_other_data_in_the_folder_are_refused(whole, domain, data):
    changed = replace(data, rewards=data.rewards + 0.5)
    for other in (data[:20], made_up(domain, 24, 5, seed=1), changed):
        with pytest.raises(ValueError, match="holds a grounding run with other settings .data was"):
            ground(domain, other, CONFIG, out=whole)


@discrete_only
def test_a_state_of_another_request_is_refused(whole, domain, data):
    (whole / "request.json").unlink()
    with pytest.raises(ValueError, match="state.safetensors is of a run on other data or with other settings"):
        ground(domain, data, replace(CONFIG, text_weight=2.0), out=whole)


@discrete_only
def test_slow_steps_are_stored_by_the_clock(domain, data, tmp_path, monkeypatch):
    "Killed long before the first checkpoint by steps, a run goes on from where it was, to the same weights."
    from kalm.lm import ground as module

    monkeypatch.setattr(module, "STORE_AFTER", 0)
    config, taken = replace(CONFIG, checkpoint_every=100, log_every=100), []
    step = module.Training.step

    def dies(self, position):
        taken.append(self.progress.step)
        if len(taken) == 5:
            raise Kill
        step(self, position)

    monkeypatch.setattr(module.Training, "step", dies)
    with pytest.raises(Kill):
        ground(domain, data, config, out=tmp_path)
    continued = ground(domain, data, config, out=tmp_path)
    assert taken == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    whole = ground(domain, data, config)
    assert all(map(torch.equal, continued.own_parameters().values(), whole.own_parameters().values()))


@discrete_only
def test_damaged_states_are_refused_and_kept(domain, data, tmp_path):
    with pytest.raises(Kill):
        ground(domain, data, CONFIG, out=tmp_path, callback=killer(3))
    path = tmp_path / "state.safetensors"
    state, rows = path.read_bytes(), (tmp_path / "log.csv").read_bytes()
    flipped = bytearray(state)
    flipped[-5] ^= 1
    header = {"kalm": json.dumps({"format": "another"})}
    for bad in (state[:-100], b"", b"no state", bytes(flipped), save({"w": torch.zeros(3)}, metadata=header)):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="state.safetensors"):
            ground(domain, data, CONFIG, out=tmp_path)
        assert path.read_bytes() == bad and (tmp_path / "log.csv").read_bytes() == rows


def full(*args, **kw):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@discrete_only
def test_a_full_disk_at_a_checkpoint_keeps_the_last_one(whole, domain, data, tmp_path):
    out = tmp_path / "part"
    with pytest.MonkeyPatch.context() as monkey, pytest.raises(OSError, match="space"):
        ground(domain, data, CONFIG, out=out, callback=lambda lm, step: monkey.setattr(files.os, "replace", full))
    assert not list(out.glob(".*.tmp"))
    ground(domain, data, CONFIG, out=out)
    assert same_weights(whole, out) and log(whole) == log(out)


@discrete_only
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_a_good_state(domain, data, tmp_path):
    wild = replace(CONFIG, lr=1e6, head_lr=1e6, steps=60, checkpoint_every=1, log_every=1, warmup=0)
    with pytest.raises(ValueError, match="(loss|not finite).*(checkpoint stays in|nothing was stored).*learning rates"):
        ground(domain, data, wild, out=tmp_path)
    assert not (tmp_path / "kalm.json").exists()
    for row in read_csv(tmp_path / "log.csv"):
        assert all(math.isfinite(float(row[name])) for name in LOSSES)
    if (tmp_path / "state.safetensors").exists():
        assert all(t.isfinite().all() for t in load_file(tmp_path / "state.safetensors").values())


@discrete_only
def test_a_poisoned_batch_leaves_the_weights_as_they_were(domain, data, tmp_path):
    training = Training(Accelerator(cpu=True), domain, data, CONFIG, tmp_path)
    training.step((0, 0))
    training.checkpoint()
    before = {name: p.detach().clone() for name, p in training.lm.own_parameters().items()}
    training.lm.register_buffer("step_scale", torch.zeros(2))  # changes in units of nothing
    with pytest.raises(ValueError, match="step 2 has loss (inf|nan) .* the last checkpoint stays in"):
        training.step((0, 1))
    assert all(torch.equal(p, before[name]) for name, p in training.lm.own_parameters().items())


def test_loss_goes_down_in_a_real_world(domain, tmp_path):
    real = collect(domain, domain.goals("offline"), 40, policy="walk", seed=0, workers=1, progress=False)
    config = replace(CONFIG, steps=40, log_every=8, checkpoint_every=40, lr=5e-3, head_lr=5e-3)
    ground(domain, real, config, out=tmp_path)
    first, last = log(tmp_path)[0], log(tmp_path)[-1]
    for name, share in dict(loss=0.8, state=0.8, text=0.9).items():
        assert float(last[name]) < share * float(first[name]), name
    assert float(last["action"]) < float(first["action"]) - 0.1
    assert float(last["action_accuracy"]) > float(first["action_accuracy"]) and int(last["tokens"]) > 0


def test_the_seed_decides_and_the_global_generator_does_not():
    domain = line()
    data = made_up(domain, 12, 4)

    def weights(seed, global_seed):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            lm = ground(domain, data, replace(CONFIG, steps=2, seed=seed))
        return [p.detach() for p in lm.own_parameters().values()]

    a, b, c = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not any(torch.equal(x, y) for x, y in zip(a, c) if x.dim() > 1)


@discrete_only
@pytest.mark.parametrize(
    "change",
    [
        dict(adapter=Adapter(full=True), lr=2e-4),
        dict(scratch=True),
        dict(bf16=True),
        dict(negatives=0, width=0, compose=0.2),
    ],
    ids=str,
)
def test_options_train_and_come_back(change, domain, data, tmp_path, monkeypatch):
    monkeypatch.setattr(examples_module, "ordinary_text", lambda: CORPUS)
    config = replace(CONFIG, steps=3, checkpoint_every=2, batch_tokens=250, task_weights=EQUAL, **change)
    first = {name: p.detach().clone() for name, p in prepare(domain, data, config).own_parameters().items()}
    with pytest.raises(Kill):
        ground(domain, data, config, out=tmp_path / "b", callback=killer(2))
    lm = ground(domain, data, config, out=tmp_path / "b")
    ground(domain, data, config, out=tmp_path / "a")
    assert same_weights(tmp_path / "a", tmp_path / "b")
    assert all(not torch.equal(p, first[name]) for name, p in lm.own_parameters().items() if p.dim() > 1)
    back = KalmLM.from_pretrained(tmp_path / "a")
    assert back.own_parameters().keys() == lm.own_parameters().keys()


# Each process keeps its own file: lines that two processes print can land in one another.
SHARED = """
import json, os, sys
from pathlib import Path
from lively import made_up
from test_ground import CONFIG
from worlds import line
from kalm.lm.ground import ground
domain = line()
lm = ground(domain, made_up(domain, 24, 5), CONFIG, out=sys.argv[1], max_minutes=5)
total = sum(float(p.detach().double().abs().sum()) for p in lm.own_parameters().values())
frozen = [p for p in lm.backbone.model.layers.parameters() if not p.requires_grad]
kept = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in frozen)
kept /= sum(p.numel() for p in frozen)
Path(f"{sys.argv[1]}-{os.environ['RANK']}").write_text(json.dumps(dict(total=total, kept=kept)))
"""


def two_processes(folder, **settings):
    "Ground on two processes, in `folder`/out; each leaves what it says in a file of its own."
    more = "".join(f", {name}={value}" for name, value in settings.items())
    (folder / "shared.py").write_text(SHARED.replace("max_minutes=5", "max_minutes=5" + more))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lm")])
    done = python(*launch, str(folder / "shared.py"), str(folder / "out"), ACCELERATE_USE_CPU="true",
                  OMP_NUM_THREADS="1", PYTHONPATH=paths)
    ends = [folder / f"out-{rank}" for rank in (0, 1)]
    assert all(end.exists() for end in ends), done.stderr[-2000:]
    return [json.loads(end.read_text()) for end in ends], load_file(folder / "out" / "model.safetensors")


def test_two_processes_share_the_batches_and_the_backbone(tmp_path):
    "They end with the same weights; with half of the frozen blocks each, they learn the same."
    (tmp_path / "whole").mkdir()
    (tmp_path / "shared").mkdir()
    said, whole = two_processes(tmp_path / "whole")
    assert said[0] == said[1] and said[0]["kept"] == 1
    assert [row["step"] for row in log(tmp_path / "whole" / "out")] == ["2", "4", "6", "8"]
    said, shared = two_processes(tmp_path / "shared", shard=True)
    assert said[0] == said[1] and said[0]["kept"] == .5
    for name, weight in whole.items():
        torch.testing.assert_close(weight, shared[name], atol=1e-5, rtol=1e-2)


@discrete_only
def test_what_cannot_be_shared_out(domain, data):
    lm = prepare(domain, data, replace(CONFIG, adapter=Adapter(full=True)))
    with pytest.raises(ValueError, match="shard: all of this backbone learns"):
        share_out(lm, 2)
    with pytest.raises(ValueError, match="shard: a callback"):
        ground(domain, data, CONFIG, shard=True, callback=print)


def test_processes_end_with_their_launcher(tmp_path):
    "Killed, it can tell them nothing: they see that it is gone."
    endless = SHARED.replace("CONFIG, out", "replace(CONFIG, steps=10**6), out")
    (tmp_path / "shared.py").write_text("from dataclasses import replace" + endless)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tmp_path / "shared.py"), str(tmp_path / "out")]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "lm")])
    launcher = subprocess.Popen(command, env=os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1",
                                                               PYTHONPATH=paths), stderr=subprocess.DEVNULL)

    def at_work():
        return subprocess.run(["pgrep", "-f", str(tmp_path / "shared.py")], capture_output=True).stdout

    wait_for(lambda: log(tmp_path / "out") if (tmp_path / "out" / "log.csv").exists() else [])
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not at_work())


def wait_for(condition, seconds: float = 120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_two_do_not_ground_in_one_folder(domain, data, tmp_path):
    with owned(tmp_path), pytest.raises(RuntimeError, match="another process works in"):
        ground(domain, data, CONFIG, out=tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- a start, and what is refused


@discrete_only
def test_a_start_brings_its_weights_and_scales(whole, domain, monkeypatch):
    back, later, asked = KalmLM.from_pretrained(whole), made_up(domain, 12, 4, seed=7), []

    def shipped(name, **kw):
        asked.append(name)
        return KalmLM.from_pretrained(whole, **kw)

    monkeypatch.setattr(KalmLM, "grounded", shipped)
    for start in (str(whole), "shipped"):
        lm = prepare(domain, later, replace(CONFIG, start=start))
        assert lm.normaliser == back.normaliser != Normaliser.fit(later, domain.features)
        for p, q in zip(lm.own_parameters().values(), back.own_parameters().values(), strict=True):
            assert torch.equal(p, q) and p.requires_grad
    assert asked == [domain.name]


@discrete_only
def test_a_run_with_a_start_is_continued_too(whole, domain, tmp_path):
    config, later = replace(CONFIG, start=str(whole), steps=4), made_up(domain, 12, 4, seed=7)
    ground(domain, later, config, out=tmp_path / "a")
    with pytest.raises(Kill):
        ground(domain, later, config, out=tmp_path / "b", callback=killer(3))
    ground(domain, later, config, out=tmp_path / "b")
    assert same_weights(tmp_path / "a", tmp_path / "b") and not same_weights(tmp_path / "a", whole)


@discrete_only
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(adapter=Adapter(rank=3)), r"adapter Adapter\(rank=2.*asked for is Adapter\(rank=3"),
        (dict(backbone="smollm2-135m"), "backbone tiny-random, asked for is smollm2-135m"),
        (dict(start="/no/such/folder"), "expected 'shipped', or the folder of a grounded checkpoint"),
    ],
    ids=str,
)
def test_a_start_of_another_form_is_refused(change, message, whole, domain, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        ground(domain, data, replace(CONFIG, **dict(start=str(whole)) | change), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_start_for_other_actions_is_refused(whole, domain):
    other = line(continuous=not domain.codec.shape)
    with pytest.raises(ValueError, match="it has actions .*asked for is"):
        ground(other, made_up(other, 8, 4), replace(CONFIG, start=str(whole)))


def test_rollouts_of_another_domain_are_refused(domain, data, tmp_path):
    with pytest.raises(ValueError, match="rollouts of domain 'line' were handed to 'other'"):
        ground(line(continuous=bool(domain.codec.shape), name="other"), data, CONFIG, out=tmp_path / "out")
    with pytest.raises(ValueError, match="actions"):
        ground(line(continuous=not domain.codec.shape), replace(data, domain=""), CONFIG, out=tmp_path / "out")
    with pytest.raises(ValueError, match="no transitions"):
        ground(domain, data[:0], CONFIG, out=tmp_path / "out")
    with pytest.raises(ValueError, match="has no goal"):
        ground(domain, data.with_goals([], np.full(24, -1)), CONFIG, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
