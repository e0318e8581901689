// The dialog that makes a channel or changes one: face, schedule with its sounds, what is between, outputs, webhook.

import {$, fill, h, toast} from "./dom.js";
import {t} from "./words.js";

const MODES = ["livestream", "conversation"],
  KINDS = ["rtmp", "hls", "whip", "record"],
  HELD = {class: "field"};

const field = (key, input, traits = HELD) => h("label", traits, h("span", {}, t(key)), input);
const text = (value, traits = {}) => h("input", {type: "text", autocomplete: "off", value: value ?? "", ...traits});
const number = (value, traits = {}) => h("input", {type: "number", min: 0, step: "any", value: value ?? "", ...traits});
const select = (pairs, value, traits = {}) =>
  h(
    "select",
    traits,
    pairs.map(([id, name]) => h("option", {value: id, selected: id === value}, name)),
  );
const local = unix => new Date(unix * 1000 - new Date(unix * 1000).getTimezoneOffset() * 60000).toISOString().slice(0, 19);

// A group of rows, each with a button that takes it away, and a button for another.
class Rows {
  constructor(legend, add, make) {
    Object.assign(this, {make, rows: []});
    this.list = h("div", {class: "rows"});
    this.box = h("fieldset", {}, h("legend", {}, t(legend)), this.list, h("button", {type: "button", onclick: () => this.add()}, t(add)));
  }

  add(...given) {
    const row = this.make(...given);
    const away = h("button", {type: "button", class: "quiet danger", title: t("remove"), "aria-label": t("remove"), onclick: () => this.take(row)}, "×");
    row.box = h("div", {class: "part_row"}, row.fields, away);
    this.rows.push(row);
    this.list.append(row.box);
  }

  take(row) {
    this.rows = this.rows.filter(one => one !== row);
    row.box.remove();
  }

  get said() {
    return this.rows.map(row => row.said());
  }
}

export class ChannelForm {
  // channel: as the server shows it; null: a new one. done: called when it is saved.
  constructor(app, channel, done) {
    Object.assign(this, {app, channel, done, dialog: $("channel")});
    const had = channel ?? {schedule: {entries: [], gap_seconds: 20, late_seconds: 60, loop: true}, filler: {prompts: [], seconds: 30}, outputs: []};
    this.sounds = channel?.sounds ?? [];
    this.name = text("", {name: "channel_name", required: true, pattern: "[a-z0-9][a-z0-9\\-]{0,62}", spellcheck: false, placeholder: "night-show"});
    const face = had.avatar_id ?? app.avatars.chosen,
      faces = new Set([...app.avatars.list.map(({id}) => id), face]); // one that was erased stays until another is chosen
    this.face = select([...faces].map(id => [id, app.avatars.name(id)]), face); // prettier-ignore
    this.mode = select(MODES.map(mode => [mode, t(`s_${mode}`)]), had.mode, {disabled: !!channel && channel.state !== "off"}); // prettier-ignore
    this.prompt = text(had.prompt, {maxLength: 2000});
    this.gap = number(had.schedule.gap_seconds);
    this.late = number(had.schedule.late_seconds);
    this.loop = h("input", {type: "checkbox", checked: had.schedule.loop});
    this.entries = new Rows("rundown", "add_entry", entry => this.entry(entry));
    this.filler = h("textarea", {rows: 2}, had.filler.prompts.join("\n"));
    this.turn = number(had.filler.seconds, {min: 1});
    this.outputs = new Rows("tab_outputs", "add_output_row", output => this.output(output));
    this.hook = h("input", {type: "url", autocomplete: "off", placeholder: had.webhook ? `${had.webhook} · ${t("unchanged")}` : t("hook_hint")});
    this.secret = h("input", {type: "password", autocomplete: "new-password", minLength: 16, maxLength: 256});
    this.unhook = h("input", {type: "checkbox"});
    had.schedule.entries.forEach(entry => this.entries.add(entry));
    had.outputs.forEach(output => this.outputs.add(output));
    this.open();
  }

  open() {
    const {channel, dialog} = this;
    this.error = h("p", {class: "error", role: "alert"});
    const check = (box, key) => h("label", {class: "switch"}, box, h("span", {}, t(key)));
    const form = h(
      "form",
      {method: "dialog"},
      h("h2", {id: "channel_title"}, channel ? channel.name : t("new_channel")),
      h("div", {class: "pair"}, channel ? null : field("name", this.name), field("avatar", this.face), field("mode", this.mode)),
      field("prompt", this.prompt),
      this.entries.box,
      h("div", {class: "pair"}, field("gap", this.gap), field("late", this.late), check(this.loop, "loop")),
      channel ? field("add_sound", this.upload()) : h("p", {class: "note"}, t("sounds_later")),
      h("div", {class: "pair"}, field("filler_prompts", this.filler, {class: "field wide"}), field("filler_turn", this.turn)),
      this.outputs.box,
      h("p", {class: "note"}, t("outputs_note")),
      h(
        "fieldset",
        {},
        h("legend", {}, t("webhook")),
        h("div", {class: "pair"}, field("url", this.hook), field("secret", this.secret)),
        channel?.webhook ? check(this.unhook, "unhook") : null,
      ),
      this.error,
      h(
        "div",
        {class: "row"},
        h("button", {type: "button", onclick: () => dialog.close()}, t("cancel")),
        h("span", {class: "gap"}),
        h("button", {class: "primary", type: "submit"}, t("save")),
      ),
    );
    form.addEventListener("submit", event => {
      event.preventDefault();
      this.save();
    });
    fill(dialog, form);
    dialog.showModal();
  }

  // ------------------------------------------------------------ rows

  entry(had = {name: `part-${this.entries.rows.length + 1}`, text: ""}) {
    const name = text(had.name, {required: true, maxLength: 64, spellcheck: false}),
      words = text(had.text, {maxLength: 2000}),
      prompt = text(had.prompt, {maxLength: 2000}),
      at = h("input", {type: "datetime-local", step: 1, value: had.at === null || had.at === undefined ? "" : local(had.at)}),
      every = number(had.every, {min: 1});
    const shown = at.value;
    const what = select([["", t("text")], ...this.sounds.map(sound => [sound.id, this.label(sound)])], had.sound ?? "", {
      "data-sounds": "",
      onchange: () => fit(),
    });
    const spoken = field("text", words, {class: "field wide"});
    const fit = () => {
      spoken.hidden = what.value !== "";
      words.required = !spoken.hidden;
    };
    fit();
    const fields = [field("name", name), field("says", what), spoken, field("at", at, {class: "field wide"}), field("every", every), field("prompt", prompt)];
    const said = () => ({
      name: name.value,
      ...(what.value ? {sound: what.value} : {text: words.value}),
      ...(at.value && {at: at.value === shown ? had.at : Date.parse(at.value) / 1000}),
      ...(every.value && {every: Number(every.value)}),
      ...(prompt.value && {prompt: prompt.value}),
    });
    return {fields, said, what};
  }

  // One that is there keeps its name, kind and key unless a new address is given.
  output(had = null) {
    const kind = select(KINDS.map(name => [name, t(`k_${name}`)]), had?.kind ?? "rtmp", {disabled: !!had, onchange: () => fit()}), // prettier-ignore
      name = text(had?.name, {disabled: !!had, maxLength: 64, spellcheck: false}),
      url = text("", {spellcheck: false, placeholder: had?.url ? `${had.url} · ${t("unchanged")}` : t("url_hint")}),
      token = h("input", {type: "password", autocomplete: "new-password"});
    const address = field("url", url, {class: "field wide"}),
      bearer = field("token", token);
    const fit = () => {
      address.hidden = !["rtmp", "whip"].includes(kind.value);
      url.required = !address.hidden && !had;
      bearer.hidden = kind.value !== "whip";
    };
    fit();
    const said = () => ({
      kind: kind.value,
      name: name.value || kind.value,
      ...(!address.hidden && url.value && {url: url.value.trim()}),
      ...(!bearer.hidden && token.value && {token: token.value}),
    });
    return {fields: [field("kind", kind), field("name", name), address, bearer], said};
  }

  label(sound) {
    return t("sound_of", {number: this.sounds.indexOf(sound) + 1, seconds: sound.seconds.toFixed(1)});
  }

  upload() {
    const send = async ([file]) => {
      if (!file) return;
      try {
        const answer = await this.app.api.ask("POST", this.path("/sounds"), {body: file, headers: {"Content-Type": file.type || "audio/wav"}});
        this.sounds.push(await answer.json());
        const sound = this.sounds.at(-1);
        for (const {what} of this.entries.rows) what.append(h("option", {value: sound.id}, this.label(sound)));
        toast(this.label(sound));
        this.error.textContent = "";
      } catch (problem) {
        this.error.textContent = problem.message;
      }
    };
    return h("input", {type: "file", accept: "audio/*", onchange: event => send(event.target.files)});
  }

  // ------------------------------------------------------------ save

  path(more = "") {
    return `/v1/channels/${this.channel.name}${more}?owner=${encodeURIComponent(this.channel.owner)}`;
  }

  get said() {
    const hook = this.unhook.checked ? {webhook: null} : this.hook.value && {webhook: {url: this.hook.value.trim(), secret: this.secret.value}};
    return {
      avatar_id: this.face.value,
      ...(!this.mode.disabled && {mode: this.mode.value}),
      prompt: this.prompt.value,
      schedule: {
        entries: this.entries.said,
        loop: this.loop.checked,
        gap_seconds: Number(this.gap.value),
        late_seconds: Number(this.late.value),
      },
      filler: {prompts: this.filler.value.split("\n").map(line => line.trim()).filter(Boolean), seconds: Number(this.turn.value)}, // prettier-ignore
      outputs: this.outputs.said,
      ...hook,
    };
  }

  async save() {
    const {api} = this.app;
    try {
      if (this.channel) await api.ask("PATCH", this.path(), {json: this.said});
      else await api.post("/v1/channels", {name: this.name.value, ...this.said});
      this.dialog.close();
      await this.done();
    } catch (problem) {
      this.error.textContent = problem.message;
    }
  }
}
