// Below the stage: tabs for whoever runs the server. Tabs are made once; each draws itself while it is open.

import {$, fill, h, twice} from "./dom.js";
import {Chain} from "./chain.js";
import {Channels} from "./channels.js";
import {Facts} from "./facts.js";
import {History} from "./history.js";
import {Outputs} from "./outputs.js";
import {Provenance} from "./provenance.js";
import {clock, span, t} from "./words.js";

const CURVES = {h_factor: 1.5, h_busy: 100, h_waiting: 2, h_ahead: 1000, h_fps: 25, h_filler: 5, h_offset: 45, h_network: 100}; // and the least their axes show
const DIGITS = {h_factor: 2, h_waiting: 1, h_offset: 0};

export class Operator {
  constructor(app) {
    this.app = app;
    const admin = app.may("admin");
    this.tabs = {
      chain: admin && new Chain(app),
      health: new Curves(app),
      sessions: new Sessions(app),
      outputs: new Outputs(app),
      channels: new Channels(app),
      provenance: new Provenance(app),
      log: new Log(app),
      server: new Facts(app),
    };
    this.buttons = {};
    for (const [name, tab] of Object.entries(this.tabs)) if (tab) this.make(name, tab);
    this.choose(Object.keys(this.buttons)[0]);
    app.on("language", () => {
      this.name();
      this.tabs[this.open].draw();
    });
    setInterval(() => {
      if (!document.hidden) this.tabs[this.open].draw(true);
    }, 1000);
  }

  make(name, tab) {
    const button = (this.buttons[name] = h("button", {
      type: "button",
      role: "tab",
      id: `tab_${name}`,
      "aria-controls": `panel_${name}`,
      onclick: () => this.choose(name),
      onkeydown: event => this.step(event),
    }));
    tab.panel = h("div", {role: "tabpanel", id: `panel_${name}`, "aria-labelledby": `tab_${name}`, class: "panel", hidden: true});
    $("tabs").append(button);
    $("panels").append(tab.panel);
    tab.build?.();
    this.name();
  }

  name() {
    for (const [name, button] of Object.entries(this.buttons)) button.textContent = t(`tab_${name}`);
  }

  choose(name) {
    this.open = name;
    for (const [other, button] of Object.entries(this.buttons)) {
      button.setAttribute("aria-selected", other === name);
      button.tabIndex = other === name ? 0 : -1;
      this.tabs[other].panel.hidden = other !== name;
    }
    this.tabs[name].draw();
  }

  step(event) {
    const names = Object.keys(this.buttons),
      move = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!move) return;
    this.choose(names[(names.indexOf(this.open) + move + names.length) % names.length]);
    this.buttons[this.open].focus();
  }
}

// ---------------------------------------------------------------- fifteen minutes

class Curves {
  constructor(app) {
    Object.assign(this, {app, history: new History(Object.keys(CURVES)), measured: {}, filler: null, canvases: {}});
    app.on("measured", measured => {
      this.measured = measured;
    });
    app.on("session", () => {
      this.measured = {};
      this.filler = null;
    });
    setInterval(() => this.keep(), 1000);
  }

  keep() {
    const {stats, chain} = this.app,
      {rtt, buffer, offset, fps} = this.measured;
    const busy = chain?.ranks.map(rank => rank.busy).filter(share => share !== null) ?? [],
      filler = stats?.ticks.filler ?? null;
    const now = {
      h_factor: chain?.realtime_factor,
      h_busy: busy.length ? 100 * Math.max(...busy) : null,
      h_waiting: stats?.edges.audio_in.depth,
      h_ahead: stats && 1000 * stats.edges.playout.depth,
      h_fps: fps,
      h_filler: filler !== null && this.filler !== null ? Math.max(0, filler - this.filler) : null,
      h_offset: Number.isFinite(offset) ? 1000 * offset : null,
      h_network: Number.isFinite(rtt) ? 1000 * (rtt / 2 + (buffer ?? 0)) : null,
    };
    this.filler = filler;
    for (const [name, value] of Object.entries(now)) this.history.push(name, value);
  }

  build() {
    this.canvases = Object.fromEntries(Object.keys(CURVES).map(name => [name, h("canvas", {role: "img"})]));
    this.values = Object.fromEntries(Object.keys(CURVES).map(name => [name, h("b")]));
    this.labels = Object.fromEntries(Object.keys(CURVES).map(name => [name, h("span")]));
    fill(
      this.panel,
      h(
        "div",
        {class: "curves"},
        Object.keys(CURVES).map(name => h("figure", {}, h("figcaption", {}, this.labels[name], this.values[name]), this.canvases[name])),
      ),
    );
  }

  draw() {
    for (const [name, least] of Object.entries(CURVES)) {
      const last = this.history.last(name);
      this.labels[name].textContent = t(name);
      this.values[name].textContent = last === null ? "–" : last.toFixed(DIGITS[name] ?? 0);
      this.canvases[name].setAttribute("aria-label", `${t(name)}, ${t("minutes")}`);
      this.history.draw(this.canvases[name], name, least);
    }
  }
}

// ---------------------------------------------------------------- sessions

class Sessions {
  constructor(app) {
    Object.assign(this, {app, list: null, asked: 0});
    app.on("changed", () => this.load());
    app.on("session", () => this.load());
  }

  async load() {
    this.asked = Date.now();
    this.list = (await this.app.try(() => this.app.api.get("/v1/sessions")))?.sessions ?? this.list;
    this.show();
  }

  draw(again) {
    if (!again || Date.now() - this.asked > 4000) this.load();
  }

  show() {
    if (this.panel.hidden || this.panel.querySelector(".armed")) return; // a question that waits for its answer stays
    const heads = ["avatar", "owner", "state", "age", "lease", "viewers"].map(key => h("th", {scope: "col"}, t(key)));
    const rows = (this.list ?? []).map(session => this.row(session));
    fill(
      this.panel,
      rows.length
        ? h("div", {class: "scroll"}, h("table", {}, h("thead", {}, h("tr", {}, heads, h("th"))), h("tbody", {}, rows)))
        : h("p", {class: "empty"}, t("nothing")),
    );
  }

  row(session) {
    const now = Date.now() / 1000,
      here = this.app.session?.id === session.id,
      {app} = this;
    const cells = [
      app.avatars.name(session.avatar_id),
      session.owner,
      session.state,
      span(now - session.created_at),
      session.lease?.ends_at ? span(session.lease.ends_at - now) : "–",
      String(session.viewers),
    ];
    const watch = here
      ? h("span", {class: "note"}, t("here"))
      : h("button", {type: "button", onclick: () => app.try(() => app.stage.watch(session))}, t("watch"));
    const end = app.may("control") ? twice(t("end_it"), t("sure"), () => app.try(() => this.end(session.id, here))) : null;
    return h(
      "tr",
      {title: session.id},
      cells.map(text => h("td", {}, text)),
      h("td", {class: "acts"}, watch, end),
    );
  }

  async end(id, here) {
    if (here) return this.app.stage.end();
    await this.app.api.delete(`/v1/sessions/${id}`);
    return this.load();
  }
}

// ---------------------------------------------------------------- what happened

const KEPT = 200;

class Log {
  constructor(app) {
    Object.assign(this, {app, events: [], lines: [], asked: 0});
    app.on("event", event => {
      this.events = [...this.events, event].slice(-KEPT);
    });
  }

  draw(again) {
    if (this.app.may("admin") && (!again || Date.now() - this.asked > 4000)) this.load();
    this.show();
  }

  async load() {
    this.asked = Date.now();
    this.lines = (await this.app.try(() => this.app.api.get("/v1/audit?lines=100")))?.lines ?? this.lines;
    this.show();
  }

  show() {
    const mine = this.events.map(({at, type, t: sent, n, ...rest}) => [at, type, rest.session?.id ? {} : rest]);
    const list = (key, note, entries) =>
      h(
        "section",
        {},
        h("h3", {}, t(key)),
        note ? h("p", {class: "note"}, note) : null,
        entries.length
          ? h(
              "ol",
              {class: "log", reversed: true, tabIndex: 0, "aria-label": t(key)},
              entries
                .toReversed()
                .map(([at, name, data]) => h("li", {}, h("time", {}, clock(at)), h("b", {}, name), h("span", {}, words(data)))),
            )
          : h("p", {class: "empty"}, t("nothing")),
      );
    const scrolled = [...this.panel.querySelectorAll(".log")].map(element => element.scrollTop);
    fill(
      this.panel,
      h(
        "div",
        {class: "logs"},
        list("session_events", null, mine),
        this.app.may("admin")
          ? list(
              "audit",
              t("audit_note"),
              this.lines.map(line => [line.t, line.name, line.data]),
            )
          : null,
      ),
    );
    this.panel.querySelectorAll(".log").forEach((element, i) => {
      element.scrollTop = scrolled[i] ?? 0;
    });
  }
}

const words = data =>
  Object.entries(data)
    .filter(([, value]) => value !== null && value !== "")
    .map(([key, value]) => `${key} ${typeof value === "object" ? JSON.stringify(value) : value}`)
    .join("  ·  ");
