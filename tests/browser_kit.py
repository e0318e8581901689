"""A page that watches a card through WHEP and measures what it sees and hears, the HTTP server for it, and Chromium.

`page.evaluate("measured()")` gives ages of pictures (ms, by the painted clock), onsets of flashes and beeps on the page's
clock, and what the browser counts itself (getStats).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse

from liveavatar.serving.ice import IceServers
from liveavatar.serving.problems import Problem
from liveavatar.serving.settings import ServeConfig
from liveavatar.serving.whep import Viewers, router

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--autoplay-policy=no-user-gesture-required", "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
         "--disable-features=WebRtcHideLocalIpsWithMdns"]  # fmt: skip

PAGE = """<!doctype html><meta charset=utf-8><title>card</title><link rel=icon href="data:,">
<video id=v autoplay playsinline width=320 height=240></video><script>
"use strict";
const seen = {ages: [], flashes: [], beeps: [], energy: 0, shown: 0, first: null, moved: 0, pings: 0, state: "new", playout: []};
const video = document.getElementById("v"), canvas = document.createElement("canvas"), stream = new MediaStream();
canvas.width = 320; canvas.height = 140;
const pixels = canvas.getContext("2d", {willReadFrequently: true});
let pc, where, tag, began, lit = true, last = 0, order = Promise.resolve();

function stamp(data) {  // ms modulo 2**20, or null
  let bits = 0;
  for (let i = 0; i < 32; i++) bits = bits << 1 | (data[(8 * 320 + i * 10 + 5) * 4] > 128);
  const ms = bits >>> 12;
  return Math.imul(ms, 0x9E3779B1) >>> 20 === (bits & 0xFFF) ? ms : null;
}
function look(now, meta) {
  const wall = Date.now();
  pixels.drawImage(video, 0, 0, 320, 240);
  const data = pixels.getImageData(0, 0, 320, 140).data, ms = stamp(data);
  if (seen.first === null) seen.first = performance.now() - began;
  seen.shown++;
  const age = ms === null ? Infinity : (wall - ms) & 0xFFFFF;
  if (age < 10000) { seen.ages.push(age); if (ms !== last) seen.moved++; last = ms; }  // else misread
  const bright = data[(120 * 320 + 160) * 4] > 128;
  if (bright && !lit) seen.flashes.push(meta.expectedDisplayTime);
  lit = bright;
  video.requestVideoFrameCallback(look);
}
const ear = `registerProcessor("ear", class extends AudioWorkletProcessor {
  constructor() { super(); this.quiet = 0; this.energy = 0; }
  process([[x]]) {
    for (let i = 0; x && i < x.length; i++) {
      if (Math.abs(x[i]) > 0.1) {
        if (this.quiet > sampleRate / 2) this.port.postMessage(currentTime + i / sampleRate);
        this.quiet = 0;
      } else this.quiet++;
    }
    return true;
  }
});`;
async function listen(track) {
  const context = new AudioContext({latencyHint: "interactive"});
  await context.audioWorklet.addModule(URL.createObjectURL(new Blob([ear], {type: "text/javascript"})));
  const source = context.createMediaStreamSource(new MediaStream([track])), node = new AudioWorkletNode(context, "ear");
  const analyser = context.createAnalyser(), data = new Float32Array(analyser.fftSize);
  source.connect(node); source.connect(analyser);
  setInterval(() => {
    analyser.getFloatTimeDomainData(data);
    seen.energy = Math.max(seen.energy, data.reduce((a, x) => a + x * x, 0) / data.length);
  }, 20);
  node.port.onmessage = ({data: t}) => {
    const out = context.getOutputTimestamp();
    seen.beeps.push(out.performanceTime + (t - out.contextTime) * 1000);
  };
}
async function playout() {  // the sender's clock at what is played now, pictures against sound: ms, sound late > 0
  const at = {};
  (await pc.getStats()).forEach(s => { if (s.type === "inbound-rtp" && s.estimatedPlayoutTimestamp) at[s.kind] = s.estimatedPlayoutTimestamp; });
  if (at.audio && at.video) seen.playout.push(at.video - at.audio);
}
async function watch(url, {configuration = {}, microphone = false} = {}) {
  began = performance.now();
  pc = new RTCPeerConnection(configuration);
  pc.addTransceiver("video", {direction: "recvonly"});
  if (microphone) pc.addTrack((await navigator.mediaDevices.getUserMedia({audio: true})).getAudioTracks()[0]);
  else pc.addTransceiver("audio", {direction: "recvonly"});
  const channel = pc.createDataChannel("pulse"), late = [];
  channel.onmessage = ({data}) => {
    seen.pings++;
    const m = JSON.parse(data);
    if (m.type === "ping") channel.send(JSON.stringify({...m, type: "pong"}));
  };
  pc.onconnectionstatechange = () => seen.state = pc.connectionState;
  pc.ontrack = ({track}) => { stream.addTrack(track); video.srcObject = stream; if (track.kind === "audio") listen(track); };
  pc.onicecandidate = ({candidate}) => { late.push(candidate); order = order.then(send); };
  const ufrag = () => /a=ice-ufrag:(.*)/.exec(pc.localDescription.sdp)[1].trim();
  async function send() {
    if (!where) return;
    for (const c of late.splice(0)) {
      const section = c ? `m=audio 9 RTP/AVP 0\\r\\na=mid:${c.sdpMid}\\r\\na=${c.candidate}\\r\\n` : "a=end-of-candidates\\r\\n";
      const body = `a=ice-ufrag:${ufrag()}\\r\\n${section}`;
      await fetch(where, {method: "PATCH", headers: {"Content-Type": "application/trickle-ice-sdpfrag", "If-Match": tag}, body});
    }
  }
  await pc.setLocalDescription();
  const answer = await fetch(url, {method: "POST", headers: {"Content-Type": "application/sdp"}, body: pc.localDescription.sdp});
  if (answer.status !== 201) throw new Error(await answer.text());
  tag = answer.headers.get("ETag"); where = answer.headers.get("Location");
  await pc.setRemoteDescription({type: "answer", sdp: await answer.text()});
  order = order.then(send);
  video.requestVideoFrameCallback(look);
  setInterval(playout, 200);
}
async function leave() { return (await fetch(where, {method: "DELETE"})).status; }
async function measured() {
  const stats = {};
  (await pc.getStats()).forEach(s => { stats[s.id] = s; });
  const all = Object.values(stats), inbound = kind => all.find(s => s.type === "inbound-rtp" && s.kind === kind) || {};
  const pair = all.find(s => s.type === "candidate-pair" && s.nominated) || {};
  return {...seen, codec: (stats[inbound("video").codecId] || {}).mimeType, decoded: inbound("video").framesDecoded,
    dropped: inbound("video").framesDropped, freezes: inbound("video").freezeCount, concealed: inbound("audio").concealedSamples,
    samples: inbound("audio").totalSamplesReceived,
    jitter_ms: 1000 * inbound("video").jitterBufferDelay / inbound("video").jitterBufferEmittedCount, rtt_ms: 1000 * pair.currentRoundTripTime,
    sound_jitter_ms: 1000 * inbound("audio").jitterBufferDelay / inbound("audio").jitterBufferEmittedCount,
    candidate: (stats[pair.localCandidateId] || {}).candidateType, offer: pc.localDescription.sdp};
}
</script>"""


def application(card, settings: ServeConfig = ServeConfig(), viewers=None) -> FastAPI:
    """The page at / and the card's WHEP endpoint; everybody may do everything."""
    viewers = viewers or Viewers(IceServers(settings.network), settings.access.viewers)

    @contextlib.asynccontextmanager
    async def life(app):
        yield
        await viewers.close()

    app = FastAPI(lifespan=life)

    async def authorise(request, session_id, scope):
        pass

    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem):
        return JSONResponse(error.body("test"), error.status, error.headers, "application/problem+json")

    @app.get("/")
    async def page():
        return HTMLResponse(PAGE)

    app.include_router(router(lambda name: card, authorise, viewers))
    return app


@contextlib.asynccontextmanager
async def serving(app: FastAPI):
    """Gives the base URL."""
    import uvicorn

    sock = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def chromium(*flags: str):
    """A headless browser of playwright."""
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS, *flags])
        try:
            yield browser
        finally:
            await browser.close()


def percentiles(values: list[float]) -> dict:
    """n, p50, p95 and the largest, to a tenth."""
    if len(values) < 2:
        return {"n": len(values)}
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return {"n": len(values), "p50": round(cuts[9], 1), "p95": round(cuts[18], 1), "max": round(max(values), 1)}


def offsets(flashes: list[float], beeps: list[float]) -> list[float]:
    """ms from each flash to its beep; sound late > 0. Only where both were seen."""
    return [nearest for nearest in (min((beep - flash for beep in beeps), key=abs, default=1e9) for flash in flashes) if abs(nearest) < 400]
