// Elements without markup in strings: nothing a server or a person says is ever parsed as HTML.

export const $ = id => document.getElementById(id);

// h("p", {class: "note", onclick: f}, "text", child): an element. null children are left out.
export function h(tag, traits = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(traits)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "list" && name !== "form") element[name === "class" ? "className" : name] = value;
    else element.setAttribute(name === "className" ? "class" : name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  return element;
}

// What had the focus has it again where the same is drawn anew: in the row of that title, the button of that name.
export function fill(element, ...children) {
  const held = element.contains(document.activeElement) ? named(document.activeElement) : null;
  element.replaceChildren(...children.flat(Infinity).filter(child => child !== null && child !== undefined));
  if (held) [...element.querySelectorAll("button, [tabindex]")].find(one => named(one) === held)?.focus({preventScroll: true});
}

const named = element => `${element.closest("tr")?.title ?? ""}|${element.getAttribute("aria-label") ?? element.textContent}`;

export function toast(text, kind = "") {
  const shown = h("p", {class: `toast ${kind}`}, text);
  document.getElementById("toasts").append(shown);
  setTimeout(() => shown.remove(), kind === "bad" ? 8000 : 4000);
}

// A button that asks once more before it acts.
export function twice(label, sure, act) {
  const button = h("button", {type: "button", class: "quiet danger"}, label);
  let armed = null;
  const rest = () => {
    armed = null;
    button.textContent = label;
    button.classList.remove("armed");
  };
  button.addEventListener("click", () => {
    if (armed) {
      clearTimeout(armed);
      rest();
      act();
      return;
    }
    button.textContent = sure;
    button.classList.add("armed");
    armed = setTimeout(rest, 3000);
  });
  return button;
}

export async function copy(text, done) {
  await navigator.clipboard.writeText(text);
  toast(done);
}
