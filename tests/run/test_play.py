"A sentence that somebody typed: understood or refused, imagined, carried out, shown."

import numpy as np
import pytest
from PIL import Image

import kalm.run.play as play
from kalm.core.domain import domain
from kalm.core.gym_domain import GymDomain
from kalm.lm.backbone import TINY_BACKBONE
from kalm.lm.explain import Meaning
from kalm.lm.model import KalmLM
from kalm.run.command import main, policy_of

pytestmark = pytest.mark.usefixtures("cache")


def says(monkeypatch, words: str, sure: float = 0.99) -> None:
    "Whatever is asked, the model answers so."
    monkeypatch.setattr(play, "checked_meanings", lambda lm, texts, names: [Meaning(words, sure)] * len(texts))


@pytest.fixture
def clevr():
    return domain("clevr")


@pytest.fixture
def lm(clevr, cache):
    from kalm.core.domain import codec_of
    from kalm.lm.sequences import prompts_of

    lm = KalmLM.from_pretrained(TINY_BACKBONE, state_dim=10, codec=codec_of(clevr), prompts=prompts_of(clevr.words))
    lm.sure = 0.6
    return lm


@pytest.mark.parametrize(
    "words, sure, tasks",
    [
        ("red blue left", 0.99, ["move"]),
        ("red blue left; green cyan back", 0.99, ["move", "move"]),
        ("red blue left", 0.5, []),
        ("snow man", 0.99, []),
        ("", 0.99, []),
    ],
)
def test_what_is_understood(words, sure, tasks, lm, clevr, monkeypatch):
    says(monkeypatch, words, sure)
    text = "Red, blue, green, cyan: anything."
    found = play.understand(lm, clevr, text)
    assert [goal.task["type"] for goal in found.goals] == tasks
    if tasks:
        goal = play.asked(clevr, found)
        assert goal.text == text and goal.task["type"] == ("move" if len(tasks) == 1 else "all")
    else:
        with pytest.raises(ValueError, match=f"'{text}' was not understood"):
            play.asked(clevr, found)


def test_a_ball_that_is_not_named_is_not_understood(lm, clevr, monkeypatch):
    "Key words that every sentence with that meaning says have to be in this one."
    says(monkeypatch, "red green left")
    found = play.understand(lm, clevr, "Shove the red ball to the left.")
    assert found.goals == () and found.unsaid == ("green",)
    assert str(found) == "not understood (red green left, 99% sure, but it does not say green)"
    assert play.understand(lm, clevr, "RED goes west of (green)!").goals
    own = clevr.goals("easy")[0]
    assert play.understand(lm, clevr, own.text).goals == (own,)  # its own sentences need no model


def test_the_picture_says_what_was_understood(lm, clevr, monkeypatch):
    says(monkeypatch, "red blue left")
    short = play.imagine
    monkeypatch.setattr(play, "imagine", lambda *a, **kw: short(*a, **kw | dict(max_steps=2)))
    played = play.play_imagined(lm, clevr, "Red, left of blue!", n=1)
    goal, = play._titled(played.real, played).goals
    assert goal.text == f"Red, left of blue! (understood: {played.understood.goals[0].text})"


def test_a_threshold_is_calibrated_once(lm, clevr, monkeypatch):
    says(monkeypatch, "red blue left")
    asked = []
    monkeypatch.setattr(play, "calibrate", lambda *a: asked.append(a) or 0.7)
    lm.sure = None
    play.understand(lm, clevr, "One.")
    play.understand(lm, clevr, "Two.")
    assert len(asked) == 1 and lm.sure == 0.7


def test_imagined_and_carried_out_from_the_same_starts(lm, clevr, monkeypatch):
    says(monkeypatch, "red blue left")
    short = play.imagine
    monkeypatch.setattr(play, "imagine", lambda *a, **kw: short(*a, **kw | dict(max_steps=3)))
    played = play.play_imagined(lm, clevr, "Red, left of blue!", n=2, seed=4)
    np.testing.assert_array_equal(played.real.states[:, 0], played.imagined.states[:, 0])
    assert set(played.real.texts) == {"Red, left of blue!"} and len(played.said) == 2
    frames = play.frames_of(clevr, played, 1)
    assert len(frames) == 1 + max(len(played.imagined[1]), len(played.real[1])) and frames.dtype == np.uint8


@pytest.mark.parametrize("command", ["imagine", "act"])
def test_commands_write_pictures(command, lm, clevr, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    says(monkeypatch, "red blue left")
    monkeypatch.setattr("kalm.run.command.KalmLM.grounded", lambda *a: lm)
    short = play.imagine
    monkeypatch.setattr(play, "imagine", lambda *a, **kw: short(*a, **kw | dict(max_steps=2)))
    monkeypatch.setattr("kalm.run.command.policy_of", lambda *a: "a policy")
    monkeypatch.setattr("kalm.run.command.load_policy", lambda folder: "random")
    assert main([command, "Red, left of blue!", "--n", "1"]) == 0, capsys.readouterr().err
    assert "understood (red blue left, 99% sure)" in capsys.readouterr().out
    folder = tmp_path / "runs" / "play"
    with Image.open(folder / "red-left-of-blue.gif") as gif, Image.open(folder / "red-left-of-blue.png") as strip:
        assert gif.is_animated and strip.width > 300


def test_nonsense_is_answered_in_a_line(lm, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    says(monkeypatch, "red blue left", sure=0.3)
    monkeypatch.setattr("kalm.run.command.KalmLM.grounded", lambda *a: lm)
    assert main(["imagine", "Make a snowman."]) == 1 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "kalm: 'Make a snowman.' was not understood (red blue left, 30% sure, " \
        "but it does not say red or blue)\n"
    assert main(["act"]) == 1 and "say what is to be done" in capsys.readouterr().err


def test_the_policy_that_acts_learned_from_imagination(tmp_path):
    for name in ("bc-0/step-40", "bc+kalm-1/step-40", "bc+kalm-0/step-36", "bc+kalm-0/step-40", "cql+kalm-0/step-40"):
        (tmp_path / "policies" / name).mkdir(parents=True)
    assert policy_of(tmp_path) == tmp_path / "policies" / "bc+kalm-0" / "step-40"
    assert policy_of(tmp_path, "cql+kalm").parent.name == "cql+kalm-0"
    with pytest.raises(FileNotFoundError, match="no policy of td3bc in .*: bc, bc.kalm, cql.kalm"):
        policy_of(tmp_path, "td3bc")


def test_a_domain_without_words_plays_its_own_sentences(cache):
    pole = GymDomain("CartPole-v1", {"offline": ["Keep the pole up."]}, success="survive", max_steps=4)
    assert play.understand(None, pole, "Keep the pole up. ").goals == tuple(pole.goals("offline"))
    with pytest.raises(ValueError, match="has no words, so it knows its own sentences alone"):
        play.understand(None, pole, "Balance!")


def test_the_player_shows_frames_and_refusals(lm, clevr, monkeypatch):
    says(monkeypatch, "red blue left")
    short = play.imagine
    monkeypatch.setattr(play, "imagine", lambda *a, **kw: short(*a, **kw | dict(max_steps=2)))
    p = play.Player(lm, clevr, text="Red, <left> of blue!")
    assert p.seen.layout.display == "none"  # nothing to see yet
    p.button.click()
    assert p.seen.layout.display is None
    assert "understood" in p.told.value and len(p.picture.value) > 500 and p.slider.max >= 1
    before = p.picture.value
    p.slider.value = 1
    assert p.picture.value != before and p.slider.description not in ("", "start")
    p.box.value = " "
    p.button.click()
    assert "is blank" in p.told.value and not p.button.disabled and p.seen.layout.display == "none"


def test_a_player_without_widgets_says_how_to_get_them(lm, clevr, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
    assert "pip install ipywidgets" in play.player(lm, clevr)
