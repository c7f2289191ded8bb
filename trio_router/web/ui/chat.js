import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { ms } from "./format.js";
import { Choice } from "./logs.js";
import { bearer, events } from "./net.js";

/** A talk with a model, to try it. */
export function Chat({ names, alias, onChange }) {
  const [talk, setTalk] = useState([]);
  const [running, setRunning] = useState(null);
  const place = useRef();
  useEffect(() => { place.current.scrollTop = place.current.scrollHeight; }, [talk]);
  const under = useRef(null);
  useEffect(() => () => under.current?.abort(), []);
  const say = async (event) => {
    event.preventDefault();
    const words = event.target.words.value.trim();
    if (!words || running) return;
    event.target.reset();
    const messages = [...talk.filter((each) => each.role !== "bad").map(({ role, content }) => ({ role, content })), { role: "user", content: words }];
    setTalk([...talk, { role: "user", content: words }, { role: "assistant", content: "", note: "waiting…" }]);
    const control = new AbortController();
    setRunning(control);
    under.current = control;
    const change = (how) => setTalk((old) => (old.length ? [...old.slice(0, -1), how(old[old.length - 1])] : old));
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
  return html`<article><div class="tools"><h2>Chat</h2><${Choice} names=${names} value=${alias} onChange=${onChange} label="model of the chat"/>
      <button type="button" class="outline secondary" disabled=${!talk.length} onClick=${() => { running?.abort(); setTalk([]); }}>Clear</button></div>
    <div class="talk" ref=${place} aria-live="polite">${talk.length === 0 && html`<p class="hint">Ask ${alias} something; it is loaded if it has to be.</p>`}${talk.map((each) => html`<p class=${each.role}>${each.content}${each.note && html` <small>${each.note}</small>`}</p>`)}</div>
    <form class="say" onSubmit=${say}><input name="words" autocomplete="off" placeholder="Say something to ${alias}" aria-label="message"/>
      ${running ? html`<button type="button" class="secondary" onClick=${() => running.abort()}>Stop</button>` : html`<button>Send</button>`}</form></article>`;
}
