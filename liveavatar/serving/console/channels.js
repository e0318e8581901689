// Channels on air day and night: what is said, what comes next, how the outputs do; made, changed, erased, started, stopped, switched.

import {ChannelForm} from "./channel_form.js";
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
    const add = this.app.may("control") ? h("div", {class: "row"}, h("button", {type: "button", onclick: () => this.edit(null)}, t("new_channel"))) : null;
    fill(this.panel, this.list.length ? this.list.map(channel => this.card(channel)) : h("p", {class: "empty"}, t("no_channels")), add);
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
    const edit = h("button", {type: "button", onclick: () => this.edit(channel)}, t("edit"));
    const start = h("button", {type: "button", class: "primary", onclick: () => order("start")}, t("add_output"));
    const erase = twice(t("erase"), t("sure"), () => this.app.try(() => this.erase(channel)));
    if (channel.state === "off") return h("div", {class: "row"}, start, edit, erase);
    const stop = twice(t("stop"), t("sure"), () => order("stop"));
    if (channel.state === "waiting") return h("div", {class: "row"}, edit, stop);
    const field = (key, input) => h("label", {class: "field"}, h("span", {}, t(key)), input);
    const choice = (names, label) => h("select", {}, h("option", {value: ""}, "–"), names.map(name => h("option", {value: name}, label(name))));
    const avatar = choice(this.app.avatars.list.map(({id}) => id), id => this.app.avatars.name(id)),
      entry = choice(channel.schedule.entries.map(({name}) => name), name => name),
      prompt = h("input", {type: "text", maxLength: 2000}); // prettier-ignore
    const said = input => input.value || undefined;
    const change = () => order("switch", {avatar_id: said(avatar), prompt: said(prompt), entry: said(entry)});
    const fields = [field("avatar", avatar), field("prompt", prompt), channel.schedule.entries.length ? field("says_next", entry) : null];
    return h("form", {class: "line", onsubmit: event => event.preventDefault()}, fields, twice(t("switch_it"), t("sure"), change), edit, stop);
  }

  edit(channel) {
    new ChannelForm(this.app, channel, () => this.load());
  }

  async erase(channel) {
    await this.app.api.delete(`/v1/channels/${channel.name}?owner=${encodeURIComponent(channel.owner)}`);
    await this.load();
  }

  async order(channel, verb, body) {
    await this.app.api.post(`/v1/channels/${channel.name}:${verb}?owner=${encodeURIComponent(channel.owner)}`, body);
    if (verb === "switch") toast(t("applied"));
    document.activeElement?.blur();
    await this.load();
  }
}
