// Two answers to the same question: side by side with names, or in the arena without. A vote is the server's to keep.

import { useEffect, useRef, useState } from "preact/hooks";
import { Failure, getJson } from "./api.js";
import * as store from "./store.js";
import { Answer, Composer, Follower, Question, Settings, Trouble, announce, answer, html, running, settle, stop } from "./parts.js";

const SIDES = ["a", "b"];
const VOTES = [["a", "A is better"], ["b", "B is better"], ["tie", "Tie"], ["both_bad", "Both are bad"]];
const TOGETHER = "fastft-together";

const newRound = (tab, settings = {}) => ({ tab, id: null, turns: [], settings, vote: null, models: null });

export function Compare({ anonymous, models, closed }) {
  const tab = anonymous ? "arena" : "side-by-side";
  const [round, setRound] = useState(null);
  const [pair, setPair] = useState(null);
  const [trouble, setTrouble] = useState(null);
  const [voting, setVoting] = useState(false);
  const [together, setTogether] = useState(localStorage.getItem(TOGETHER) === "yes");
  const sent = useRef(false);
  const [restored, setRestored] = useState(0);
  const [, tick] = useState(0);
  const redraw = () => tick((n) => n + 1);

  useEffect(() => {
    store.loadRound(tab).then((found) => {
      for (const turn of found?.turns || []) SIDES.forEach((side) => settle(turn[side]));
      setRound(found || newRound(tab));
    });
  }, []);

  if (!round) return html`<p class="empty">One moment…</p>`;
  // A server without an arena still answers side by side; then there is nothing to vote on.
  const votes = !closed;
  if (anonymous && closed && !round.turns.length) return html`<div class="empty"><h2>The arena is closed</h2><p>${closed}</p></div>`;

  const chosen = round.pair || pair || [models[0] || "", models[1] || models[0] || ""];
  const last = round.turns.at(-1);
  const busy = round.turns.some((turn) => SIDES.some((side) => running.has(turn[side].id)));
  const answered = Boolean(last) && SIDES.every((side) => last[side].state === "done");
  const names = round.vote?.models || round.models || {};
  const label = (side) => (names[side] ? `${side.toUpperCase()}: ${names[side]}` : `Model ${side.toUpperCase()}`);
  const keep = () => store.saveRound(round);

  const askSide = async (turn, side) => {
    const before = round.turns.slice(0, round.turns.indexOf(turn));
    const nodes = before.flatMap((each) => [{ role: "user", content: each.question }, { role: "assistant", content: each[side].content }]);
    const body = { messages: store.messages(round.settings, [...nodes, { role: "user", content: turn.question }]), ...store.parameters(round.settings) };
    let path = `arena/battles/${round.id}/${side}`;
    if (!votes) {
      body.model = chosen[SIDES.indexOf(side)];
      path = "v1/chat/completions";
    }
    let state = null;
    const onChange = (node) => {
      if (node.state === state) return;
      state = node.state;
      redraw();
      keep();
    };
    await answer(turn[side], path, body, { onChange });
    if (turn[side].state === "failed") announce(`${label(side)} failed: ${turn[side].failure.what}`);
  };

  const ask = async (turn, sides = SIDES) => {
    announce("Both models are answering");
    await Promise.all(sides.map((side) => askSide(turn, side)));
    if (SIDES.every((side) => turn[side].state === "done")) announce(votes ? "Both have answered. You can vote." : "Both have answered.");
  };

  // The server draws the models, or is told them, with the first question.
  const start = async () => {
    if (round.id || !votes) return true;
    try {
      const begun = await getJson("arena/battles", { method: "POST", body: anonymous ? {} : { models: chosen } });
      Object.assign(round, { id: begun.id, models: begun.models || null });
      return true;
    } catch (error) {
      setTrouble(error.plain || new Failure("", String(error)).plain);
      return false;
    }
  };

  const send = async (text) => {
    setTrouble(null);
    round.pair = anonymous ? null : chosen;
    const turn = { id: store.newId(), question: text };
    for (const side of SIDES) turn[side] = { id: store.newId(), content: "", state: "waiting", started: Date.now() };
    round.turns.push(turn);
    if (!votes && !anonymous) round.models = { a: chosen[0], b: chosen[1] };
    redraw();
    if (await start()) return ask(turn);
    round.turns.pop();
    sessionStorage.setItem(`draft-${tab}`, text);
    setRestored((n) => n + 1);
  };

  const vote = async (winner) => {
    if (sent.current) return; // a second click comes before the buttons are off
    sent.current = true;
    setVoting(true);
    setTrouble(null);
    try {
      round.vote = await getJson(`arena/battles/${round.id}/vote`, { method: "POST", body: { winner } });
      await keep();
      // The button that was pressed goes away; whoever listens hears what it did.
      requestAnimationFrame(() => document.querySelector(`#panel-${tab} .verdict`)?.focus());
    } catch (error) {
      setTrouble(error.plain || new Failure("", String(error)).plain);
    }
    sent.current = false;
    setVoting(false);
  };

  const takeBack = async () => {
    setTrouble(null);
    try {
      await getJson(`arena/battles/${round.id}/vote`, { method: "DELETE" });
      round.vote = { ...round.vote, withdrawn: true };
      announce("Your vote is taken back");
      await keep();
    } catch (error) {
      setTrouble(error.plain || new Failure("", String(error)).plain);
    }
    redraw();
  };

  const again = () => {
    setTrouble(null);
    round.turns.forEach((turn) => SIDES.forEach((side) => stop(turn[side])));
    const next = newRound(tab, round.settings);
    store.saveRound(next);
    setPair(chosen);
    setRound(next);
    requestAnimationFrame(() => document.querySelector(`#panel-${tab} .composer textarea`)?.focus());
  };

  const pick = (i) => html`<label><span><span class="word">Model</span> ${"AB"[i]}</span> <select value=${chosen[i]} disabled=${round.turns.length > 0} onChange=${(event) => setPair(chosen.map((name, j) => (i === j ? event.target.value : name)))}>
    ${models.map((each) => html`<option value=${each}>${each}</option>`)}
  </select></label>`;

  return html`<div class="compare">
    <div class="bar">
      ${anonymous ? !round.turns.length && html`<p class="detail">Two models, drawn by chance. Ask both, vote, and see who they were.</p>` : html`${pick(0)}${pick(1)}`}
      <label class="check"><input type="checkbox" checked=${together} onChange=${(event) => { localStorage.setItem(TOGETHER, event.target.checked ? "yes" : "no"); setTogether(event.target.checked); }} /> Show both at once</label>
      <${Settings} settings=${round.settings} onChange=${(settings) => { round.settings = settings; keep(); redraw(); }} />
      ${round.turns.length > 0 && html`<button type="button" onClick=${again}>New round</button>`}
    </div>
    <${Follower} key=${round.id || "new"} label="Answers side by side" count=${round.turns.length}>
      ${!round.turns.length && html`<div class="empty"><h2>${anonymous ? "Which answer is better?" : "Compare two models"}</h2>
        <p>${anonymous ? "Names are shown after your vote. A vote does not count if an answer says which model wrote it." : "Votes on named models are kept, but the leaderboard counts those from the arena only."}</p></div>`}
      ${round.turns.map((turn, i) => html`<div class="turn" key=${turn.id}>
        <${Question} node=${{ content: turn.question }} />
        <div class="two">${SIDES.map((side) => html`<${Answer} key=${turn[side].id} node=${turn[side]} label=${label(side)}
          shown=${!together || SIDES.every((each) => !["waiting", "writing"].includes(turn[each].state))}
          onRetry=${turn === last && !busy && !round.vote ? () => ask(turn, [side]) : null} />`)}</div>
      </div>`)}
      ${round.vote && html`<div class="verdict" tabindex="-1"><p><strong>${told(round.vote)}</strong></p>
        <div class="row">${!round.vote.withdrawn && html`<button type="button" onClick=${takeBack}>Take it back</button>`}<button type="button" class="main" onClick=${again}>New round</button></div></div>`}
      ${trouble && html`<${Trouble} failure=${trouble} onRetry=${null} />`}
    </${Follower}>
    ${last && !round.vote && html`<div class="row voting" role="group" aria-label="Your vote">
      ${votes && VOTES.map(([winner, name]) => html`<button type="button" disabled=${!answered || busy || voting} onClick=${() => vote(winner)}>${name}</button>`)}
      ${!busy && html`<button type="button" class="quiet" onClick=${() => ask(last)}>Regenerate both</button>`}
    </div>`}
    ${!votes && last && html`<p class="detail foot">No votes here: ${closed}</p>`}
    <${Composer} key=${restored} name=${tab} busy=${busy}
      blocked=${round.vote ? "This round is decided. Begin a new one." : models.length ? "" : "No model is served."}
      onSend=${send} onStop=${() => round.turns.forEach((turn) => SIDES.forEach((side) => stop(turn[side])))} />
  </div>`;
}

function told(vote) {
  const { a, b } = vote.models;
  const how = { a: `You preferred A, ${a}, to B, ${b}.`, b: `You preferred B, ${b}, to A, ${a}.`, tie: `A tie of A, ${a}, and B, ${b}.`, both_bad: `Both are bad: A, ${a}, and B, ${b}.` }[vote.winner];
  if (vote.withdrawn) return `${how} Your vote is taken back and does not count.`;
  return vote.counted ? `${how} Your vote counts.` : `${how} Your vote is kept, but does not count: ${vote.why_not}.`;
}
