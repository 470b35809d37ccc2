// Ratings from people's votes, with how sure they are.

import { useEffect, useState } from "preact/hooks";
import { Failure, getJson } from "./api.js";
import { Trouble, html } from "./parts.js";

export function Leaderboard() {
  const [board, setBoard] = useState(null);
  const [trouble, setTrouble] = useState(null);
  const load = async () => {
    setTrouble(null);
    try {
      setBoard(await getJson("arena/leaderboard"));
    } catch (error) {
      setTrouble(error.plain || new Failure("", String(error)).plain);
    }
  };
  useEffect(() => void load(), []);
  if (trouble) return html`<div class="page">${trouble.code === "arena_closed" ? html`<h2>There is no leaderboard</h2><p>${trouble.what.replace("The server refused: ", "")}</p>` : html`<${Trouble} failure=${trouble} onRetry=${load} />`}</div>`;
  if (!board) return html`<p class="empty">Computing the ratings…</p>`;
  return html`<div class="page">
    <div class="row"><h2>Leaderboard</h2><button type="button" onClick=${load}>Compute again</button></div>
    ${board.models.length ? html`<${Ratings} board=${board} /><${Pairs} pairs=${board.pairs} names=${board.models.map((each) => each.model)} />` : html`<p>Nobody has voted in the arena yet.</p>`}
    <${Counted} board=${board} />
  </div>`;
}

function Ratings({ board }) {
  const rated = board.models.filter((each) => each.rating);
  const low = Math.min(...rated.map((each) => each.rating.low));
  const high = Math.max(...rated.map((each) => each.rating.high));
  const share = (value) => 2 + (96 * (value - low)) / Math.max(high - low, 1);
  return html`<div class="scrolling" tabindex="0"><table class="board">
    <caption class="hidden">Models by rating, with 95 % intervals</caption>
    <thead><tr><th scope="col" class="number">Rank</th><th scope="col">Model</th><th scope="col" class="number">Rating</th><th scope="col">95 % interval</th>
      <th scope="col" class="number">Battles</th><th scope="col" class="number">Won</th><th scope="col" class="number">Lost</th><th scope="col" class="number">Tie</th><th scope="col" class="number">Both bad</th></tr></thead>
    <tbody>${board.models.map(({ model, rank, rating, battles, few, won, lost, tie, both_bad }) => html`<tr key=${model}>
      <td class="number">${rank ?? "–"}</td><th scope="row">${model}${few && html` <span class="detail">few battles</span>`}</th>
      <td class="number">${rating ? Math.round(rating.value) : "–"}</td>
      <td class="interval">${rating ? html`<span>${Math.round(rating.low)} to ${Math.round(rating.high)}</span>
        <svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true"><line x1=${share(rating.low)} x2=${share(rating.high)} y1="5" y2="5" /><rect x=${share(rating.value) - 0.8} y="1" width="1.6" height="8" /></svg>`
        : "has not met the others"}</td>
      <td class="number">${battles}</td><td class="number">${won}</td><td class="number">${lost}</td><td class="number">${tie}</td><td class="number">${both_bad}</td></tr>`)}</tbody>
  </table></div>`;
}

function Pairs({ pairs, names }) {
  const found = new Map(pairs.map((each) => [`${each.model}\n${each.other}`, each]));
  const cell = (own, other) => {
    const { won = 0, lost = 0, tie = 0, both_bad = 0 } = found.get(`${own}\n${other}`) || {};
    const battles = won + lost + tie + both_bad;
    return battles ? `${Math.round((100 * (won + (tie + both_bad) / 2)) / battles)} % of ${battles}` : "";
  };
  return html`<details><summary>Who won against whom</summary><div class="scrolling" tabindex="0"><table class="board">
    <caption>Share of battles that the row’s model won against the column’s, a tie half</caption>
    <thead><tr><td></td>${names.map((name) => html`<th scope="col" class="number">${name}</th>`)}</tr></thead>
    <tbody>${names.map((own) => html`<tr><th scope="row">${own}</th>${names.map((other) => html`<td class="number">${own === other ? "" : cell(own, other)}</td>`)}</tr>`)}</tbody>
  </table></div></details>`;
}

function Counted({ board }) {
  const left = Object.entries(board.left_out);
  const total = board.votes + left.reduce((sum, [, count]) => sum + count, 0);
  return html`<section class="prose"><h3>What is counted</h3>
    <p>${board.votes} of ${total} votes count${left.length ? `. Left out: ${left.map(([why, count]) => `${count}, ${why}`).join("; ")}` : ""}. As of ${new Date(board.at * 1000).toLocaleString()}.</p>
    <p>Ratings are Bradley-Terry’s on the Elo scale, with mean 1000: 400 points more win 10 of 11 battles. A tie, and “both are bad”, is half a win for each.
    The intervals hold the true rating in 95 of 100 cases if votes on different questions do not depend on each other; many votes by one person do.
    A model’s rank is one more than the number of models that are better for sure: equal ranks cannot be told apart yet.</p></section>`;
}
