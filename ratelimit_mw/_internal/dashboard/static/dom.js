// Building and updating the page. Whatever comes from outside becomes text, never markup.

export const find = (id) => document.getElementById(id);

export function make(tag, settings = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name === "text") element.textContent = value;
    else if (name === "className") element.className = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// What would be invisible, or change the direction of what stands beside it, is spelt out.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;
const LONGEST = 300;

export function plain(name) {
  const shown = name.slice(0, LONGEST).replace(UNSEEN, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
  return name.length > LONGEST ? `${shown}…` : shown;
}

export function shortCaller(caller) {
  return /^(k|i|ah):[0-9a-f]{20,}$/.test(caller) ? `${caller.slice(0, caller.indexOf(":") + 11)}…` : plain(caller);
}

// One element for each item, kept as long as its key is there, so that focus and selection stay.
// Rows keep their places while somebody points at them.
export function keepRows(parent, items, keyOf, create, update) {
  const known = parent.known ?? (parent.known = new Map());
  const focused = document.activeElement;
  const still = known.size > 0 && (parent.matches(":hover") || parent.contains(focused));
  const keys = new Set(items.map(keyOf));
  for (const [key, element] of known) {
    if (!keys.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
  let place = parent.firstElementChild;
  for (const item of items) {
    let element = known.get(keyOf(item));
    if (!element) {
      element = create(item);
      known.set(keyOf(item), element);
      parent.insertBefore(element, still ? null : place);
    } else if (!still && element !== place) {
      parent.insertBefore(element, place);
    } else if (!still) {
      place = place.nextElementSibling;
    }
    update(element, item);
  }
  if (focused !== document.activeElement && parent.contains(focused)) focused.focus({ preventScroll: true });
}

export function bar(share, kind = "") {
  const fill = make("span", { className: "fill" });
  const element = make("span", { className: `bar ${kind}`, "aria-hidden": "true" }, fill);
  setBar(element, share);
  return element;
}

export function setBar(element, share) {
  const part = Math.max(0, Math.min(1, share || 0));
  element.firstElementChild.style.width = `${(part * 100).toFixed(1)}%`;
  element.classList.toggle("full", part >= 1);
  element.classList.toggle("near", part >= 0.8 && part < 1);
}

export const knownAs = ({ label, account }) => [...new Set([label, account])].filter(Boolean).map(plain).join(" · ");

export function callerLink(caller) {
  const link = make("a", { href: `#caller=${encodeURIComponent(caller.toWellFormed())}`, title: plain(caller) });
  link.append(make("bdi", { text: shortCaller(caller) }));
  return link;
}
