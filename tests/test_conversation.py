"""The state machine of a conversation: known dialogues, then any order of inputs."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar.serving.conversation import LISTENING, SPEAKING, STATES, THINKING, Answer, Conversation, Hush, Speak, Think
from liveavatar.serving.minds import Said


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def asked(conversation: Conversation, text: str = "hello") -> Think:
    assert conversation.began() == []
    conversation.ended(0.6)
    (think,) = conversation.said(text)
    return think


def speaking(conversation: Conversation, *sentences: str, ms: float = 1000.0) -> int:
    """Asked, answered with these sentences of 1 s each, all voiced, the first being heard."""
    turn = asked(conversation).turn
    for number, text in enumerate(sentences):
        assert conversation.sentence(turn, text) == [Speak(turn, number, text)]
        conversation.voiced(turn, number, ms, done=True)
    conversation.answered(turn)
    conversation.started(turn)
    return turn


def test_a_question_is_asked_answered_and_remembered():
    clock = Clock()
    c = Conversation(clock)
    c.began()
    c.ended(quiet=0.5)
    clock.now += 0.25
    assert c.said("  hello   there ") == [Think(1, (Said("user", "hello there"),))] and c.state == THINKING
    clock.now += 1
    c.sentence(1, "Hi.")
    c.voiced(1, 0, 800.0, done=True)
    c.answered(1)
    assert c.started(1) == [] and c.state == SPEAKING
    clock.now += 0.5
    c.finished(1, 0, 800, interrupted=False)
    assert c.state == LISTENING and c.history == [Said("user", "hello there"), Said("assistant", "Hi.")]
    assert c.exchange.latency == {"understood": 0.75, "first sentence": 1.75, "first sound": 1.75, "heard": 1.75, "over": 2.25}


def test_barge_in_keeps_what_was_heard_and_no_word_more():
    c = Conversation(Clock())
    turn = speaking(c, "One two three four.", "Five six seven eight.", "Nine ten.")
    c.finished(turn, 0, 1000, interrupted=False)
    assert c.began() == [Hush(turn)] and c.state == LISTENING
    assert c.sentence(turn, "late") == []  # the mind was not stopped yet
    c.finished(turn, 1, 560, interrupted=True)
    c.hushed(turn)
    assert c.history[-1] == Said("assistant", "One two three four. Five six", cut=True) and c.history[-1].content.endswith("six...")
    (think,) = c.said("stop")
    assert think.history[-2:] == (c.history[-2], Said("user", "stop")) and think.turn == turn + 1


def test_a_noise_makes_it_say_the_cut_sentence_again():
    c = Conversation(Clock())
    turn = speaking(c, "One two.", "Three four.")
    c.finished(turn, 0, 1000, interrupted=False)
    c.began()
    c.finished(turn, 1, 400, interrupted=True)
    assert c.said("") == [Speak(turn + 1, 0, "Three four.")]
    c.voiced(turn + 1, 0, 1000.0, done=True)
    c.started(turn + 1)
    c.finished(turn + 1, 0, 1000, interrupted=False)
    assert c.history == [Said("user", "hello"), Said("assistant", "One two. Three four.")]


def test_a_noise_does_not_cost_what_a_slow_mind_has_said_so_far():
    c = Conversation(clock := Clock())
    turn = asked(c).turn
    for number, text in enumerate(("One.", "Two.", "Three.")):
        c.sentence(turn, text)
        c.voiced(turn, number, 1000.0, done=True)
    c.started(turn)
    c.finished(turn, 0, 1000, interrupted=False)
    c.began()  # the mind would have had more to say
    c.finished(turn, 1, 400, interrupted=True)
    assert c.exchange.answer == "One." and "over" in c.exchange.times
    assert c.said("") == [Speak(turn + 1, 0, "Two."), Speak(turn + 1, 1, "Three.")] and "over" not in c.exchange.times  # of the same exchange
    clock.now += 2.0
    c.started(turn + 1)
    c.finished(turn + 1, 1, 1000, interrupted=False)
    assert c.history[-1] == Said("assistant", "One. Two. Three.") and c.exchange.answer == "One. Two. Three."
    assert c.exchange.latency["over"] == pytest.approx(2.6)


def test_a_question_in_two_breaths_is_one_question():
    c = Conversation(Clock())
    c.began()
    c.began()  # on with it, before the first half was recognised
    assert c.said("what is") == []
    (think,) = c.said("seven times eight")
    assert think.history == (Said("user", "what is seven times eight"),)
    assert c.began() == [Hush(1)]  # and once more while it thinks
    c.hushed(1)
    (think,) = c.said("please")
    assert think.history == (Said("user", "what is seven times eight please"),)


def test_a_noise_while_it_thinks_asks_again_and_failures_do_not_hang():
    c = Conversation(Clock())
    asked(c)
    c.began()
    c.hushed(1)
    assert c.said("") == [Think(2, (Said("user", "hello"),))]
    c.answered(2)  # a mind that says nothing
    assert c.state == LISTENING
    turn = speaking(c, "One.", "Two.")
    c.mute(turn, 1)  # the voice broke: what it made is still heard
    assert c.state == SPEAKING
    c.finished(turn, 0, 1000, interrupted=False)
    assert c.state == LISTENING and c.history[-1] == Said("assistant", "One.")


def test_a_piece_of_a_sentence_the_voice_broke_at_can_be_cut():
    c = Conversation(Clock())
    turn = speaking(c, "One.", "Two.")
    c.mute(turn, 1)
    c.began()
    c.finished(turn, 1, 300, interrupted=True)
    assert c.history[-1] == Said("assistant", "One.")


def test_a_sentence_that_lacks_a_moment_was_heard():
    answer = Answer(1, sentences=["One two three four five."], spans=[2000.0], voiced=1, whole=True)
    answer.cut(0, 1900.0)
    assert answer.heard_text == "One two three four five." and answer.over


NAMES = ("began", "said", "noise", "sentence", "answered", "voiced", "started", "finished", "cut", "mute", "stale")
INPUTS = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 3)), max_size=60)


@settings(max_examples=300, deadline=None)
@given(INPUTS)
def test_any_order_of_inputs_keeps_the_promises(inputs):
    c, open_mouths = Conversation(Clock()), 0
    for name, n in inputs:
        before, turn, orders = c.state, c.turn, []
        match name:
            case "began":
                open_mouths, orders = open_mouths + 1, c.began()
                assert orders == ([] if before == LISTENING else [Hush(turn)])  # barge-in, once
                for order in orders:
                    c.hushed(order.turn)
            case "said" | "noise":
                open_mouths = max(0, open_mouths - 1)
                if before == LISTENING:
                    orders = c.said("word" if name == "said" else "")
            case "sentence":
                orders = c.sentence(turn, "One two three.")
            case "voiced":
                c.voiced(turn, n, 100.0, done=n % 2 == 0)
            case "finished" | "cut":
                c.finished(turn, n, 200, interrupted=name == "cut")
            case "stale":  # of a turn that is over: nothing may come of it
                assert c.sentence(turn - 1, "old") == c.finished(turn - 1, n, 0, interrupted=True) == []
            case _:
                getattr(c, name)(*((turn, n) if name == "mute" else (turn,)))
        assert c.state in STATES
        for order in orders:
            if isinstance(order, Think):  # only when the user is silent, and with a question
                assert not open_mouths and order.history[-1].role == "user" and order.turn == c.turn > turn
        roles = [said.role for said in c.history]
        assert all(a != b for a, b in pairwise(roles))
        assert all(said.text for said in c.history)
