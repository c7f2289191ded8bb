import { html } from "./vendor/htm-preact.js";
import { clock, gib } from "./format.js";
import { usePolled } from "./hooks.js";

const SHOWN = 40;

/** What was decided of late, the last first: which model is loaded, which leaves, and why. */
export function Decisions({ stamp }) {
  const [found] = usePolled(`/v1/router/decisions?last=${SHOWN}`, 10, stamp);
  if (!found) return null;
  const rows = [...found.decisions].reverse();
  const memory = (one) => (one.memory_before_mb === null || one.memory_after_mb === null ? "" : `${gib(one.memory_before_mb)} → ${gib(one.memory_after_mb)}`);
  return html`<article class="decisions"><h2>Decisions</h2>
    ${rows.length === 0 ? html`<p class="faint">None yet.</p>` : html`<div class="scroll short"><table><thead><tr><th>At</th><th>Decision</th><th>Model</th><th>Why</th><th>Memory</th></tr></thead>
      <tbody>${rows.map((one) => html`<tr><td class="faint">${clock(one.at * 1000)}</td><td><span class="badge ${one.outcome}">${one.outcome}</span></td><td>${one.model}</td><td class="what">${one.why}</td><td class="faint">${memory(one)}</td></tr>`)}</tbody></table></div>`}</article>`;
}
