import { html } from "./vendor/htm-preact.js";
import { ago, colour, gib } from "./format.js";
import { usePolled } from "./hooks.js";

const LOADED = new Set(["ready", "starting", "loading", "crashed"]);
const MOST_SLOTS = 24;
const PRIORITIES = ["high", "normal", "low"];

function Slots({ model }) {
  const cells = Array.from({ length: Math.min(model.slots, MOST_SLOTS) }, (_, index) => html`<i class=${index < model.active ? "busy" : ""}></i>`);
  return html`<span class="slots" title="${model.active} of ${model.slots} slots busy">${cells}</span> <small>${model.active}/${model.slots}</small>`;
}

function Waiting({ model }) {
  if (!model.queued) return null;
  const counts = PRIORITIES.map((name) => [name, model.queued_by_priority?.[name] ?? 0]).filter(([, count]) => count);
  return html`${model.queued}${counts.map(([name, count]) => html` <span class="badge ${name}" title="${count} waiting with priority ${name}">${count} ${name}</span>`)}`;
}

function Memory({ model }) {
  const { vram_used_mb: used, vram_mb: projected, ram_mb: ram } = model;
  if (!used && !projected && ram) return html`<span class="faint" title="what it is projected to need of the host's memory">${gib(ram)} RAM</span>`;
  if (used === null) return html`<span class="faint" title="what it is projected to need">${gib(projected)}</span>`;
  return html`<span title="what it holds${projected === null ? "" : `, of ${gib(projected)} projected`}">${gib(used)}</span>`;
}

function Row({ model, listed, act, onLog, onChat, numbers }) {
  const busy = model.status === "starting" || model.status === "loading";
  const notes = [listed?.name, model.n_ctx && `${model.n_ctx.toLocaleString()} tokens of context`].filter(Boolean);
  return html`<tr data-alias=${model.alias}>
    <td class="name" title=${listed?.description ?? ""}>${model.alias}${notes.length > 0 && html`<small>${notes.join(" · ")}</small>`}</td>
    <td class="how"><span class="state ${model.status}">${model.status}</span>
      ${busy && (model.load_progress === null ? html`<progress></progress>` : html`<progress value=${model.load_progress} max="100" title="${model.load_progress} %"></progress>`)}
      ${model.error_message && html`<span class="error" title=${model.error_message}>${model.error_message}</span>`}</td>
    <td data-name="Slots"><${Slots} model=${model}/></td>
    <td data-name="Waiting"><${Waiting} model=${model}/></td>
    <td data-name="Memory"><${Memory} model=${model}/></td>
    <td data-name="Requests / min">${numbers ? numbers.requests_1m : ""}</td>
    <td data-name="Tokens / min">${numbers ? numbers.tokens_1m.toLocaleString() : ""}</td>
    <td data-name="Used" class="faint">${ago(model.last_used_at)}</td>
    <td class="actions">
      <button class="outline secondary" onClick=${() => onChat(model.alias)}>Chat</button>
      <button class="outline secondary" onClick=${() => onLog(model.alias)}>Log</button>
      ${model.status === "failed" && html`<button class="outline" onClick=${() => act("reset", model.alias)}>Reset</button>`}
      ${LOADED.has(model.status)
        ? html`<button class="secondary" onClick=${() => act("eject", model.alias)}>Eject</button>`
        : html`<button disabled=${model.status === "stopping"} onClick=${() => act("load", model.alias)}>Load</button>`}
    </td></tr>`;
}

export function Models({ fleet, listed, numbers, act, onLog, onChat }) {
  const byAlias = Object.fromEntries((numbers?.models || []).map((each) => [each.alias, each]));
  const known = Object.fromEntries(listed.map((each) => [each.id, each]));
  return html`<article><table class="models"><thead><tr><th>Model</th><th>State</th><th>Slots</th><th>Waiting</th><th>Memory</th><th>Requests / min</th><th>Tokens / min</th><th>Used</th><th></th></tr></thead>
    <tbody>${Object.values(fleet.models).map((model) => html`<${Row} key=${model.alias} model=${model} listed=${known[model.alias]} numbers=${byAlias[model.alias]} act=${act} onLog=${onLog} onChat=${onChat}/>`)}</tbody></table></article>`;
}

export function Devices({ fleet }) {
  const stamp = Object.values(fleet.models).map((model) => model.status + model.vram_used_mb).join();
  const [report] = usePolled("/vram", 5, stamp);
  if (!report || !report.gpus.length) return null;
  const names = Object.keys(fleet.models);
  return html`<article><h2>GPU memory</h2><div class="devices">${report.gpus.map((gpu) => {
    const parts = report.models
      .map((model) => ({ name: model.model_alias, mb: (model.gpus || {})[gpu.index] || 0 }))
      .filter((part) => part.mb > 0);
    const others = Math.max(0, (gpu.used_mb || 0) - parts.reduce((sum, part) => sum + part.mb, 0));
    const share = (mb) => `${(100 * mb) / gpu.total_mb}%`;
    return html`<div><b>${gpu.index}: ${gpu.name}</b> · ${gib(gpu.used_mb)} of ${gib(gpu.total_mb)}${gpu.utilization_percent !== null && ` · ${gpu.utilization_percent} % busy`}${gpu.temperature_celsius !== null && ` · ${gpu.temperature_celsius} °C`}
      <div class="stack">${parts.map((part) => html`<i title="${part.name}: ${gib(part.mb)}" style=${{ width: share(part.mb), background: colour(names, part.name) }}></i>`)}<i title="others: ${gib(others)}" style=${{ width: share(others), background: "#8a94a6" }}></i></div>
      <div class="legend">${parts.map((part) => html`<span><i style=${{ background: colour(names, part.name) }}></i>${part.name} ${gib(part.mb)}</span>`)}<span><i style=${{ background: "#8a94a6" }}></i>others ${gib(others)}</span></div></div>`;
  })}</div></article>`;
}
