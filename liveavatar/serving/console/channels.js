// Channels on air day and night: what is said, what comes next, how the outputs do; start, stop, and another face, prompt or entry.

import {fill, h, toast, twice} from "./dom.js";
import {bytes, clock, span, t} from "./words.js";

export class Channels {
  constructor(app) {
    Object.assign(this, {app, list: [], asked: 0});
  }

  async load() {
    this.asked = Date.now();
    this.list = (await this.app.try(() => this.app.api.get("/v1/channels")))?.channels ?? this.list;
    this.show();
  }

  draw(again) {
    if (!again || Date.now() - this.asked > 2000) this.load();
  }

  show() {
    if (this.panel.hidden || this.panel.querySelector(".armed, form:focus-within")) return; // what somebody is doing stays
    fill(this.panel, this.list.length ? this.list.map(channel => this.card(channel)) : h("p", {class: "empty"}, t("no_channels")));
  }

  card(channel) {
    const {app} = this,
      {state, next} = channel;
    const facts = {
      avatar: app.avatars.name(channel.avatar_id),
      uptime: channel.on_air_since && span(Date.now() / 1000 - channel.on_air_since),
      says_now: state === "on_air" && (channel.entry ?? t("filler")),
      says_next: next && `${next.entry} · ${clock(next.at)}`,
      last_error: channel.last_error,
    };
    const light = h("span", {class: "pill", "data-state": {on_air: "good", waiting: "wait"}[state] ?? ""}, t(`c_${state}`));
    return h(
      "section",
      {"aria-label": channel.name},
      h("h3", {}, channel.name, " ", light, app.may("admin") ? h("span", {class: "note"}, ` ${channel.owner}`) : null),
      h(
        "dl",
        {class: "facts"},
        Object.entries(facts)
          .filter(([, value]) => value)
          .map(([key, value]) => [h("dt", {}, t(key)), h("dd", {}, value)]),
      ),
      channel.outputs.length ? this.outputs(channel.outputs) : null,
      app.may("control") ? this.acts(channel) : null,
    );
  }

  outputs(list) {
    const heads = ["name", "state", "sent", "reconnects", "last_error"].map(key => h("th", {scope: "col"}, t(key)));
    const row = output =>
      [output.name, output.state, bytes(output.bytes), String(output.reconnects), output.last_error ?? "–"].map(cell => h("td", {}, cell));
    return h(
      "div",
      {class: "scroll"},
      h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, list.map(output => h("tr", {}, row(output))))),
    );
  }

  acts(channel) {
    const order = (verb, body) => this.app.try(() => this.order(channel, verb, body));
    if (channel.state === "off") return h("div", {class: "row"}, h("button", {type: "button", onclick: () => order("start")}, t("add_output")));
    const stop = twice(t("stop"), t("sure"), () => order("stop"));
    if (channel.state === "waiting") return h("div", {class: "row"}, stop);
    const pick = (key, options) => {
      const select = h("select", {"aria-label": t(key)}, h("option", {value: ""}, `${t(key)}: –`), options);
      return {select, value: () => select.value || undefined};
    };
    const avatar = pick("avatar", this.app.avatars.list.map(({id}) => h("option", {value: id}, this.app.avatars.name(id))));
    const entry = pick("says_next", channel.schedule.entries.map(({name}) => h("option", {value: name}, name)));
    const prompt = h("input", {type: "text", maxLength: 2000, placeholder: t("prompt"), "aria-label": t("prompt")});
    const change = () => order("switch", {avatar_id: avatar.value(), prompt: prompt.value || undefined, entry: entry.value()});
    return h("form", {class: "row", onsubmit: event => event.preventDefault()}, avatar.select, prompt, entry.select,
      twice(t("switch_it"), t("sure"), change), stop); // prettier-ignore
  }

  async order(channel, verb, body) {
    await this.app.api.post(`/v1/channels/${channel.name}:${verb}?owner=${encodeURIComponent(channel.owner)}`, body);
    if (verb === "switch") toast(t("applied"));
    document.activeElement?.blur();
    await this.load();
  }
}
