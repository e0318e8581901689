// The chain as it is cut: what every rank does, what waits where, where the time goes, and what each step makes of a block.

import {fill, h} from "./dom.js";
import {bytes, ms, t} from "./words.js";

const EVERY_MS = 2000;
const DOTS = 8; // blocks drawn one by one; more become a number
const LOOK_MS = 2500;

export class Chain {
  constructor(app) {
    Object.assign(this, {app, shown: null, looking: false, measured: {}, keep: false});
    app.on("measured", measured => {
      this.measured = measured;
    });
    app.on("session", () => {
      this.measured = {};
    });
    this.load();
    setInterval(() => this.load(), EVERY_MS); // also while another tab is open: the history needs it
  }

  build() {
    this.ranks = h("div", {class: "chain", role: "list"});
    this.budget = h("div");
    this.steps = h("div", {class: "steps"});
    this.lookNow = h("button", {type: "button", onclick: () => this.look()});
    this.keepBox = h("input", {
      type: "checkbox",
      onchange: () => {
        this.keep = this.keepBox.checked;
        if (this.keep) this.look();
      },
    });
    this.keepLabel = h("span");
    this.titles = {budget: h("h3"), budget_note: h("p", {class: "note"}), previews: h("h3"), previews_note: h("p", {class: "note"})};
    fill(
      this.panel,
      (this.facts = h("dl", {class: "figures"})),
      this.ranks,
      this.titles.budget,
      this.titles.budget_note,
      this.budget,
      this.titles.previews,
      this.titles.previews_note,
      h("div", {class: "row"}, this.lookNow, h("label", {class: "switch"}, this.keepBox, this.keepLabel)),
      this.steps,
    );
  }

  async load() {
    try {
      this.app.chain = await this.app.api.get("/v1/chain");
    } catch {
      this.app.chain = null;
    }
    if (this.panel && !this.panel.hidden) this.draw();
  }

  draw() {
    const {chain} = this.app;
    for (const [key, title] of Object.entries(this.titles)) title.textContent = t(key);
    this.lookNow.textContent = t("look");
    this.keepLabel.textContent = t("keep_looking");
    if (!chain) return;
    const facts = {
      realtime: chain.realtime_factor === null ? "–" : `× ${chain.realtime_factor.toFixed(2)}`,
      capacity: `${chain.sessions} / ${chain.capacity}`,
      restarts: String(chain.restarts),
      memory: this.memory(chain),
      degradation: String(this.app.stats?.degradation_step ?? "–"),
      drops: String(this.app.stats?.stale_pushes ?? "–"),
    };
    fill(
      this.facts,
      Object.entries(facts).map(([key, value]) => h("div", {}, h("dt", {}, t(key)), h("dd", {}, value))),
    );
    this.drawRanks(chain);
    this.drawBudget(chain);
    this.drawSteps(chain);
  }

  memory(chain) {
    const held = chain.ranks.map(rank => (rank.gpu || 0) + (rank.rss || 0)).filter(Boolean);
    return held.length ? bytes(held.reduce((a, b) => a + b)) : "–";
  }

  // ------------------------------------------------------------ ranks

  drawRanks(chain) {
    const {stats} = this.app,
      edges = stats?.edges;
    const head = this.node(
      t("head"),
      ["sessions"],
      edges ? `${t("speech_waiting")} ${edges.audio_in.depth.toFixed(1)} s` : "–",
      edges && edges.audio_in.depth / edges.audio_in.capacity,
    );
    const ranks = chain.ranks.map(rank => [
      this.wire(rank.blocks ?? 0),
      this.node(
        t("rank", {n: rank.rank}),
        rank.roles,
        rank.busy === null
          ? t("not_measured")
          : `${Math.round(100 * rank.busy)} % ${t("busy")} · ${bytes(rank.rss)}${rank.gpu ? ` · GPU ${bytes(rank.gpu)}` : ""}`,
        rank.busy,
      ),
    ]);
    const playout = this.node(
      t("playout"),
      [`${t("viewers")} ${stats?.viewers ?? 0}`],
      edges ? `${ms(edges.playout.depth)} ${t("ahead")}` : "–",
      edges && Math.min(1, edges.playout.depth),
    );
    fill(this.ranks, head, ranks, this.wire(0), playout);
  }

  node(name, roles, text, share) {
    const bar = h("i", {class: "load"}, h("i"));
    bar.firstChild.style.width = `${Math.round(100 * (share || 0))}%`;
    return h(
      "div",
      {class: "node", role: "listitem"},
      h("b", {}, name),
      h(
        "span",
        {class: "roles"},
        roles.map(role => h("span", {}, role)),
      ),
      bar,
      h("small", {}, text),
    );
  }

  // What waits between two: a dot for each block.
  wire(count) {
    const dots = count > DOTS ? [h("small", {}, String(count))] : Array.from({length: count}, () => h("i"));
    return h(
      "span",
      {class: "wire", role: "img", "aria-label": `${t("queue")}: ${t("blocks", {n: count})}`, title: t("blocks", {n: count})},
      h("span", {class: "dots"}, dots),
    );
  }

  // ------------------------------------------------------------ budget

  drawBudget(chain) {
    const latency = this.app.stats?.latency,
      {rtt, buffer} = this.measured;
    const parts = {
      ...chain.budget,
      play: latency?.playout,
      encode: latency?.encode,
      network: Number.isFinite(rtt) ? rtt / 2 + (buffer ?? 0) : null,
    };
    const known = Object.entries(parts).filter(([, seconds]) => Number.isFinite(seconds)),
      total = known.reduce((sum, [, seconds]) => sum + seconds, 0);
    if (!known.length) {
      fill(this.budget, h("p", {class: "empty"}, t("not_measured")));
      return;
    }
    const bar = h("div", {
      class: "budget",
      role: "img",
      "aria-label": known.map(([part, seconds]) => `${t(part)} ${ms(seconds)}`).join(", "),
    });
    for (const [part, seconds] of known) {
      const piece = h("span", {class: `part ${part}`, title: `${t(part)}: ${ms(seconds)}`});
      piece.style.flexGrow = Math.max((100 * seconds) / total, 0.4);
      bar.append(piece);
    }
    fill(
      this.budget,
      bar,
      h(
        "ul",
        {class: "legend"},
        known.map(([part, seconds]) => h("li", {}, h("i", {class: `part ${part}`}), `${t(part)} `, h("b", {}, ms(seconds)))),
        h("li", {class: "sum"}, "Σ ", h("b", {}, ms(total))),
      ),
    );
  }

  // ------------------------------------------------------------ steps

  async look() {
    const {session, chain} = this.app;
    if (this.looking || !session || !chain?.steps) return;
    this.looking = true;
    this.draw();
    const shown = await this.app.try(() => this.app.api.post(`/v1/sessions/${session.id}/preview`));
    this.looking = false;
    this.shown = shown ?? this.shown;
    this.keep = this.keepBox.checked = this.keep && Boolean(shown); // what failed is not asked for again by itself
    this.draw();
    if (this.keep) setTimeout(() => this.look(), LOOK_MS);
  }

  drawSteps(chain) {
    this.lookNow.disabled = this.keepBox.disabled = !chain.steps || !this.app.session || this.looking;
    if (!chain.steps) {
      fill(this.steps, h("p", {class: "empty"}, t("no_steps")));
      return;
    }
    if (!this.app.session && !this.shown) {
      fill(this.steps, h("p", {class: "empty"}, t("no_session")));
      return;
    }
    if (!this.shown || this.drawn === this.shown) return;
    this.drawn = this.shown;
    fill(
      this.steps,
      this.shown.steps.map(({step, picture}) => {
        const name = step === null ? t("decoded") : t("step", {n: step});
        return h("figure", {}, h("img", {src: picture, alt: name}), h("figcaption", {}, name));
      }),
      h("p", {class: "note"}, t("block", {n: this.shown.block})),
    );
  }
}
