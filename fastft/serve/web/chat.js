// Chat: one model, a conversation that can be stopped, asked again and edited, and the list of those that this browser keeps.

import { useEffect, useRef, useState } from "preact/hooks";
import * as store from "./store.js";
import { Answer, Composer, Follower, Question, Settings, Versions, announce, answer, html, running, settle, stop } from "./parts.js";

const SAVE_MS = 1000;

export function Chat({ active, models, kept }) {
  const [conversations, setConversations] = useState(null);
  const [current, setCurrent] = useState(null);
  const [editing, setEditing] = useState(null);
  const [listed, setListed] = useState(false);
  const [unkept, setUnkept] = useState(false);
  const [, tick] = useState(0);
  const saving = useRef(new Map());
  const redraw = () => tick((n) => n + 1);

  useEffect(() => {
    store.all().then((found) => {
      setUnkept(found === null);
      const those = found || [];
      for (const each of those) Object.values(each.nodes).forEach(settle);
      setConversations(those);
      const wanted = location.hash.split("/")[1];
      setCurrent(those.find((each) => each.id === wanted) || store.newConversation(""));
    });
  }, []);

  // Another tab of this browser has gone on with a conversation: here it is shown as it is now, and not saved over.
  useEffect(() => {
    store.elsewhere.onmessage = async ({ data }) => {
      const found = await store.load(data);
      setConversations((those) => {
        const mine = (those || []).find((each) => each.id === data);
        if (!mine) return found ? [found, ...(those || [])] : those;
        if (!found) return those.filter((each) => each !== mine);
        if (!Object.keys(mine.nodes).some((id) => running.has(id))) Object.assign(mine, found);
        return [...those];
      });
    };
  }, []);

  useEffect(() => {
    if (!current || !active) return;
    const hash = current.title ? `#chat/${current.id}` : "#chat";
    if (location.hash !== hash) history.replaceState(null, "", hash);
  }, [active, current, current?.title]);

  if (!current) return html`<p class="empty">One moment…</p>`;
  const model = models.includes(current.model) ? current.model : models[0] || "";
  const shown = store.path(current);
  const last = shown.at(-1);
  const busy = shown.some((node) => running.has(node.id));

  // Saves now and then while an answer grows, and at its end.
  const keep = (conversation, now = true) => {
    clearTimeout(saving.current.get(conversation.id));
    const act = async () => {
      saving.current.delete(conversation.id);
      if (conversation.nodes && conversation.title && !conversation.gone) setUnkept(!(await store.save(conversation)));
    };
    if (now) act();
    else saving.current.set(conversation.id, setTimeout(act, SAVE_MS));
    setConversations((those) => (those.includes(conversation) || !conversation.title ? [...those] : [conversation, ...those]));
  };

  const ask = async (conversation, question, again = null) => {
    conversation.model = model;
    const before = store.path(conversation, question.id);
    const node = again || store.add(conversation, question.id, { role: "assistant", model, state: "waiting" });
    node.model = model;
    conversation.chosen[question.id] = node.id;
    const body = { model, messages: store.messages(conversation.settings, before), ...store.parameters(conversation.settings) };
    announce(`${model} is answering`);
    let state = null;
    let saved = 0;
    const onChange = () => {
      if (node.state !== state) {
        state = node.state;
        redraw();
        keep(conversation);
      } else if (Date.now() - saved > SAVE_MS) {
        saved = Date.now();
        store.save(conversation);
      }
    };
    await answer(node, "v1/chat/completions", body, { headers: { "x-fastft-conversation": conversation.id }, onChange });
    const how = { done: "has answered", stopped: "was stopped", failed: `failed: ${node.failure?.what}` }[node.state];
    announce(`${node.model} ${how}`);
  };

  const send = (text) => ask(current, store.add(current, last?.id, { role: "user", content: text }));
  const edit = (node, text) => {
    setEditing(null);
    ask(current, store.add(current, node.parent, { role: "user", content: text }));
  };
  const again = (node) => ask(current, current.nodes[node.parent]);
  // A try of which nothing came is replaced; one with text stays, as a version.
  const retry = (node) => ask(current, current.nodes[node.parent], node.content ? null : node);
  const choose = (node) => {
    current.chosen[node.parent] = node.id;
    keep(current);
    redraw();
  };
  const open = (conversation) => {
    setCurrent(conversation);
    setEditing(null);
    setListed(false);
  };
  const begin = () => {
    open(Object.assign(store.newConversation(model), { settings: { ...current.settings } }));
    requestAnimationFrame(() => document.querySelector("#panel-chat .composer textarea")?.focus());
  };
  const forget = async (conversation) => {
    if (!confirm(`Delete “${conversation.title}” from this browser?`)) return;
    Object.values(conversation.nodes).forEach(stop);
    conversation.gone = true;
    await store.remove(conversation.id);
    setConversations((those) => those.filter((each) => each !== conversation));
    if (conversation === current) setCurrent(store.newConversation(model));
  };

  const name = (current.title || "chat").replace(/[^\w -]+/g, "").trim().slice(0, 40) || "chat";
  return html`<div class=${`chat ${listed ? "listed" : ""}`}>
    <nav class="conversations" aria-label="Conversations">
      <div class="row"><button type="button" class="main" onClick=${begin}>New conversation</button><button type="button" class="narrow-only" onClick=${() => setListed(false)}>Back</button></div>
      ${unkept && html`<p class="detail">This browser keeps nothing (a private window?): conversations end with this tab.</p>`}
      <ul>
        ${[...(conversations || [])].sort((a, b) => b.changed - a.changed).map(
          (each) => html`<li key=${each.id} class=${each === current ? "current" : ""}>
            <button type="button" class="title" aria-current=${each === current ? "true" : undefined} onClick=${() => open(each)}>${each.title}</button>
            <button type="button" class="quiet" aria-label=${`Delete ${each.title}`} onClick=${() => forget(each)}>×</button>
          </li>`,
        )}
      </ul>
    </nav>
    <section class="talk" aria-label="Conversation">
      <div class="bar">
        <button type="button" class="narrow-only" aria-expanded=${listed} onClick=${() => setListed(!listed)}>☰<span class="hidden"> Conversations</span></button>
        <label><span class="word">Model</span> <select value=${model} onChange=${(event) => { current.model = event.target.value; keep(current); redraw(); }}>
          ${models.map((each) => html`<option value=${each}>${each}</option>`)}
        </select></label>
        <${Settings} settings=${current.settings} onChange=${(settings) => { current.settings = settings; keep(current); redraw(); }} />
        ${shown.length > 0 && html`<details class="menu"><summary>Save</summary><div>
          <button type="button" onClick=${() => store.download(`${name}.md`, store.asText(current))}>As text (.md)</button>
          <button type="button" onClick=${() => store.download(`${name}.jsonl`, store.asConversation(current))}>For fastft (.jsonl)</button>
        </div></details>`}
      </div>
      <${Follower} key=${current.id} label="Messages" count=${shown.length}>
        ${shown.length === 0 && html`<div class="empty"><h2>Talk to ${model || "a model"}</h2><p>${kept}</p></div>`}
        ${shown.map((node) => {
          const among = store.versions(current, node.parent);
          if (node.role === "user") {
            return html`<${Question} key=${node.id} node=${node} editing=${editing === node.id} onEdit=${(text) => edit(node, text)} onCancel=${() => setEditing(null)}>
              <${Versions} among=${among} node=${node} onChoose=${choose} />
              ${!busy && html`<button type="button" class="quiet" onClick=${() => setEditing(node.id)}>Edit</button>`}
            </${Question}>`;
          }
          return html`<${Answer} key=${node.id} node=${node} label=${node.model} onRetry=${busy ? null : () => retry(node)}>
            ${!busy && node.state !== "failed" && html`<button type="button" class="quiet" onClick=${() => again(node)}>Regenerate</button>`}
            <${Versions} among=${among} node=${node} onChoose=${choose} />
          </${Answer}>`;
        })}
      </${Follower}>
      <${Composer} key=${`composer-${current.id}`} name=${current.title ? current.id : "new"} busy=${busy} blocked=${models.length ? "" : "No model is served."}
        onSend=${send} onStop=${() => shown.forEach(stop)} onEditLast=${() => setEditing(shown.findLast((node) => node.role === "user")?.id)} />
    </section>
  </div>`;
}
