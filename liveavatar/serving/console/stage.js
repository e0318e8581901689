// The stage: a session, its live picture, and everything by which a person makes it speak.

import {$, fill, h, toast} from "./dom.js";
import {Player} from "./player.js";
import {ms, t} from "./words.js";

const SOUNDS = ["audio/wav", "audio/mpeg", "audio/ogg", "audio/flac", "audio/mp4", "audio/webm"];
const SHOWN = {ready: "idle", creating: "connecting", closing: "off", closed: "off", failed: "off"};
const TALK = "/v1/sessions/{session_id}/conversation";
const TALK_LINES = 30;

export class Stage {
  constructor(app) {
    Object.assign(this, {app, player: null, socket: null, seen: 0, turn: {}, measured: {}, talking: false, changing: null});
    this.wire();
    app.on("avatar", () => this.avatarChosen());
    app.on("language", () => this.draw());
    setInterval(() => this.measure(), 1000);
    setInterval(() => {
      $("level").value = this.player ? Math.min(1, 3 * this.player.level) : 0;
    }, 50);
    $("poster").addEventListener("load", () => {
      const {width, height} = $("backdrop");
      $("backdrop").getContext("2d").drawImage($("poster"), 0, 0, width, height);
    });
    this.draw();
  }

  wire() {
    const {app} = this,
      click = (id, act) => $(id).addEventListener("click", () => app.try(act));
    click("start", () => this.open());
    click("end", () => this.end());
    click("apply", () => this.steer({prompt: $("prompt").value}));
    click("interrupt", () => this.interrupt());
    click("mic", () => this.microphone());
    click("sound", () => $("sound_file").click());
    click("full", () => (document.fullscreenElement ? document.exitFullscreen() : $("screen").requestFullscreen()));
    click("mute", () => {
      $("video").muted = !$("video").muted;
      this.draw();
    });
    click("video", () => $("video").play());
    $("sound_file").addEventListener("change", () => app.try(() => this.play($("sound_file").files[0])));
    $("say").addEventListener("submit", event => {
      event.preventDefault();
      app.try(() => this.say());
    });
    $("text").addEventListener("input", () => this.draw());
    $("text").addEventListener("keydown", event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("say").requestSubmit();
    });
    $("talk_on").addEventListener("change", () => {
      this.changing = app.try(() => this.converse($("talk_on").checked));
    });
    addEventListener("pagehide", () => this.gone());
    document.addEventListener("keydown", event => {
      if (event.key === "Escape" && this.player && !document.querySelector("dialog[open]")) app.try(() => this.interrupt());
    });
  }

  get home() {
    return `/v1/sessions/${this.app.session.id}`;
  }

  // ------------------------------------------------------------ a session begins and ends

  async open() {
    $("start").disabled = true;
    $("start").lastElementChild.textContent = t("starting");
    try {
      const prompt = $("prompt").value.trim();
      const session = await this.app.api.post("/v1/sessions", {avatar_id: this.app.avatars.chosen, ...(prompt && {prompt})});
      this.own = session.id;
      await this.watch(session).catch(async error => {
        await this.app.api.delete(`/v1/sessions/${session.id}`).catch(() => null); // nobody sees it: it would hold its place for a minute
        throw error;
      });
    } finally {
      $("start").disabled = false;
      $("start").lastElementChild.textContent = t("start");
    }
  }

  // Watch a session that runs.
  async watch(session) {
    await this.leave();
    this.app.session = session;
    this.seen = 0;
    this.turn = {};
    this.player = new Player($("video"), this.app.api, session.id);
    this.player.addEventListener("first", ({detail}) => {
      this.turn.first = detail / 1000;
      this.draw();
    });
    this.player.addEventListener("silent", ({detail}) => {
      this.turn.silence = detail / 1000;
      this.draw();
    });
    this.player.addEventListener("blocked", () => toast(t("sound_blocked")));
    this.player.addEventListener("connection", ({detail}) => {
      if (detail === "failed") this.show("lost");
    });
    this.show("connecting");
    this.listen(session.id);
    try {
      await this.player.open({speaks: this.app.may("publish")});
    } catch (error) {
      await this.leave();
      throw error;
    }
    this.app.tell("session", session);
    this.draw();
  }

  // Stop watching; the session itself goes on.
  async leave(over = false) {
    const {player, socket} = this;
    Object.assign(this, {player: null, socket: null, measured: {}, talking: false});
    Object.assign(this.app, {session: null, stats: null});
    socket?.close();
    fill($("talk_lines"));
    this.show("off");
    this.app.tell("session", null);
    await player?.close(over);
    this.draw();
  }

  // The page closes or is loaded anew. What it began and nobody else takes would hold its place for a minute; what is on air goes on.
  gone() {
    const {app, own} = this;
    if (app.session?.id === own && !(app.stats?.viewers > 1)) app.api.delete(this.home, true).catch(() => null);
    else if (this.player?.home) app.api.delete(this.player.home, true).catch(() => null);
  }

  async end() {
    const {home} = this;
    await this.leave();
    await this.app.api.delete(home);
    this.app.tell("changed");
  }

  // ------------------------------------------------------------ what the server tells

  listen(id) {
    const socket = (this.socket = this.app.api.socket(id, this.seen));
    socket.onmessage = ({data}) => {
      if (socket === this.socket) this.take(JSON.parse(data));
    };
    socket.onclose = ({code}) => {
      // a socket that broke comes back where it was
      if (socket === this.socket && this.app.session && code === 1006)
        setTimeout(() => {
          if (socket === this.socket) this.listen(id);
        }, 1000);
    };
  }

  take(message) {
    if (message.n) this.seen = message.n;
    if (message.type === "stats") {
      this.app.stats = message;
      this.app.tell("stats", message);
      return;
    }
    if (message.type !== "pong") this.app.tell("event", {at: Date.now() / 1000, ...message});
    if (message.type === "session.created") this.show(message.session.state);
    if (message.type === "state") this.show(message.state);
    if (message.type === "talk.state") this.show(message.state);
    if (message.type === "talk.question") this.said("user", message.turn, message.text);
    if (message.type === "talk.answer") this.said("assistant", message.turn, message.text + (message.cut ? " …" : ""));
    if (message.type === "speak.finished") {
      this.turn.heard = message.position_ms / 1000;
      this.draw();
    }
    if (message.type === "error") toast(message.detail, "bad");
    if (message.type === "session.closed") {
      toast(t("ended", {reason: message.reason}));
      this.app.try(() => this.leave(true));
      this.app.tell("changed");
    }
  }

  // An answer that a noise broke off is told again when it is whole: one line a turn.
  said(role, turn, text) {
    const last = $("talk_lines").lastChild;
    if (last?.className === role && last.dataset.turn === String(turn)) last.remove();
    $("talk_lines").append(h("li", {class: role, "data-turn": turn}, text));
    while ($("talk_lines").children.length > TALK_LINES) $("talk_lines").firstChild.remove();
    $("talk_lines").lastChild.scrollIntoView({block: "nearest"});
  }

  async measure() {
    const {player} = this;
    if (player?.peer?.connectionState !== "connected") return;
    const measured = await player.figures();
    if (player !== this.player) return;
    this.measured = measured;
    this.app.tell("measured", measured);
    this.draw();
  }

  // ------------------------------------------------------------ what a person does

  avatarChosen() {
    if (this.app.session) this.app.try(() => this.steer({avatar_id: this.app.avatars.chosen}));
    this.poster();
  }

  async steer(change) {
    this.app.session = await this.app.api.ask("PATCH", this.home, {json: change}).then(answer => answer.json());
    toast(t("applied"));
  }

  async say() {
    const text = $("text").value.trim();
    if (!text || !this.player) return;
    await this.changing; // what is written right after the switch is meant for the other side of it
    this.player.ask();
    await this.app.api.post(this.talking ? `${this.home}/conversation/turns` : `${this.home}/say`, {text});
    $("text").value = "";
    this.draw();
  }

  async play(file) {
    $("sound_file").value = "";
    this.player.ask();
    const type = SOUNDS.includes(file.type) ? file.type : "application/octet-stream";
    const {seconds} = await (await this.app.api.ask("POST", `${this.home}/audio`, {body: file, headers: {"Content-Type": type}})).json();
    toast(t("file_sent", {name: file.name, seconds: seconds.toFixed(1)}));
  }

  async interrupt() {
    this.player.hush();
    const {position_ms} = await this.app.api.post(`${this.home}/interrupt`);
    this.turn.heard = position_ms / 1000;
    this.draw();
  }

  async microphone() {
    const on = !this.player.track;
    try {
      await this.player.microphone(on);
    } catch (error) {
      if (!(error instanceof DOMException)) throw error;
      toast(t("mic_refused"), "bad");
    }
    this.draw();
  }

  async converse(on) {
    if (on)
      await this.app.api.post(`${this.home}/conversation`).catch(error => {
        if (error.status !== 409) throw error;
      }); // 409: it is one already
    else await this.app.api.delete(`${this.home}/conversation`);
    this.talking = on;
    this.draw();
  }

  // ------------------------------------------------------------ what is shown

  show(state) {
    state = SHOWN[state] ?? state;
    if (this.player?.track && state === "idle") state = "listening";
    $("state").dataset.state = state;
    $("state").lastElementChild.textContent = t(state);
  }

  poster() {
    const picture = this.app.avatars.pictures.get(this.app.avatars.chosen);
    if (picture) $("poster").src = picture;
    $("poster").hidden = !picture || Boolean(this.player);
  }

  draw() {
    const live = Boolean(this.player),
      may = this.app.may("publish"),
      talks = this.app.offers(TALK) && this.app.may("control"),
      voice = this.app.server.features.includes("say");
    const secure = Boolean(navigator.mediaDevices?.getUserMedia),
      speaking = Boolean(this.player?.track);
    const why = !live ? "no_session" : !may ? "mic_scope" : voice || this.talking ? "ctrl_enter" : "no_voice";
    this.show($("state").dataset.state);
    $("video").hidden = !live;
    $("start").hidden = live;
    $("poster").hidden = live || !$("poster").src;
    $("end").disabled = $("apply").disabled = !live || !this.app.may("control");
    $("say_note").textContent = t(why);
    $("say_note").dataset.why = why;
    $("text").placeholder = t(this.talking ? "ask_hint" : "text_hint");
    $("speak_it").textContent = t(this.talking ? "ask_it" : "speak_it");
    $("text").disabled = live && why !== "ctrl_enter";
    $("speak_it").disabled = why !== "ctrl_enter" || !$("text").value.trim();
    $("sound").disabled = $("interrupt").disabled = !live || !may;
    $("mic").disabled = !live || !may || !secure;
    $("mic").setAttribute("aria-pressed", speaking);
    $("mic_note").textContent = !secure ? t("mic_insecure") : speaking ? t(this.talking ? "mic_talk" : "mic_on") : "";
    $("talk").hidden = !talks;
    $("talk_on").disabled = !live;
    $("talk_on").checked = this.talking;
    $("mute").setAttribute("aria-pressed", $("video").muted);
    this.drawFigures();
  }

  drawFigures() {
    const {first, silence, heard} = this.turn,
      {fps, offset, rtt, buffer} = this.measured,
      latency = this.app.stats?.latency;
    const glass =
      latency && buffer !== null && rtt !== null && rtt !== undefined ? latency.playout + latency.encode + rtt / 2 + buffer : null;
    const shown = {
      first: ms(first),
      silence: ms(silence),
      heard: heard === undefined ? "–" : `${heard.toFixed(1)} s`,
      fps: fps ?? "–",
      offset: ms(offset),
      glass: ms(glass),
    };
    fill(
      $("figures"),
      Object.entries(shown).map(([key, value]) => h("div", {}, h("dt", {}, t(key)), h("dd", {id: `figure_${key}`}, String(value)))),
    );
  }
}
