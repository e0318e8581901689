// One viewer: picture and sound over WHEP, the page's microphone on the same connection, and what the browser measures.

const LOUD = 0.004; // RMS above which something is heard
const PAUSE_MS = 120,
  SILENT_MS = 500,
  SPEECH_MS = 1500; // without sound: between words; after the end; and it is no longer speech
const REPORT_MS = 5000;
const OFFSETS = 5; // readings of which the middle one is shown: one alone hops by a picture
const TOLD = [
  "freezeCount",
  "pliCount",
  "nackCount",
  "packetsLost",
  "framesDropped",
  "framesDecoded",
  "jitterBufferDelay",
  "jitterBufferEmittedCount",
];

export class Player extends EventTarget {
  constructor(video, api, session) {
    super();
    Object.assign(this, {video, api, session, level: 0, loudAt: -1e9, asked: null, hushed: null, timers: [], emitted: [0, 0], offsets: []});
  }

  // speaks: the connection may carry a microphone later; until then it sends nothing.
  async open({speaks}) {
    const peer = (this.peer = new RTCPeerConnection(await this.api.get("/v1/ice-servers").then(({iceServers}) => ({iceServers}))));
    peer.addTransceiver("video", {direction: "recvonly"});
    this.voice = peer.addTransceiver("audio", {direction: speaks ? "sendrecv" : "recvonly"});
    this._pulse(peer.createDataChannel("pulse"));
    const stream = (this.stream = new MediaStream());
    peer.ontrack = ({track}) => {
      stream.addTrack(track);
      this.video.srcObject = stream;
      if (track.kind === "audio") this._listen(track);
    };
    peer.onconnectionstatechange = () => this._say("connection", peer.connectionState);
    await peer.setLocalDescription();
    await gathered(peer);
    const answer = await this.api.ask("POST", `/v1/sessions/${this.session}/whep`, {json: {type: "offer", sdp: peer.localDescription.sdp}});
    this.home = answer.headers.get("Location");
    await peer.setRemoteDescription({type: "answer", sdp: (await answer.json()).sdp});
    await this.video.play().catch(() => this._say("blocked"));
  }

  async microphone(on) {
    this.track?.stop();
    this.track = on
      ? (await navigator.mediaDevices.getUserMedia({audio: {echoCancellation: true, noiseSuppression: true}})).getAudioTracks()[0]
      : null;
    await this.voice.sender.replaceTrack(this.track);
  }

  // over: the session has ended, and this viewer with it. Else the server is told first: a peer that hangs up is forgotten there.
  async close(over) {
    this.timers.forEach(clearInterval);
    this.track?.stop();
    this.video.pause();
    if (this.home && !over) await this.api.delete(this.home).catch(() => null);
    this.peer?.close();
    this.context?.close();
    if (this.video.srcObject === this.stream) this.video.srcObject = null; // another one may play there by now
  }

  // ------------------------------------------------------------ what is heard

  _listen(track) {
    const context = (this.context = new AudioContext()),
      analyser = context.createAnalyser(),
      data = new Float32Array(1024);
    analyser.fftSize = data.length;
    context.createMediaStreamSource(new MediaStream([track])).connect(analyser);
    this.timers.push(
      setInterval(() => {
        analyser.getFloatTimeDomainData(data);
        this._heard(Math.sqrt(data.reduce((sum, x) => sum + x * x, 0) / data.length), performance.now());
      }, 20),
    );
  }

  _heard(level, now) {
    this.level = level;
    if (level > LOUD) {
      this.loudAt = now;
      if (this.asked !== null) {
        this._say("first", now - this.asked);
        this.asked = null;
      }
    } else if (this.hushed !== null && now - Math.max(this.loudAt, this.hushed) > SILENT_MS) {
      this._say("silent", Math.max(0, this.loudAt - this.hushed));
      this.hushed = null;
    }
  }

  // Something was asked for; the next sound answers it. Nothing is measured while the avatar is still speaking.
  ask() {
    if (performance.now() - this.loudAt > PAUSE_MS) this.asked = performance.now();
  }

  // It was told to be silent; where it was, there is nothing to measure.
  hush() {
    this.hushed = performance.now() - this.loudAt < SPEECH_MS ? performance.now() : null;
    this.asked = null;
  }

  _say(type, detail) {
    this.dispatchEvent(new CustomEvent(type, {detail}));
  }

  // ------------------------------------------------------------ what the browser measures

  // A sign of life for the server, and every 5 s what this page's reception is like.
  _pulse(channel) {
    channel.onmessage = ({data}) => {
      const message = JSON.parse(data);
      if (message.type === "ping") channel.send(JSON.stringify({...message, type: "pong"}));
    };
    this.timers.push(
      setInterval(async () => {
        if (channel.readyState !== "open") return;
        const {
            inbound: {video = {}, audio = {}},
            pair,
          } = await this._stats(),
          report = {},
          late = soundLate(video, audio);
        for (const name of TOLD) if (Number.isFinite(video[name])) report[name] = video[name];
        if (Number.isFinite(pair?.currentRoundTripTime)) report.roundTripTime = pair.currentRoundTripTime;
        if (late !== null) report.soundLate = late;
        channel.send(JSON.stringify({type: "stats", report}));
      }, REPORT_MS),
    );
  }

  async _stats() {
    const inbound = {};
    let pair = null;
    (await this.peer.getStats()).forEach(s => {
      if (s.type === "inbound-rtp") inbound[s.kind] = s;
      if (s.type === "candidate-pair" && s.nominated) pair = s;
    });
    return {inbound, pair};
  }

  // Seconds, except fps. offset: sound against picture as they are played, sound late > 0.
  async figures() {
    const {
      inbound: {video = {}, audio = {}},
      pair,
    } = await this._stats();
    const late = soundLate(video, audio);
    if (late !== null) this.offsets = [...this.offsets, late].slice(-OFFSETS);
    return {
      fps: video.framesPerSecond ?? null,
      decoded: video.framesDecoded ?? 0,
      freezes: video.freezeCount ?? 0,
      lost: (video.packetsLost ?? 0) + (audio.packetsLost ?? 0),
      rtt: pair?.currentRoundTripTime ?? null,
      buffer: this._buffered(video),
      offset: this.offsets.toSorted((a, b) => a - b)[this.offsets.length >> 1] ?? null,
    };
  }

  // Since this was asked last; the browser's sums are since the beginning.
  _buffered({jitterBufferDelay = 0, jitterBufferEmittedCount = 0}) {
    const [delay, count] = this.emitted;
    this.emitted = [jitterBufferDelay, jitterBufferEmittedCount];
    return jitterBufferEmittedCount > count ? (jitterBufferDelay - delay) / (jitterBufferEmittedCount - count) : null;
  }
}

// Seconds that sound is played after its picture; null before both play.
function soundLate(video, audio) {
  return video.estimatedPlayoutTimestamp && audio.estimatedPlayoutTimestamp
    ? (video.estimatedPlayoutTimestamp - audio.estimatedPlayoutTimestamp) / 1000
    : null;
}

// All candidates, or those found in half a second: the answer has all of the server's.
function gathered(peer) {
  return new Promise(resolve => {
    if (peer.iceGatheringState === "complete") return resolve();
    const timer = setTimeout(resolve, 500);
    peer.addEventListener("icegatheringstatechange", () => {
      if (peer.iceGatheringState === "complete") {
        clearTimeout(timer);
        resolve();
      }
    });
  });
}
