// What this server is, what it allows whoever holds this key, and lines to copy. No key stands in any of them.

import {copy, fill, h} from "./dom.js";
import {bytes, span, t} from "./words.js";

const IN_BYTES = ["image_bytes", "audio_bytes"],
  IN_SECONDS = ["audio_seconds", "idle_seconds", "length_seconds"];

export class Facts {
  constructor(app) {
    Object.assign(this, {app, ice: null});
    app.on("session", () => {
      if (!this.panel.hidden) this.show();
    });
  }

  draw(again) {
    if (again) return;
    this.show();
    this.app.try(async () => {
      this.ice = (await this.app.api.get("/v1/ice-servers")).iceServers;
      this.show();
    });
  }

  show() {
    const {version, engine, owner, role, features, limits} = this.app.server;
    const decodes = RTCRtpReceiver.getCapabilities("video").codecs.some(({mimeType}) => mimeType === "video/H264");
    const facts = {
      version,
      engine,
      you: owner,
      may: role.join(", "),
      features: features.join(", ") || t("none"),
      ice: this.ice?.flatMap(({urls}) => urls).join(", ") || t("none"),
      codec: t(decodes ? "yes" : "no"),
    };
    const held = Object.entries(limits).map(([name, most]) => [
      t(`l_${name}`),
      IN_BYTES.includes(name) ? bytes(most) : IN_SECONDS.includes(name) ? span(most) : String(most),
    ]);
    const list = entries =>
      h(
        "dl",
        {class: "facts"},
        entries.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
      );
    fill(
      this.panel,
      h(
        "div",
        {class: "logs"},
        h("section", {}, h("h3", {}, t("tab_server")), list(Object.entries(facts).map(([key, value]) => [t(key), value]))),
        h("section", {}, h("h3", {}, t("limits")), list(held)),
      ),
      h("h3", {}, t("snippets")),
      this.snippets().map(([name, text]) => this.snippet(name, text)),
    );
  }

  snippets() {
    const {origin} = location,
      {session} = this.app;
    const headers = '-H "Authorization: Bearer $LIVEAVATAR_KEY" -H "Content-Type: application/json"';
    const open = `curl ${origin}/v1/sessions ${headers} -d '{"avatar_id": "${this.app.avatars.chosen}"}'`;
    return [
      ["POST /v1/sessions", open],
      ...(session ? [[t("whep"), origin + session.links.whep]] : []),
      ["OpenAPI", `${origin}/v1/openapi.json`],
    ];
  }

  snippet(name, text) {
    return h(
      "div",
      {class: "snippet"},
      h("span", {class: "note"}, name),
      h("code", {tabIndex: 0}, text),
      h("button", {type: "button", "aria-label": `${t("copy_it")}: ${name}`, onclick: () => copy(text, t("copied"))}, t("copy_it")),
    );
  }
}
