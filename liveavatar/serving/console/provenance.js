// Was a video made here, what was recorded here, and who agreed to have their face speak.

import {fill, h, twice} from "./dom.js";
import {bytes, day, language, span, t} from "./words.js";

export class Provenance {
  constructor(app) {
    Object.assign(this, {app, consents: [], recordings: [], result: null, checking: false});
  }

  build() {
    this.file = h("input", {type: "file", accept: "video/*", hidden: true, onchange: () => this.app.try(() => this.check())});
    this.choose = h("button", {type: "button", class: "primary", onclick: () => this.file.click()});
    this.answer = h("p", {role: "status"});
    this.more = h("p", {class: "note"});
    this.list = h("div");
    this.recorded = h("div");
    this.titles = {verify: h("h3"), verify_note: h("p", {class: "note"}), recordings: h("h3"), consents: h("h3")};
    fill(
      this.panel,
      this.titles.verify,
      this.titles.verify_note,
      h("div", {class: "row"}, this.choose, this.file, this.answer),
      this.more,
      this.titles.recordings,
      this.recorded,
      this.titles.consents,
      this.list,
    );
  }

  draw(again) {
    if (again) return; // nothing here moves by itself
    for (const [key, title] of Object.entries(this.titles)) title.textContent = t(key);
    this.choose.textContent = t("choose_video");
    this.show();
    this.app.try(() => this.load());
  }

  async load() {
    [{consents: this.consents}, {recordings: this.recordings}] = await Promise.all([
      this.app.api.get("/v1/consents"),
      this.app.api.get("/v1/recordings"),
    ]);
    this.show();
  }

  async check() {
    const [file] = this.file.files;
    this.file.value = "";
    Object.assign(this, {result: null, checking: true});
    this.show();
    try {
      this.result = await (
        await this.app.api.ask("POST", "/v1/watermark:detect", {body: file, headers: {"Content-Type": "application/octet-stream"}})
      ).json();
    } finally {
      this.checking = false;
      this.show();
    }
  }

  show() {
    const {result} = this;
    this.choose.disabled = this.checking;
    this.answer.textContent = this.checking ? t("checking") : result ? t(result.found ? "found" : "not_found") : "";
    this.answer.className = result?.found ? "good" : "";
    this.more.textContent = result?.found
      ? t("found_more", {payload: result.payload, pictures: result.pictures, alarm: result.false_alarm.toExponential(0)})
      : "";
    if (this.panel.querySelector(".armed")) return;
    table(
      this.recorded,
      ["avatar", "began", "length", "size", "signed"],
      this.recordings.map(recording => this.recordingRow(recording)),
    );
    table(
      this.list,
      ["subject", "scope", "state", "expires"],
      this.consents.map(consent => this.row(consent)),
    );
  }

  recordingRow(recording) {
    const {app} = this;
    const get = h(
      "button",
      {
        type: "button",
        onclick: () =>
          app.try(async () => h("a", {href: await app.api.picture(recording.links.file), download: `${recording.id}.mp4`}).click()),
      },
      t("download"),
    );
    const erase = app.may("control")
      ? twice(t("erase"), t("sure"), () =>
          app.try(async () => {
            await app.api.delete(recording.links.self);
            await this.load();
          }),
        )
      : null;
    const cells = [
      app.avatars.name(recording.avatar ?? "–"),
      recording.began ? new Date(recording.began).toLocaleString(language()) : "–",
      span(recording.seconds ?? 0),
      bytes(recording.bytes),
      h("span", {class: "pill", "data-state": recording.signed ? "good" : "wait"}, recording.signed ? "C2PA" : "–"),
    ];
    return h(
      "tr",
      {title: `SHA-256 ${recording.sha256}`},
      cells.map(cell => h("td", {}, cell)),
      h("td", {class: "acts"}, get, erase),
    );
  }

  row(consent) {
    const {app} = this;
    const revoke =
      consent.state === "valid" && app.may("control")
        ? twice(t("revoke"), t("sure"), () =>
            app.try(async () => {
              await app.api.post(`/v1/consents/${consent.id}/revoke`);
              await this.load();
            }),
          )
        : null;
    const cells = [
      consent.subject ?? "–",
      consent.scope.map(one => t(`s_${one}`)).join(", "),
      h("span", {class: "pill", "data-state": consent.state === "valid" ? "good" : "bad"}, consent.state),
      consent.expires_at ? day(consent.expires_at) : t("never"),
    ];
    return h(
      "tr",
      {title: consent.id},
      cells.map(cell => h("td", {}, cell)),
      h("td", {class: "acts"}, revoke),
    );
  }
}

function table(place, heads, rows) {
  const head = h(
    "thead",
    {},
    h(
      "tr",
      {},
      heads.map(key => h("th", {scope: "col"}, t(key))),
      h("th"),
    ),
  );
  fill(
    place,
    rows.length ? h("div", {class: "scroll"}, h("table", {}, head, h("tbody", {}, rows))) : h("p", {class: "empty"}, t("nothing")),
  );
}
