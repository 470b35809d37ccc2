// What the chat and the comparison share: an answer, a question, the place to write, parameters, and following the end.

import { h } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";
import htm from "htm";
import { Failure, stream } from "./api.js";
import { MarkdownView, copy } from "./markdown.js";

export const html = htm.bind(h);

// Answers under way -----------------------------------------------------------------------------------------------------------

const RENDER_MS = 100; // ten times a second is as smooth as reading is
const watchers = new Map(); // an answer's id -> what redraws it
export const running = new Map(); // an answer's id -> its AbortController

function redraw(node) {
  for (const watcher of watchers.get(node.id) || []) watcher();
}

// Has `node` answered. Its `state` is waiting, writing, done, stopped or failed; never raises.
export async function answer(node, path, body, { headers, onChange = () => {} } = {}) {
  const controller = new AbortController();
  running.set(node.id, controller);
  Object.assign(node, { state: "waiting", started: Date.now(), content: "", failure: null, finish: null });
  onChange(node);
  let timer = null;
  const show = () => {
    timer = null;
    redraw(node);
    onChange(node);
  };
  const onText = (text) => {
    node.content += text;
    node.state = "writing";
    timer ||= setTimeout(show, RENDER_MS);
  };
  const onBegin = ({ model, asked, event }) => Object.assign(node, { model: model || node.model, asked, event });
  try {
    const { model, finish } = await stream(path, body, { signal: controller.signal, headers, onText, onBegin });
    Object.assign(node, { model: model || node.model, finish, state: "done" });
  } catch (error) {
    if (error.name === "AbortError") node.state = "stopped";
    else Object.assign(node, { state: "failed", failure: (error instanceof Failure ? error : new Failure("", String(error))).plain });
  }
  clearTimeout(timer);
  running.delete(node.id);
  redraw(node);
  onChange(node);
}

export const stop = (node) => running.get(node.id)?.abort();

// What was being written when the page was left.
export function settle(node) {
  if ((node.state === "waiting" || node.state === "writing") && !running.has(node.id)) Object.assign(node, { state: "failed", failure: new Failure("left").plain });
}

function useRedraw(node) {
  const [, tick] = useState(0);
  useEffect(() => {
    const watcher = () => tick((n) => n + 1);
    if (!watchers.has(node.id)) watchers.set(node.id, new Set());
    watchers.get(node.id).add(watcher);
    return () => {
      const those = watchers.get(node.id);
      those.delete(watcher);
      if (!those.size) watchers.delete(node.id);
    };
  }, [node.id]);
}

// Says something to those who listen to the page instead of looking at it.
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

// Messages ---------------------------------------------------------------------------------------------------------------

function Markdown({ text, whole }) {
  const box = useRef();
  const view = useRef();
  useLayoutEffect(() => {
    view.current ||= new MarkdownView(box.current);
    view.current.update(text, whole);
  }, [text, whole]);
  return html`<div class="markdown" ref=${box}></div>`;
}

function Waiting({ since }) {
  const [, tick] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => tick((n) => n + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  const seconds = Math.floor((Date.now() - since) / 1000);
  return html`<p class="waiting"><span class="dots" aria-hidden="true"></span>${seconds < 3 ? "Waiting for the model" : `Waiting for the model, ${seconds} s`}</p>`;
}

export function Copy({ text, children }) {
  const [said, say] = useState("");
  const act = async () => {
    say((await copy(text())) ? "Copied" : "Not copied");
    setTimeout(() => say(""), 1500);
  };
  return html`<button type="button" class="quiet" onClick=${act}>${said || children}</button>`;
}

export function Trouble({ failure, onRetry }) {
  return html`<div class="trouble">
    <p><strong>${failure.what}</strong> ${failure.hint}</p>
    ${failure.detail && html`<p class="detail">${failure.detail}</p>`}
    ${onRetry && html`<button type="button" onClick=${onRetry}>Retry</button>`}
  </div>`;
}

export function Versions({ among, node, onChoose }) {
  const at = among.indexOf(node);
  if (among.length < 2) return null;
  return html`<span class="versions">
    <button type="button" class="quiet" aria-label="Earlier version" disabled=${at === 0} onClick=${() => onChoose(among[at - 1])}>‹</button>
    <span aria-label=${`Version ${at + 1} of ${among.length}`}>${at + 1}/${among.length}</span>
    <button type="button" class="quiet" aria-label="Later version" disabled=${at === among.length - 1} onClick=${() => onChoose(among[at + 1])}>›</button>
  </span>`;
}

// An answer. `label`: who says so; `hidden`: nothing is shown before `shown` is true.
export function Answer({ node, label, onRetry, children, shown = true }) {
  useRedraw(node);
  const busy = node.state === "waiting" || node.state === "writing";
  const whole = !busy;
  return html`<article class=${`answer ${node.state}`} aria-label=${`Answer from ${label}`} aria-busy=${busy}>
    <header><span class="who">${label}</span>${node.asked && node.asked !== node.model && html`<span class="detail">asked: ${node.asked}</span>`}</header>
    ${shown || !busy ? html`<${Markdown} text=${shown ? node.content : ""} whole=${whole} />` : null}
    ${(node.state === "waiting" || (!shown && busy)) && html`<${Waiting} since=${node.started} />`}
    ${!shown && !busy && html`<p class="detail">Finished; shown when the other one is, too.</p>`}
    ${node.state === "failed" && node.failure && html`<${Trouble} failure=${node.failure} onRetry=${onRetry} />`}
    ${node.state === "stopped" && html`<p class="detail">Stopped.</p>`}
    ${node.state === "done" && !node.content && html`<p class="detail">The model ended without a word.</p>`}
    ${node.finish === "length" && html`<p class="detail">Cut at the limit of its length.</p>`}
    ${!busy && shown && html`<footer>${node.content && html`<${Copy} text=${() => node.content}>Copy</${Copy}>`}${children}</footer>`}
  </article>`;
}

export function Question({ node, onEdit, editing, onCancel, children }) {
  if (editing) {
    return html`<article class="question editing"><${Editor} text=${node.content} onSend=${onEdit} onCancel=${onCancel} /></article>`;
  }
  return html`<article class="question" aria-label="You"><div class="said">${node.content}</div>${children && html`<footer>${children}</footer>`}</article>`;
}

function Editor({ text, onSend, onCancel }) {
  const box = useRef();
  useLayoutEffect(() => {
    box.current.focus();
    box.current.setSelectionRange(text.length, text.length);
  }, []);
  const send = () => box.current.value.trim() && onSend(box.current.value);
  return html`<div>
    <textarea ref=${box} aria-label="Edit your message" rows="3" onKeyDown=${(event) => (event.key === "Escape" ? onCancel() : sends(event) && send())}>${text}</textarea>
    <div class="row"><button type="button" class="main" onClick=${send}>Send</button><button type="button" onClick=${onCancel}>Cancel</button></div>
  </div>`;
}

// Whether a key sends. Enter that takes a word from an input method does not; Safari says 229 only then.
export function sends(event) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return false;
  event.preventDefault();
  return true;
}

// The place to write -------------------------------------------------------------------------------------------------------

export function Composer({ name, busy, blocked, onSend, onStop, onEditLast }) {
  const box = useRef();
  const draft = `draft-${name}`;
  const sentAt = useRef(0);
  const [text, setText] = useState(() => sessionStorage.getItem(draft) || "");
  // Kept at once: an effect runs after the next frame, and a page that is left before it would lose the last words.
  const write = (words) => {
    sessionStorage.setItem(draft, words);
    setText(words);
  };
  useEffect(() => {
    if (!box.current) return;
    box.current.style.height = "auto";
    box.current.style.height = `${Math.min(box.current.scrollHeight + 2, 220)}px`;
  }, [text]);
  const send = () => {
    if (busy || blocked || !text.trim()) return;
    sentAt.current = Date.now();
    write("");
    onSend(text);
  };
  // Send becomes Stop under the pointer, and a double click must not do both.
  const halt = () => Date.now() - sentAt.current > 500 && onStop();
  const onKeyDown = (event) => {
    if (sends(event)) send();
    else if (event.key === "Escape" && busy) onStop();
    else if (event.key === "ArrowUp" && !text && onEditLast) {
      event.preventDefault();
      onEditLast();
    }
  };
  return html`<div class="composer">
    <textarea ref=${box} rows="1" aria-label="Your message" placeholder=${blocked || "Write a message. Enter sends, Shift+Enter begins a line."} disabled=${Boolean(blocked)}
      value=${text} onInput=${(event) => write(event.target.value)} onKeyDown=${onKeyDown}></textarea>
    ${busy
      ? html`<button type="button" class="main stop" onClick=${halt}>Stop</button>`
      : html`<button type="button" class="main" disabled=${Boolean(blocked) || !text.trim()} onClick=${send}>Send</button>`}
  </div>`;
}

export function Settings({ settings, onChange }) {
  const field = (name, label, attributes) => html`<label>${label}
    <input type="number" value=${settings[name] ?? ""} placeholder="the model's own" ...${attributes} onChange=${(event) => onChange({ ...settings, [name]: event.target.value })} />
  </label>`;
  return html`<details class="settings">
    <summary>Parameters</summary>
    <div class="fields">
      ${field("temperature", "Temperature (0 to 2)", { min: 0, max: 2, step: 0.1 })}
      ${field("top_p", "Top p (0 to 1)", { min: 0, max: 1, step: 0.05 })}
      ${field("max_tokens", "Most tokens of an answer", { min: 1, step: 1 })}
      <label class="wide">System message
        <textarea rows="2" value=${settings.system || ""} placeholder="none" onChange=${(event) => onChange({ ...settings, system: event.target.value })}></textarea>
      </label>
    </div>
  </details>`;
}

// The end of what is written --------------------------------------------------------------------------------------------------

// A box that stays at its end while it grows, unless somebody has scrolled up. `count`: of messages; a new one is shown.
export function Follower({ children, label, count }) {
  const box = useRef();
  const inner = useRef();
  const [following, setFollowing] = useState(true);
  const follows = useRef(true);
  const top = useRef(0);
  useEffect(() => jump(), [count]);
  useEffect(() => {
    const element = box.current;
    const observer = new ResizeObserver(() => follows.current && (element.scrollTop = element.scrollHeight));
    observer.observe(inner.current);
    observer.observe(element);
    return () => observer.disconnect();
  }, []);
  const onScroll = () => {
    const { scrollHeight, scrollTop, clientHeight } = box.current;
    // Not being at the end does not mean that somebody has left it: the text may have grown. Moving up does.
    if (scrollHeight - scrollTop - clientHeight < 40) follows.current = true;
    else if (scrollTop < top.current) follows.current = false;
    top.current = scrollTop;
    setFollowing(follows.current);
  };
  const jump = () => {
    follows.current = true;
    setFollowing(true);
    box.current.scrollTop = box.current.scrollHeight;
  };
  return html`<div class="follower">
    <div class="scroll" ref=${box} onScroll=${onScroll} tabindex="0" role="log" aria-live="off" aria-label=${label}><div class="inner" ref=${inner}>${children}</div></div>
    ${!following && html`<button type="button" class="jump" onClick=${jump}>↓ Newest</button>`}
  </div>`;
}
