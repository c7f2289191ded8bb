// The dashboard. No build step: the browser runs this file as it stands.
import { html, render, useState, useEffect, useRef, useCallback } from "./vendor/htm-preact.js";
import uPlot from "./vendor/uplot.js";
import { Unauthorized, ask, bearer, command, events, lines, setKey } from "./net.js";

const KEPT_SECONDS = 600;
const SHOWN_SECONDS = 60;
const COLOURS = ["#0f9d78", "#3b82f6", "#c07f00", "#a855f7", "#e0567a", "#14b8a6", "#64748b"];
const LOADED = new Set(["ready", "starting", "loading", "crashed"]);

const colour = (names, name) => COLOURS[names.indexOf(name) % COLOURS.length];
const gib = (mb) => (mb === null || mb === undefined ? "–" : mb >= 1024 ? `${(mb / 1024).toFixed(1)} GiB` : `${mb} MiB`);
const ms = (value) => (value === null || value === undefined ? "–" : value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value)} ms`);

function ago(when) {
  if (!when) return "–";
  const seconds = Math.max(0, (Date.now() - Date.parse(when)) / 1000);
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

/** A stream of events that is opened again when it ends; `told` gets (event name, data). */
function useStream(path, told, locked) {
  const [up, setUp] = useState(true);
  useEffect(() => {
    if (locked) return undefined;
    const control = new AbortController();
    events(path, told, setUp, control.signal);
    return () => control.abort();
  }, [path, locked]);
  return up;
}

function useFleet(locked, onLocked) {
  const [fleet, setFleet] = useState(null);
  const up = useStream("/v1/models/status/stream", (name, data) => {
    if (name === "locked") onLocked();
    if (name === "full_status") setFleet(data);
    if (name === "model_update") setFleet((old) => old && { ...old, models: { ...old.models, [data.alias]: data } });
    if (name === "server_update") setFleet((old) => old && { ...old, server: data });
  }, locked);
  return [fleet, up];
}

function useNumbers(locked) {
  const [history, setHistory] = useState([]);
  useStream("/metrics/stream", (name, data) => {
    if (name !== "metrics") return;
    const at = Date.parse(data.timestamp) / 1000;
    setHistory((old) => [...old.filter((each) => each.at > at - KEPT_SECONDS && each.at < at), { at, ...data }]);
  }, locked);
  return history;
}

function Chart({ title, unit, history, series }) {
  const place = useRef();
  const plot = useRef();
  const data = [history.map((each) => each.at), ...series.map((one) => history.map(one.value))];
  useEffect(() => {
    const grid = { stroke: "rgba(128,128,128,.15)", width: 1 };
    const axis = { stroke: "#8a94a6", grid, ticks: grid, font: "11px system-ui" };
    plot.current = new uPlot({
      width: place.current.clientWidth, height: 150, padding: [8, 8, 0, 0],
      cursor: { y: false }, legend: { show: false },
      scales: { x: { range: (_, low, high) => (high ? [Math.min(low, high - SHOWN_SECONDS), high] : [0, 1]) }, y: { range: (_, low, high) => [0, Math.max(1, (high || 0) * 1.15)] } },
      axes: [axis, { ...axis, size: 44 }],
      series: [{}, ...series.map((one) => ({ label: one.label, stroke: one.stroke, fill: one.stroke + "1f", width: 2, points: { show: false }, spanGaps: true }))],
    }, data, place.current);
    const seen = new ResizeObserver(() => plot.current.setSize({ width: place.current.clientWidth, height: 150 }));
    seen.observe(place.current);
    return () => { seen.disconnect(); plot.current.destroy(); };
  }, [series.length]);
  useEffect(() => { plot.current.setData(data); }, [history]);
  const last = history.length ? series.map((one) => one.value(history[history.length - 1])) : [];
  return html`<article><h2>${title} <output>${last.map((value) => (value === null || value === undefined ? "–" : Math.round(value * 10) / 10)).join(" / ")} ${unit}</output></h2>
    <div ref=${place}></div>
    ${series.length > 1 && html`<div class="legend">${series.map((one) => html`<span><i style=${{ background: one.stroke }}></i>${one.label}</span>`)}</div>`}</article>`;
}

function Slots({ model }) {
  const cells = Array.from({ length: Math.min(model.slots, 24) }, (_, index) => html`<i class=${index < model.active ? "busy" : ""}></i>`);
  return html`<span class="slots" title="${model.active} of ${model.slots} slots busy">${cells}</span>`;
}

function Row({ model, act, onLog, onChat, numbers }) {
  const busy = model.status === "starting" || model.status === "loading";
  return html`<tr data-alias=${model.alias}>
    <td class="name">${model.alias}${model.n_ctx && html`<small>${model.n_ctx.toLocaleString()} tokens of context</small>`}</td>
    <td><span class="state ${model.status}">${model.status}</span>
      ${busy && (model.load_progress === null ? html`<progress></progress>` : html`<progress value=${model.load_progress} max="100"></progress>`)}
      ${model.error_message && html`<span class="error">${model.error_message}</span>`}</td>
    <td><${Slots} model=${model}/></td>
    <td>${model.queued || ""}</td>
    <td title="what it holds, of what it is projected to need">${model.vram_used_mb === null ? gib(model.vram_mb) : gib(model.vram_used_mb)}</td>
    <td>${numbers ? numbers.requests_1m : ""}</td>
    <td>${numbers ? numbers.tokens_1m : ""}</td>
    <td>${ago(model.last_used_at)}</td>
    <td class="actions">
      <button class="outline secondary" onClick=${() => onChat(model.alias)}>Chat</button>
      <button class="outline secondary" onClick=${() => onLog(model.alias)}>Log</button>
      ${model.status === "failed" && html`<button onClick=${() => act("reset", model.alias)}>Reset</button>`}
      ${LOADED.has(model.status)
        ? html`<button class="secondary" onClick=${() => act("eject", model.alias)}>Eject</button>`
        : html`<button disabled=${model.status === "stopping"} onClick=${() => act("load", model.alias)}>Load</button>`}
    </td></tr>`;
}

function Memory({ fleet }) {
  const [report, setReport] = useState(null);
  const stamp = Object.values(fleet.models).map((model) => model.status + model.vram_used_mb).join();
  useEffect(() => {
    let over = false;
    const look = () => ask("/vram").then((found) => over || setReport(found)).catch(() => {});
    look();
    const timer = setInterval(look, 5000);
    return () => { over = true; clearInterval(timer); };
  }, [stamp]);
  if (!report || !report.gpus.length) return null;
  const names = Object.keys(fleet.models);
  return html`<article><h2>GPU memory</h2><div class="devices">${report.gpus.map((gpu) => {
    const parts = report.models
      .map((model) => ({ name: model.model_alias, mb: (model.gpus || {})[gpu.index] || 0 }))
      .filter((part) => part.mb > 0);
    const others = Math.max(0, (gpu.used_mb || 0) - parts.reduce((sum, part) => sum + part.mb, 0));
    return html`<div><b>${gpu.index}: ${gpu.name}</b> · ${gib(gpu.used_mb)} of ${gib(gpu.total_mb)}${gpu.utilization_percent !== null && ` · ${gpu.utilization_percent} % busy`}${gpu.temperature_celsius !== null && ` · ${gpu.temperature_celsius} °C`}
      <div class="stack">${parts.map((part) => html`<i title="${part.name}: ${gib(part.mb)}" style=${{ width: `${(100 * part.mb) / gpu.total_mb}%`, background: colour(names, part.name) }}></i>`)}<i title="others: ${gib(others)}" style=${{ width: `${(100 * others) / gpu.total_mb}%`, background: "#8a94a6" }}></i></div>
      <div class="legend">${parts.map((part) => html`<span><i style=${{ background: colour(names, part.name) }}></i>${part.name} ${gib(part.mb)}</span>`)}<span><i style=${{ background: "#8a94a6" }}></i>others ${gib(others)}</span></div></div>`;
  })}</div></article>`;
}

function Choice({ names, value, onChange, label }) {
  return html`<select aria-label=${label} value=${value} onChange=${(event) => onChange(event.target.value)}>${names.map((name) => html`<option value=${name} selected=${name === value}>${name}</option>`)}</select>`;
}

function Log({ names, alias, onChange }) {
  const [text, setText] = useState([]);
  const place = useRef();
  useEffect(() => {
    setText([]);
    const control = new AbortController();
    lines(`/v1/models/${encodeURIComponent(alias)}/logs?follow=1&lines=200`, (more) => setText((old) => [...old, ...more].slice(-1000)), control.signal);
    return () => control.abort();
  }, [alias]);
  useEffect(() => { place.current.scrollTop = place.current.scrollHeight; }, [text]);
  return html`<article><div class="tools"><h2>llama-server's log</h2><${Choice} names=${names} value=${alias} onChange=${onChange} label="model of the log"/></div>
    <pre class="log" ref=${place}>${text.join("\n") || "Nothing yet."}</pre></article>`;
}

function Chat({ names, alias, onChange }) {
  const [talk, setTalk] = useState([]);
  const [running, setRunning] = useState(null);
  const place = useRef();
  useEffect(() => { place.current.scrollTop = place.current.scrollHeight; }, [talk]);
  useEffect(() => setTalk([]), [alias]);
  const say = async (event) => {
    event.preventDefault();
    const words = event.target.words.value.trim();
    if (!words || running) return;
    event.target.reset();
    const messages = [...talk.filter((each) => each.role !== "bad").map(({ role, content }) => ({ role, content })), { role: "user", content: words }];
    setTalk([...talk, { role: "user", content: words }, { role: "assistant", content: "", note: "waiting…" }]);
    const control = new AbortController();
    setRunning(control);
    const change = (how) => setTalk((old) => [...old.slice(0, -1), how(old[old.length - 1])]);
    const began = performance.now();
    let first = null, count = 0;
    try {
      const body = { model: alias, messages, stream: true };
      const answer = await fetch("/v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json", ...bearer() }, body: JSON.stringify(body), signal: control.signal });
      if (!answer.ok) throw new Error((await answer.json()).error.message);
      for await (const piece of events.of(answer)) {
        if (piece.data === "[DONE]") break;
        const data = JSON.parse(piece.data);
        if (data.error) throw new Error(data.error.message);
        const delta = data.choices?.[0]?.delta ?? {};
        const more = delta.content ?? delta.reasoning_content ?? "";
        if (!more) continue;
        first ??= performance.now();
        count += 1;
        change((last) => ({ ...last, content: last.content + more, note: "" }));
      }
      const seconds = (performance.now() - (first ?? began)) / 1000;
      change((last) => ({ ...last, note: `first token after ${ms((first ?? performance.now()) - began)}, ${(count / Math.max(seconds, 0.001)).toFixed(1)} tokens/s` }));
    } catch (error) {
      if (control.signal.aborted) change((last) => ({ ...last, note: "stopped" }));
      else change((last) => (last.content ? { ...last, note: `broken off: ${error.message}` } : { role: "bad", content: error.message }));
    } finally {
      setRunning(null);
    }
  };
  return html`<article><div class="tools"><h2>Chat</h2><${Choice} names=${names} value=${alias} onChange=${onChange} label="model of the chat"/></div>
    <div class="talk" ref=${place}>${talk.map((each) => html`<p class=${each.role}>${each.content}${each.note && html` <small>${each.note}</small>`}</p>`)}</div>
    <form class="say" onSubmit=${say}><input name="words" autocomplete="off" placeholder="Say something to ${alias}" aria-label="message"/>
      ${running ? html`<button type="button" class="secondary" onClick=${() => running.abort()}>Stop</button>` : html`<button>Send</button>`}</form></article>`;
}

function Figures({ numbers }) {
  const { totals, gpu } = numbers;
  const shown = [
    ["running", totals.active_requests],
    ["waiting", totals.queue_depth],
    ["requests in a minute", totals.requests_1m],
    ["errors in a minute", totals.errors_1m],
    ["tokens in a minute", totals.tokens_1m],
    ["mean time of an answer", ms(totals.avg_latency_ms)],
  ];
  if (gpu.vram_total_mb) shown.push([`of ${gib(gpu.vram_total_mb)} GPU memory used`, gib(gpu.vram_used_mb)]);
  return html`<div class="figures">${shown.map(([name, value]) => html`<div class="figure"><b>${value}</b><span>${name}</span></div>`)}</div>`;
}

function AskKey({ onKey }) {
  return html`<form class="key" onSubmit=${(event) => { event.preventDefault(); onKey(event.target.key.value); }}>
    <h1>trio-router</h1><label>API key<input name="key" type="password" autocomplete="current-password" autofocus/></label>
    <small>Kept in this tab until it is closed.</small><button>Enter</button></form>`;
}

const THEMES = ["auto", "light", "dark"];
const effective = (theme) => (theme === "auto" ? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light") : theme);

function App() {
  const [locked, setLocked] = useState(false);
  const [theme, setTheme] = useState(localStorage.getItem("theme") || "auto");
  const [notice, setNotice] = useState("");
  const [logged, setLogged] = useState(null);
  const [chatted, setChatted] = useState(null);
  const [fleet, up] = useFleet(locked, () => setLocked(true));
  const history = useNumbers(locked);
  const [, tick] = useState(0);
  useEffect(() => { document.documentElement.dataset.theme = effective(theme); localStorage.setItem("theme", theme); }, [theme]);
  useEffect(() => { const timer = setInterval(() => tick((n) => n + 1), 5000); return () => clearInterval(timer); }, []);
  const act = useCallback(async (what, alias) => {
    setNotice("");
    try {
      await command(what, alias);
    } catch (error) {
      setNotice(error instanceof Unauthorized ? "This key may not do that." : `${alias}: ${error.message}`);
    }
  }, []);
  if (locked) return html`<${AskKey} onKey=${(key) => { setKey(key); setLocked(false); }}/>`;
  if (!fleet) return html`<main aria-busy="true">Asking the router…</main>`;
  const names = Object.keys(fleet.models);
  const ready = names.filter((name) => fleet.models[name].status === "ready").length;
  const numbers = history[history.length - 1];
  const byAlias = Object.fromEntries((numbers?.models || []).map((each) => [each.alias, each]));
  const log = names.includes(logged) ? logged : names[0];
  const chat = names.includes(chatted) ? chatted : names[0];
  return html`
    <header class="bar"><h1><img src="icon.svg" alt=""/>trio-router</h1>
      <span class="state ${up ? fleet.server.status : "failed"}">${up ? fleet.server.status : "no answer, trying again"}</span>
      <small>${ready} of ${names.length} models in memory</small><span class="fill"></span>
      <button class="outline secondary" title="theme" onClick=${() => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % 3])}>${theme}</button></header>
    <main>
      ${notice && html`<div class="notice" role="alert">${notice}</div>`}
      ${numbers && html`<${Figures} numbers=${numbers}/>`}
      <article class="scroll"><table><thead><tr><th>Model</th><th>State</th><th>Slots</th><th>Waiting</th><th>Memory</th><th>Requests / min</th><th>Tokens / min</th><th>Used</th><th></th></tr></thead>
        <tbody>${names.map((name) => html`<${Row} key=${name} model=${fleet.models[name]} numbers=${byAlias[name]} act=${act} onLog=${setLogged} onChat=${setChatted}/>`)}</tbody></table></article>
      <${Memory} fleet=${fleet}/>
      <div class="charts">
        <${Chart} title="Tokens" unit="/s" history=${history} series=${[{ label: "tokens", stroke: "#0f9d78", value: (each) => each.totals.tokens_1m / 60 }]}/>
        <${Chart} title="Time to first token" unit="ms" history=${history} series=${[{ label: "first token", stroke: "#3b82f6", value: (each) => each.totals.first_token_ms }]}/>
        <${Chart} title="Running / waiting" unit="" history=${history} series=${[{ label: "running", stroke: "#0f9d78", value: (each) => each.totals.active_requests }, { label: "waiting", stroke: "#c07f00", value: (each) => each.totals.queue_depth }]}/>
      </div>
      <div class="pair">${names.length > 0 && html`<${Log} names=${names} alias=${log} onChange=${setLogged}/><${Chat} names=${names} alias=${chat} onChange=${setChatted}/>`}</div>
    </main>`;
}

render(html`<${App}/>`, document.body);
