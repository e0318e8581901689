// Where the session on stage is sent: started, watched and ended here. Addresses come back without their keys.

import {copy, fill, h, twice} from "./dom.js";
import {bytes, known, t} from "./words.js";

const KINDS = ["record", "rtmp", "hls", "whip"];

export class Outputs {
  constructor(app) {
    Object.assign(this, {app, list: [], asked: 0, before: new Map()});
    app.on("session", () => {
      this.list = [];
      this.before.clear();
    });
  }

  build() {
    this.table = h("div");
    this.form = h("form", {
      class: "line",
      onsubmit: event => {
        event.preventDefault();
        this.app.try(() => this.start());
      },
    });
    fill(this.panel, this.form, this.table);
    this.draw();
    this.app.on("language", () => this.drawForm());
    this.app.on("session", () => this.drawForm());
  }

  drawForm() {
    const kind = this.kind?.value ?? "record";
    const field = (key, input) => h("label", {class: "field"}, h("span", {}, t(key)), input);
    this.kind = h(
      "select",
      {onchange: () => this.fit()},
      KINDS.map(name => h("option", {value: name, selected: name === kind}, t(`k_${name}`))),
    );
    this.url = h("input", {type: "text", placeholder: t("url_hint"), spellcheck: false, autocomplete: "off"});
    this.token = h("input", {type: "password", autocomplete: "off"});
    this.address = field("url", this.url);
    this.bearer = field("token", this.token);
    this.button = h("button", {type: "submit", class: "primary"}, t("add_output"));
    fill(this.form, field("kind", this.kind), this.address, this.bearer, this.button, h("p", {class: "note"}, t("outputs_note")));
    this.fit();
  }

  fit() {
    const sent = ["rtmp", "whip"].includes(this.kind.value);
    this.address.hidden = !sent;
    this.url.required = sent;
    this.bearer.hidden = this.kind.value !== "whip";
    this.button.disabled = !this.app.session || !this.app.may("control");
  }

  get home() {
    return `/v1/sessions/${this.app.session.id}/outputs`;
  }

  async start() {
    const wish = {
      kind: this.kind.value,
      ...(this.url.required && {url: this.url.value.trim()}),
      ...(this.token.value && {token: this.token.value}),
    };
    await this.app.api.post(this.home, wish);
    this.url.value = this.token.value = "";
    await this.load();
  }

  draw(again) {
    if (!this.kind) this.drawForm();
    if (this.app.session && (!again || Date.now() - this.asked > 2000)) this.load();
    if (!this.app.session) this.show();
  }

  async load() {
    this.asked = Date.now();
    this.list = (await this.app.try(() => this.app.api.get(this.home)))?.outputs ?? this.list;
    this.show();
  }

  // Bits a second since this was asked last.
  rate({id, bytes: sent}) {
    const now = performance.now() / 1000,
      before = this.before.get(id);
    if (!before || now - before.at > 1)
      this.before.set(id, {at: now, sent, rate: before ? Math.max(0, (8 * (sent - before.sent)) / (now - before.at)) : null});
    const {rate} = this.before.get(id);
    return rate === null ? "–" : `${(rate / 1e6).toFixed(2)} Mbit/s`;
  }

  show() {
    if (this.table.querySelector(".armed")) return;
    if (!this.list.length) {
      fill(this.table, h("p", {class: "empty"}, t(this.app.session ? "nothing" : "no_session")));
      return;
    }
    const heads = ["kind", "state", "url", "rate", "sent", "reconnects", "failures", "last_error"].map(key =>
      h("th", {scope: "col"}, t(key)),
    );
    fill(
      this.table,
      h(
        "div",
        {class: "scroll"},
        h(
          "table",
          {},
          h("thead", {}, h("tr", {}, heads, h("th"))),
          h(
            "tbody",
            {},
            this.list.map(output => this.row(output)),
          ),
        ),
      ),
    );
  }

  row(output) {
    const {app} = this,
      over = output.state === "closed";
    const place =
      output.url ??
      (output.links.playlist
        ? h(
            "button",
            {type: "button", class: "quiet", onclick: () => copy(location.origin + output.links.playlist, t("copied"))},
            t("copy"),
          )
        : "–");
    const stop =
      over || !app.may("control")
        ? null
        : twice(t("stop"), t("sure"), () =>
            app.try(async () => {
              await app.api.delete(output.links.self);
              await this.load();
            }),
          );
    const cells = [
      t(`k_${output.kind}`),
      h("span", {class: "pill", "data-state": {live: "good", closed: ""}[output.state] ?? "wait"}, known(output.state)),
      place,
      this.rate(output),
      bytes(output.bytes),
      String(output.reconnects),
      String(output.failures),
      output.last_error ? h("span", {class: "long"}, output.last_error) : "–",
    ];
    return h(
      "tr",
      {title: output.id},
      cells.map(cell => h("td", {}, cell)),
      h("td", {class: "acts"}, stop),
    );
  }
}
