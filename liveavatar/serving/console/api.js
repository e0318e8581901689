// The public API, with the key of this tab. The key lives in sessionStorage and in no URL.

const KEPT = "liveavatar.key";

export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || body.title || `HTTP ${status}`);
    this.status = status;
    this.kind = String(body.type || "")
      .split(/[/:]/)
      .pop();
  }
}

export class Api {
  constructor() {
    this.key = sessionStorage.getItem(KEPT);
  } // null: nobody entered; "": a server that asks for none

  enter(key) {
    this.key = key;
    sessionStorage.setItem(KEPT, key);
  }

  forget() {
    this.key = null;
    sessionStorage.removeItem(KEPT);
  }

  headers(more = {}) {
    return this.key ? {Authorization: `Bearer ${this.key}`, ...more} : more;
  }

  async ask(method, path, {json, body, headers, keepalive = false} = {}) {
    const type = json === undefined ? {} : {"Content-Type": "application/json"};
    const answer = await fetch(path, {
      method,
      keepalive,
      headers: this.headers({...type, ...headers}),
      body: json === undefined ? body : JSON.stringify(json),
    });
    if (answer.ok) return answer;
    throw new Problem(answer.status, await answer.json().catch(() => ({})));
  }

  async get(path) {
    return (await this.ask("GET", path)).json();
  }

  async post(path, json) {
    const answer = await this.ask("POST", path, {json});
    return answer.status === 204 ? null : answer.json();
  }

  async form(path, fields) {
    const body = new FormData();
    for (const [name, value] of Object.entries(fields)) for (const one of [value].flat()) body.append(name, one);
    return (await this.ask("POST", path, {body})).json();
  }

  // Also while the page goes away, when nobody waits for the answer.
  delete(path, keepalive = false) {
    return this.ask("DELETE", path, {keepalive});
  }

  async picture(path) {
    return URL.createObjectURL(await (await this.ask("GET", path)).blob());
  }

  // Events of a session and orders to it (the stream socket).
  socket(session, after = 0) {
    const url = new URL(`/v1/sessions/${session}/stream?after=${after}`, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    return new WebSocket(url, this.key ? ["liveavatar.v1", `bearer.${this.key}`] : ["liveavatar.v1"]);
  }
}
