// The dashboard. No build step: the browser runs this file as it stands.
import { html, render, useState, useEffect, useCallback } from "./vendor/htm-preact.js";
import { Chart } from "./charts.js";
import { Chat } from "./chat.js";
import { Decisions } from "./decisions.js";
import { colour, gib, ms } from "./format.js";
import { useFleet, useNumbers } from "./hooks.js";
import { Log } from "./logs.js";
import { Devices, Models } from "./models.js";
import { Unauthorized, ask, command, setKey } from "./net.js";
import { Requests } from "./requests.js";

function Figures({ numbers }) {
  const { totals, gpu } = numbers;
  const shown = [
    ["running", totals.active_requests],
    ["waiting", totals.queue_depth],
    ["requests in a minute", totals.requests_1m],
    ["errors in a minute", totals.errors_1m],
    ["tokens in a minute", totals.tokens_1m.toLocaleString()],
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
const SIGNS = { auto: "◐", light: "☀", dark: "☾" };
const MOST_LINES = 7;
const effective = (theme) => (theme === "auto" ? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light") : theme);

function App() {
  const [locked, setLocked] = useState(false);
  const [theme, setTheme] = useState(localStorage.getItem("theme") || "auto");
  const [notice, setNotice] = useState("");
  const [logged, setLogged] = useState(null);
  const [chatted, setChatted] = useState(null);
  const [fleet, up] = useFleet(locked, () => setLocked(true));
  const history = useNumbers(locked);
  const stamp = fleet ? Object.keys(fleet.models).join("\n") : null;
  const [models, setModels] = useState([]);
  useEffect(() => { if (stamp) ask("/v1/models").then((found) => setModels(found.data)).catch(() => {}); }, [stamp]);
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
  const said = models.map((each) => each.id);
  const log = names.includes(logged) ? logged : names[0];
  const chat = said.includes(chatted) || names.includes(chatted) ? chatted : names[0];
  const show = (set, place) => (alias) => { set(alias); document.getElementById(place).scrollIntoView({ behavior: "smooth", block: "nearest" }); };
  const lines = names.filter((name) => history.some((each) => each.models.find((one) => one.alias === name)?.tokens_1m)).slice(0, MOST_LINES);
  const tokens = (name) => (each) => (each.models.find((one) => one.alias === name)?.tokens_1m ?? 0) / 60;
  return html`
    <header class="bar"><h1><img src="icon.svg" alt=""/>trio-router</h1>
      <span class="state ${up ? fleet.server.status : "failed"}">${up ? fleet.server.status : "no answer, trying again"}</span>
      <small>${ready} of ${names.length} models in memory</small><span class="fill"></span>
      <button class="outline secondary" title="colours: ${theme}" aria-label="colours: ${theme}" onClick=${() => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length])}>${SIGNS[theme]} ${theme}</button></header>
    <main>
      ${notice && html`<div class="notice" role="alert">${notice}<button class="outline" aria-label="dismiss" onClick=${() => setNotice("")}>×</button></div>`}
      ${numbers && html`<${Figures} numbers=${numbers}/>`}
      <${Models} fleet=${fleet} listed=${models} numbers=${numbers} act=${act} onLog=${show(setLogged, "log")} onChat=${show(setChatted, "chat")}/>
      <${Devices} fleet=${fleet}/>
      <div class="charts">
        <${Chart} title="Tokens" unit="/ s" history=${history} headline=${[(each) => each.totals.tokens_1m / 60]} series=${lines.length ? lines.map((name) => ({ label: name, stroke: colour(names, name), value: tokens(name) })) : [{ label: "tokens", stroke: "#0f9d78", value: (each) => each.totals.tokens_1m / 60 }]}/>
        <${Chart} title="Time to first token" unit="ms" history=${history} headline=${[(each) => each.totals.first_token_ms]} series=${[{ label: "first token", stroke: "#3b82f6", value: (each) => each.totals.first_token_ms }]}/>
        <${Chart} title="Running / waiting" unit="" history=${history} headline=${[(each) => each.totals.active_requests, (each) => each.totals.queue_depth]} series=${[{ label: "running", stroke: "#0f9d78", value: (each) => each.totals.active_requests }, { label: "waiting", stroke: "#c07f00", value: (each) => each.totals.queue_depth }]}/>
      </div>
      <${Requests} act=${act}/>
      <${Decisions} stamp=${names.map((name) => fleet.models[name].status).join()}/>
      ${names.length > 0 && html`<div class="pair"><div id="chat"><${Chat} key=${chat} names=${said.length ? said : names} alias=${chat} onChange=${setChatted}/></div><div id="log"><${Log} names=${names} alias=${log} onChange=${setLogged}/></div></div>`}
    </main>`;
}

render(html`<${App}/>`, document.body);
