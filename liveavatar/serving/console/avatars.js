// The picker: faces as radio buttons, and the form that adds one, with the record of consent a person's face needs.

import {$, fill, h, toast} from "./dom.js";
import {t} from "./words.js";

export class Avatars {
  constructor(app) {
    Object.assign(this, {app, list: [], chosen: "default", pictures: new Map()});
    app.on("language", () => this.draw());
  }

  async load() {
    const {avatars} = await this.app.api.get("/v1/avatars");
    this.list = avatars;
    if (!avatars.some(({id}) => id === this.chosen)) this.chosen = avatars[0]?.id;
    await Promise.all(
      avatars.map(async ({id, links}) => {
        if (!this.pictures.has(id)) this.pictures.set(id, await this.app.api.picture(links.thumbnail));
      }),
    );
    this.draw();
    this.app.stage.poster();
  }

  draw() {
    const faces = this.list.map(({id}) =>
      h(
        "label",
        {class: "face", title: this.name(id)},
        h("input", {type: "radio", name: "avatar", value: id, checked: id === this.chosen, onchange: () => this.choose(id)}),
        h("img", {src: this.pictures.get(id) ?? "", alt: ""}),
        h("span", {}, this.name(id)),
      ),
    );
    const add = this.app.may("control")
      ? [
          h(
            "button",
            {type: "button", class: "face add", onclick: () => this.ask()},
            h("i", {"aria-hidden": "true"}, "+"),
            h("span", {}, t("add")),
          ),
        ]
      : [];
    fill($("avatars"), faces, add);
  }

  name(id) {
    return (this.list.find(avatar => avatar.id === id)?.name ?? id).replaceAll("_", " ");
  }

  choose(id) {
    this.chosen = id;
    this.app.tell("avatar", id);
  }

  // ------------------------------------------------------------ a new face

  ask() {
    const dialog = $("upload"),
      today = new Date().toISOString().slice(0, 10);
    const field = (key, input) => h("label", {class: "field"}, h("span", {}, t(key)), input);
    const choice = (name, value, key, checked) =>
      h("label", {class: "switch"}, h("input", {type: "radio", name, value, checked, onchange: () => show()}), h("span", {}, t(key)));
    const file = h("input", {type: "file", accept: "image/jpeg,image/png,image/webp", required: true}),
      name = h("input", {type: "text", maxLength: 64, value: ""});
    const subject = h("input", {type: "text", maxLength: 200}),
      expires = h("input", {type: "date", min: today});
    const method = h(
      "select",
      {},
      ["self", "document", "liveness"].map(key => h("option", {value: key}, t(`m_${key}`))),
    );
    const scopes = ["conversation", "livestream", "recording"].map(key =>
      h(
        "label",
        {class: "switch"},
        h("input", {type: "checkbox", value: key, checked: key !== "livestream"}),
        h("span", {}, t(`s_${key}`)),
      ),
    );
    const person = h(
      "div",
      {class: "consent"},
      field("subject", subject),
      field("method", method),
      h("fieldset", {}, h("legend", {}, t("agreed_to")), scopes),
      field("until", expires),
    );
    const error = h("p", {class: "error", role: "alert"});
    const form = h(
      "form",
      {method: "dialog"},
      h("h2", {id: "upload_title"}, t("upload_title")),
      field("portrait", file),
      field("name", name),
      h(
        "fieldset",
        {},
        h("legend", {}, t("whose")),
        choice("whose", "synthetic", "synthetic", true),
        choice("whose", "person", "person", false),
      ),
      person,
      error,
      h(
        "div",
        {class: "row"},
        h("button", {type: "button", onclick: () => dialog.close()}, t("cancel")),
        h("span", {class: "gap"}),
        h("button", {class: "primary", type: "submit"}, t("save")),
      ),
    );
    const real = () => form.querySelector("[name=whose]:checked").value === "person",
      show = () => {
        person.hidden = !real();
      };
    form.addEventListener("submit", async event => {
      event.preventDefault();
      const said = {
        scope: scopes
          .map(label => label.firstChild)
          .filter(box => box.checked)
          .map(box => box.value),
        subject: subject.value.trim(),
        method: method.value,
      };
      if (expires.value) said.expires_at = Date.parse(expires.value) / 1000;
      if (real() && !said.subject) {
        error.textContent = t("person_needed");
        return;
      }
      try {
        await this.add(file.files[0], name.value.trim() || "avatar", real() ? said : null);
        dialog.close();
      } catch (problem) {
        error.textContent = problem.message;
      }
    });
    fill(dialog, form);
    show();
    dialog.showModal();
  }

  // consent: what a person agreed to; null: nobody's face.
  async add(portrait, name, consent) {
    const {api} = this.app;
    const proof = consent ? {consent_id: (await api.form("/v1/consents", {media: portrait, ...consent})).id} : {synthetic: "true"};
    const made = await api.form("/v1/avatars", {portrait, name, ...proof});
    this.chosen = made.id;
    await this.load();
    this.app.tell("avatar", made.id);
    toast(made.name);
  }
}
