import { html } from "./vendor/htm-preact.js";
import { span, ms } from "./format.js";
import { usePolled } from "./hooks.js";

const SHOWN = 50;

/** What is under way, and a button that ends it. */
export function Requests({ act }) {
  const [found, look] = usePolled("/v1/requests", 2);
  if (!found) return null;
  const rows = found.requests.slice(0, SHOWN);
  return html`<article class="requests"><h2>Requests under way <output>${found.total}</output></h2>
    ${rows.length === 0 ? html`<p class="faint">None.</p>` : html`<div class="scroll short"><table><thead><tr><th>Request</th><th>Model</th><th>State</th><th>Priority</th><th>From</th><th>Age</th><th>Waited</th><th></th></tr></thead>
      <tbody>${rows.map((one) => html`<tr key=${one.id} data-request=${one.id}>
        <td><code title="${one.endpoint} ${one.id}">${one.id.length > 14 ? `…${one.id.slice(-12)}` : one.id}</code></td>
        <td>${one.model}</td><td><span class="state ${one.state}">${one.state}</span></td><td>${one.priority}</td>
        <td>${one.key ?? one.client ?? ""}</td><td>${span(one.age_ms)}</td><td>${ms(one.queue_time_ms)}</td>
        <td class="actions"><button class="outline secondary" onClick=${async () => { await act("cancel", one.id); look(); }}>Cancel</button></td></tr>`)}</tbody></table></div>`}
    ${found.total > rows.length && html`<small>and ${found.total - rows.length} more</small>`}</article>`;
}
