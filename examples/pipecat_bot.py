"""A Pipecat bot with a face, whole and without any key: speak into the browser, the avatar answers.

    pip install 'liveavatar[pipecat,talk]'
    python examples/pipecat_bot.py                        then open http://127.0.0.1:7860
    python examples/pipecat_bot.py --mind http://127.0.0.1:11434/v1 --model llama3.2     a language model of yours answers
    python examples/pipecat_bot.py --avatar http://gpu-box:8080                          the avatar runs on another machine

Ears, recogniser and voice are the local ones of liveavatar.serving (English); put any service of Pipecat in their places.
Tested with Pipecat 1.14.
"""

from __future__ import annotations

import argparse
import asyncio
import os

import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.frames.frames import (
    Frame, InterruptionFrame, LLMFullResponseEndFrame, LLMFullResponseStartFrame, LLMTextFrame, TranscriptionFrame, TTSAudioRawFrame,
    VADUserStartedSpeakingFrame,
)  # fmt: skip
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.audio.vad_processor import VADProcessor
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.services.settings import STTSettings, TTSSettings
from pipecat.services.stt_service import SegmentedSTTService
from pipecat.services.tts_service import TTSService
from pipecat.transports.base_transport import TransportParams
from pipecat.transports.smallwebrtc.connection import SmallWebRTCConnection
from pipecat.transports.smallwebrtc.request_handler import SmallWebRTCRequest, SmallWebRTCRequestHandler
from pipecat.transports.smallwebrtc.transport import SmallWebRTCTransport
from pipecat.utils.time import time_now_iso8601
from pipecat.workers.runner import WorkerRunner

from liveavatar.config import load
from liveavatar.core import FPS
from liveavatar.serving.ears import WhisperRecogniser
from liveavatar.serving.minds import Companion, EndpointMind, Said
from liveavatar.serving.pipecat_service import InProcess, LiveAvatarVideoService
from liveavatar.serving.remote import RemoteAvatar
from liveavatar.serving.role import Role
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.studio import Studio
from liveavatar.serving.talk_commands import PORTRAIT, USUAL
from liveavatar.serving.voices import HibariVoice

PAGE = """<!doctype html><title>LiveAvatar with Pipecat</title><body style="background:#111;color:#ddd;font-family:sans-serif;text-align:center">
<video id=v autoplay playsinline style="width:384px"></video><p><button id=b>Talk</button><p id=s>English. It interrupts itself when you speak.
<script>b.onclick = async () => {
  const pc = new RTCPeerConnection(), got = new MediaStream(); v.srcObject = got
  pc.ontrack = e => got.addTrack(e.track)
  const mic = await navigator.mediaDevices.getUserMedia({audio: {echoCancellation: true}})
  pc.addTransceiver(mic.getAudioTracks()[0], {direction: 'sendrecv'}); pc.addTransceiver('video', {direction: 'recvonly'})
  await pc.setLocalDescription(await pc.createOffer())
  await new Promise(r => pc.iceGatheringState == 'complete' ? r() : pc.onicegatheringstatechange = () => pc.iceGatheringState == 'complete' && r())
  const a = await fetch('/api/offer', {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(pc.localDescription)})
  await pc.setRemoteDescription(await a.json()); b.remove()
}</script>"""


class LocalSTT(SegmentedSTTService):
    """Whisper tiny.en of liveavatar."""

    wants_wav_segments = False

    def __init__(self, recogniser: WhisperRecogniser):
        super().__init__(sample_rate=16_000, settings=STTSettings(model="tiny.en", language=None))
        self._recogniser = recogniser

    async def run_stt(self, audio: bytes):
        """16 kHz PCM of one turn -> its text."""
        text = await self._recogniser.recognise(np.frombuffer(audio, "<i2").astype(np.float32) / 32768)
        if text:
            yield TranscriptionFrame(text, "user", time_now_iso8601())


class LocalTTS(TTSService):
    """hibari of liveavatar."""

    def __init__(self, voice: HibariVoice):
        super().__init__(push_start_frame=True, push_stop_frames=True, settings=TTSSettings(model="hibari", voice="heart", language=None))
        self._voice = voice

    async def run_tts(self, text: str, context_id: str):
        """A sentence -> its sound."""
        async for pcm, rate in self._voice.speak(text):
            yield TTSAudioRawFrame(pcm.tobytes(), rate, 1, context_id=context_id)


class Answers(FrameProcessor):
    """A mind in the pipeline. Barge-in: the user's first sound interrupts everything behind it."""

    def __init__(self, mind):
        super().__init__()
        self._mind, self._history, self._answering = mind, [], None

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        """Text of the user in, text of the answer out."""
        await super().process_frame(frame, direction)
        if isinstance(frame, TranscriptionFrame):
            await self._stop()
            self._history.append(Said("user", frame.text))
            self._answering = self.create_task(self._answer())
            return
        if isinstance(frame, VADUserStartedSpeakingFrame):
            await self.broadcast_interruption()
        if isinstance(frame, InterruptionFrame):
            await self._stop()
        await self.push_frame(frame, direction)

    async def _answer(self) -> None:
        await self.push_frame(LLMFullResponseStartFrame())
        said = ""
        async for text in self._mind.answer(self._history):
            said += text
            await self.push_frame(LLMTextFrame(text))
        self._history.append(Said("assistant", said.strip()))
        await self.push_frame(LLMFullResponseEndFrame())

    async def _stop(self) -> None:
        task, self._answering = self._answering, None
        if task is not None and not task.done():
            await self.cancel_task(task)

    async def cleanup(self) -> None:
        """With the pipeline."""
        await super().cleanup()
        await self._stop()


def application(mind, client, size: tuple[int, int]) -> FastAPI:
    """One bot for each browser. client: makes its avatar; size: of the avatar's pictures."""
    app, offers = FastAPI(), SmallWebRTCRequestHandler()
    recogniser, voice, bots = WhisperRecogniser(), HibariVoice(), set()

    async def bot(connection: SmallWebRTCConnection) -> None:
        params = TransportParams(audio_in_enabled=True, audio_in_sample_rate=16_000, audio_out_enabled=True, audio_out_sample_rate=48_000,
                                 video_out_enabled=True, video_out_is_live=False, video_out_framerate=FPS, video_out_width=size[0],
                                 video_out_height=size[1])  # fmt: skip
        transport = SmallWebRTCTransport(connection, params)
        worker = PipelineWorker(Pipeline([
            transport.input(), VADProcessor(vad_analyzer=SileroVADAnalyzer()), LocalSTT(recogniser), Answers(mind()), LocalTTS(voice),
            LiveAvatarVideoService(client()), transport.output(),
        ]), cancel_on_idle_timeout=False)  # fmt: skip

        @transport.event_handler("on_client_disconnected")
        async def gone(transport, client):
            await worker.cancel()

        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(worker)
        await runner.run()

    async def start(connection: SmallWebRTCConnection) -> None:
        task = asyncio.create_task(bot(connection))
        bots.add(task)
        task.add_done_callback(bots.discard)

    @app.post("/api/offer")
    async def offer(request: SmallWebRTCRequest) -> dict:
        return await offers.handle_web_request(request, start)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE

    return app


async def main() -> None:
    """Serve until Ctrl-C."""
    options = argparse.ArgumentParser()
    options.add_argument("--mind", help="OpenAI-compatible server that answers; its key in $LIVEAVATAR_MIND_KEY. Default: a companion of rules")
    options.add_argument("--model", default="gpt-4o-mini")
    options.add_argument("--avatar", help="a `liveavatar serve`; its key in $LIVEAVATAR_KEY. Default: the embedded avatar in this process")
    options.add_argument("--size", type=int, nargs=2, default=(128, 128), help="of the avatar's pictures")
    options.add_argument("--port", type=int, default=7860)
    said = options.parse_args()
    studio = None
    if said.avatar is None:
        studio = Studio(load(None, USUAL[:1], ServeConfig))
        await studio.start()

    def mind():
        return Companion() if said.mind is None else EndpointMind(said.mind, model=said.model, key=os.environ.get("LIVEAVATAR_MIND_KEY"))

    def client():
        if studio is None:
            return RemoteAvatar(said.avatar, os.environ["LIVEAVATAR_KEY"])
        return InProcess(lambda: studio.open(Role(avatar="bot", picture=PORTRAIT)))

    try:
        await uvicorn.Server(uvicorn.Config(application(mind, client, tuple(said.size)), host="127.0.0.1", port=said.port)).serve()
    finally:
        if studio is not None:
            await studio.aclose()


if __name__ == "__main__":
    asyncio.run(main())
