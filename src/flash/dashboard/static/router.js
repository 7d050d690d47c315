// Addresses: which page each stands for, links between them, going back and forth. Every page, and what it shows
// (tab, filter, zoom), has an address of its own.

import { h } from "./dom.js";

export const ROOT = "/dashboard";

/** An address below the dashboard; `query` entries that are empty are left out. */
export function address(path, query = {}) {
  const wanted = Object.entries(query).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return `${ROOT}${path}${wanted.length ? `?${new URLSearchParams(wanted)}` : ""}`;
}

export const runPath = (id, tab = "") => `/runs/${encodeURIComponent(id)}${tab ? `/${tab}` : ""}`;

/** A link that the browser can also open elsewhere; clicks here change the page without loading it anew. */
export function link(path, query, ...children) {
  return h("a", { href: address(path, query) }, ...children);
}

export function environmentLink(id, version, ...children) {
  return link("/environment", { id, version: version?.slice(0, 12) }, ...(children.length ? children : [id]));
}

export function go(path, query) {
  history.pushState(null, "", address(path, query));
  window.dispatchEvent(new Event("flash:address"));
}

/** Notes what the page shows now in its address, without a step in the history. */
export function note(query) {
  const kept = new URLSearchParams(location.search);
  for (const [name, value] of Object.entries(query)) {
    if (value === null || value === undefined || value === "" || value === false) kept.delete(name);
    else kept.set(name, value);
  }
  const text = kept.toString();
  history.replaceState(null, "", `${location.pathname}${text ? `?${text}` : ""}`);
}

/** Calls `show(path, query)` for this address and every later one. */
export function follow(show) {
  const here = () => {
    const path = location.pathname.slice(ROOT.length).replace(/\/+$/, "");
    show(path.split("/").filter(Boolean).map(decoded), new URLSearchParams(location.search));
  };
  window.addEventListener("popstate", here);
  window.addEventListener("flash:address", here);
  document.addEventListener("click", (event) => {
    const anchor = event.target.closest?.("a[href]");
    const plain = event.button === 0 && !event.ctrlKey && !event.metaKey && !event.shiftKey && !event.altKey;
    if (!anchor || !plain || event.defaultPrevented || anchor.target || anchor.hasAttribute("download")) return;
    const target = new URL(anchor.href);
    if (target.origin !== location.origin || !(target.pathname === ROOT || target.pathname.startsWith(`${ROOT}/`))) return;
    if (anchor.getAttribute("href").startsWith("#")) return;
    event.preventDefault();
    history.pushState(null, "", target.pathname + target.search);
    here();
  });
  here();
}

function decoded(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
