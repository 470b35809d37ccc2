// What this page and this server are, what is kept where, and the keys.

import { html } from "./parts.js";

const RECORDED = {
  texts: "This server keeps a record of every question and answer, with texts.",
  hashes: "This server keeps a record of every question and answer, without their texts (only hashes of them).",
  null: "This server keeps no record of what is asked and answered.",
};
export const recorded = (about) => RECORDED[about?.record ?? null];

export function About({ about, models }) {
  const base = new URL("v1", document.baseURI).href;
  return html`<div class="page prose">
    <h2>About</h2>
    <p>fastft ${about?.version} serves ${models.length === 1 ? "one model" : `${models.length} models`}: ${models.join(", ")}. Programs ask at <code>${base}</code>, as they would ask OpenAI’s API.</p>
    <h3>What is kept</h3>
    <p>${recorded(about)} Conversations are also kept in this browser, until you delete them.
    ${about?.moderation && " What you write is sent to a moderation service before a model reads it."} The page loads nothing from anywhere else, and pictures in answers are links.</p>
    <h3>Models make mistakes</h3>
    <p>They invent facts, sources and numbers. Check what matters.</p>
    <h3>Keys</h3>
    <ul>
      <li><kbd>Enter</kbd> sends, <kbd>Shift</kbd> <kbd>Enter</kbd> begins a line, <kbd>Esc</kbd> stops the answer.</li>
      <li><kbd>↑</kbd> in an empty message edits the last one.</li>
      <li><kbd>←</kbd> <kbd>→</kbd> move between the tabs at the top.</li>
    </ul>
    <h3>Made with</h3>
    <p>${["preact", "htm", "marked", "dompurify", "highlight"].map((name, i) => html`${i ? ", " : ""}<a href=${`web/vendor/${name}.LICENSE`} target="_blank" rel="noopener">${name}</a>`)}, all served from here.</p>
  </div>`;
}
