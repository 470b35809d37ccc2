// The page: its tabs, the server's state, and the key.

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { getJson, key, news } from "./api.js";
import { About, recorded } from "./about.js";
import { Chat } from "./chat.js";
import { Compare } from "./compare.js";
import { Leaderboard } from "./leaderboard.js";
import { html } from "./parts.js";

const TABS = [["chat", "Chat"], ["side-by-side", "Side by side"], ["arena", "Arena"], ["leaderboard", "Leaderboard"], ["about", "About"]];
const CHECK_MS = 15_000;
const CHECK_WHILE_AWAY_MS = 2000;

const tabOfHash = () => {
  const name = location.hash.slice(1).split("/")[0];
  return TABS.some(([id]) => id === name) ? name : "chat";
};

function Tabs({ tab, onChoose }) {
  const box = useRef();
  const onKeyDown = (event) => {
    const at = TABS.findIndex(([id]) => id === tab);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: TABS.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const [id] = TABS[(to + TABS.length) % TABS.length];
    onChoose(id);
    box.current.querySelector(`#tab-${id}`).focus();
  };
  return html`<div role="tablist" aria-label="Views" ref=${box} onKeyDown=${onKeyDown}>
    ${TABS.map(([id, name]) => html`<button type="button" role="tab" id=${`tab-${id}`} aria-selected=${id === tab} aria-controls=${`panel-${id}`} tabindex=${id === tab ? 0 : -1} onClick=${() => onChoose(id)}>${name}</button>`)}
  </div>`;
}

function KeyDialog({ open, onDone }) {
  const dialog = useRef();
  const field = useRef();
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    else if (!open) dialog.current.close();
  }, [open]);
  const onSubmit = (event) => {
    event.preventDefault();
    key.set(field.current.value.trim());
    onDone();
  };
  return html`<dialog ref=${dialog} aria-labelledby="key-title" onClose=${() => open && onDone()}>
    <form onSubmit=${onSubmit}>
      <h2 id="key-title">This server asks for a key</h2>
      <p>${key.get() ? "The one you gave is not accepted here." : "Whoever runs it gives you one."} It is kept until this tab is closed.</p>
      <label>Key <input ref=${field} type="password" autocomplete="current-password" required /></label>
      <button type="submit" class="main">Use it</button>
    </form>
  </dialog>`;
}

// A panel that hangs from its button closes when one goes elsewhere, and with Escape.
function closePanels(event) {
  if (event.type === "keydown" && event.key !== "Escape") return;
  for (const open of document.querySelectorAll(".bar details[open]")) {
    if (event.type !== "keydown" && open.contains(event.target)) continue;
    open.open = false;
    if (event.type === "keydown" && open.contains(event.target)) open.firstElementChild.focus();
  }
}
addEventListener("pointerdown", closePanels);
addEventListener("keydown", closePanels);

// How the server is: "here", "away" (does not answer), "idle" (no worker can answer), "back" (for a moment).
function useServer() {
  const [state, setState] = useState("here");
  const now = useRef("here");
  const turn = (next) => {
    if (next === "here" && (now.current === "away" || now.current === "idle")) next = "back";
    now.current = next;
    setState(next);
  };
  useEffect(() => {
    let timer;
    const check = async () => {
      clearTimeout(timer);
      try {
        const health = await fetch("health", { cache: "no-store" });
        turn(health.ok ? "here" : "idle");
      } catch {
        turn("away");
      }
      timer = setTimeout(check, ["here", "back"].includes(now.current) && !document.hidden ? CHECK_MS : CHECK_WHILE_AWAY_MS);
    };
    check();
    news.addEventListener("unreachable", check);
    addEventListener("online", check);
    return () => clearTimeout(timer);
  }, []);
  useEffect(() => {
    if (state !== "back") return;
    const timer = setTimeout(() => turn("here"), 5000);
    return () => clearTimeout(timer);
  }, [state]);
  return state;
}

const SAID = {
  away: "The server does not answer. Trying to reach it again every two seconds; what you wrote is kept.",
  idle: "No worker can answer just now. The page notices when one is back.",
  back: "The server is back.",
};

function App() {
  const [tab, setTab] = useState(tabOfHash());
  // What has been looked at stays as it is behind the other tabs, and goes on answering.
  const seen = useRef(new Set()).current.add(tab);
  const [about, setAbout] = useState(null);
  const [asksKey, setAsksKey] = useState(false);
  const server = useServer();

  const load = async () => {
    try {
      setAbout(await getJson("about"));
    } catch {
      // The banner, or the dialog for the key, says why.
    }
  };
  useEffect(() => {
    const onHash = () => setTab(tabOfHash());
    addEventListener("hashchange", onHash);
    news.addEventListener("key", () => setAsksKey(true));
  }, []);
  // Models come and go; whoever comes back to the page, or to a server that was away, sees those of now.
  useEffect(() => {
    if (server !== "away") load();
  }, [server, tab]);

  const choose = (id) => {
    setTab(id);
    location.hash = id;
  };
  const models = about?.models || [];
  const closed = about?.arena_closed_because;
  const panels = {
    chat: (active) => html`<${Chat} active=${active} models=${models} kept=${recorded(about)} />`,
    "side-by-side": () => html`<${Compare} models=${models} closed=${closed} />`,
    arena: () => html`<${Compare} anonymous models=${models} closed=${closed} />`,
    leaderboard: (active) => active && html`<${Leaderboard} />`,
    about: () => html`<${About} about=${about} models=${models} />`,
  };
  return html`
    <header class="top"><h1>fastft</h1><${Tabs} tab=${tab} onChoose=${choose} /></header>
    <div class=${`banner ${server}`} role="status">${SAID[server] || ""}</div>
    <main>${TABS.map(([id]) => html`<div role="tabpanel" id=${`panel-${id}`} aria-labelledby=${`tab-${id}`} key=${id} hidden=${id !== tab}>
      ${!about ? html`<p class="empty">${server === "away" ? "" : "One moment…"}</p>` : seen.has(id) && panels[id](id === tab)}
    </div>`)}</main>
    <div id="announcer" class="hidden" role="status" aria-live="polite"></div>
    <${KeyDialog} open=${asksKey} onDone=${() => { setAsksKey(false); load(); }} />`;
}

render(html`<${App} />`, document.getElementById("app"));
