// The page, put together: the door, then the stage and the operator's tabs over one shared view of the server.

import {Api, Problem} from "./api.js";
import {$, fill, h, toast} from "./dom.js";
import {Avatars} from "./avatars.js";
import {Operator} from "./operator.js";
import {Stage} from "./stage.js";
import {switchLanguage, t, translate} from "./words.js";

const LOOK_SECONDS = 5; // between two looks at the server's health

// What everything works with. on/tell: events between the parts ("session", "stats", "event", "server", "chain", "language").
class App {
  constructor() {
    Object.assign(this, {
      api: new Api(),
      server: null,
      offered: new Set(),
      session: null,
      stats: null,
      chain: null,
      bus: new EventTarget(),
    });
  }

  on(name, act) {
    this.bus.addEventListener(name, ({detail}) => act(detail));
  }

  tell(name, detail) {
    this.bus.dispatchEvent(new CustomEvent(name, {detail}));
  }

  may(scope) {
    return this.server.role.includes(scope);
  }

  offers(path) {
    return this.offered.has(path);
  }

  // A promise's problem becomes words on the page.
  async try(work) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof Problem || error instanceof TypeError)) throw error; // TypeError: the network
      toast(error.status === 429 && error.kind === "rate" ? t("too_slow") : error.message, "bad");
      return undefined;
    }
  }

  async look() {
    this.server = await this.api.get("/v1/server");
    this.tell("server", this.server);
  }
}

const app = new App();

async function enter() {
  await app.look();
  app.offered = new Set(Object.keys((await app.api.get("/v1/openapi.json")).paths));
  $("gate").hidden = true;
  $("desk").hidden = $("forget").hidden = false;
  app.avatars = new Avatars(app);
  app.stage = new Stage(app);
  app.operator = new Operator(app);
  health();
  await app.avatars.load();
  setInterval(
    () =>
      app
        .look()
        .catch(error => Object.assign(app.server, {ready: false, reasons: [error instanceof Problem ? error.message : t("unreachable")]}))
        .finally(health),
    LOOK_SECONDS * 1000,
  );
  $("start").focus();
}

function health() {
  const {ready, reasons, draining, engine} = app.server,
    pill = $("health");
  const taken = !ready && !draining && reasons.every(reason => reason.includes("taken")); // full is no fault
  pill.hidden = false;
  pill.dataset.state = ready || taken ? "good" : "bad";
  fill(pill, t(draining ? "draining" : ready || taken ? "ready" : "not_ready"), h("span", {class: "engine"}, ` · ${engine}`));
  pill.title = reasons.join("; ");
}

$("door").addEventListener("submit", async event => {
  event.preventDefault();
  app.api.enter($("key").value.trim());
  $("key").value = $("door_error").textContent = "";
  try {
    await enter();
  } catch (error) {
    if (!(error instanceof Problem || error instanceof TypeError)) throw error;
    app.api.forget();
    $("door_error").textContent = error.status === 401 ? t("key_wrong") : error.message;
  }
});

$("forget").addEventListener("click", () => {
  app.api.forget();
  location.reload();
});

$("language").addEventListener("click", () => {
  switchLanguage();
  label();
  app.tell("language");
  if (app.server) health();
});

function label() {
  const chinese = document.documentElement.lang.startsWith("zh");
  $("language").textContent = chinese ? "English" : "中文";
  $("language").lang = chinese ? "en" : "zh";
}

translate();
label();
if (app.api.key !== null)
  enter().catch(() => {
    app.api.forget();
    $("gate").hidden = false;
  });
else $("key").focus();
