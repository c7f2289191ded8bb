import { html, useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { lines } from "./net.js";

const KEPT_LINES = 1000;

export function Choice({ names, value, onChange, label }) {
  return html`<select aria-label=${label} value=${value} onChange=${(event) => onChange(event.target.value)}>${names.map((name) => html`<option value=${name} selected=${name === value}>${name}</option>`)}</select>`;
}

/** A llama-server's lines as it writes them; the end stays in view unless somebody scrolled away from it. */
export function Log({ names, alias, onChange }) {
  const [text, setText] = useState([]);
  const place = useRef();
  const atEnd = useRef(true);
  useEffect(() => {
    setText([]);
    atEnd.current = true;
    const control = new AbortController();
    lines(`/v1/models/${encodeURIComponent(alias)}/logs?follow=1&lines=200`, (more) => setText((old) => [...old, ...more].slice(-KEPT_LINES)), control.signal);
    return () => control.abort();
  }, [alias]);
  useEffect(() => { if (atEnd.current) place.current.scrollTop = place.current.scrollHeight; }, [text]);
  const scrolled = () => { atEnd.current = place.current.scrollTop + place.current.clientHeight >= place.current.scrollHeight - 8; };
  return html`<article><div class="tools"><h2>llama-server's log</h2><${Choice} names=${names} value=${alias} onChange=${onChange} label="model of the log"/></div>
    <pre class="log" ref=${place} onScroll=${scrolled}>${text.join("\n") || "Nothing yet."}</pre></article>`;
}
