// How the dashboard talks to the router. `EventSource` cannot send a key, so streams are read with fetch.
export class Unauthorized extends Error {}

const KEY = "trio-router-key";
const RETRY_MS = 2000;

export const setKey = (key) => sessionStorage.setItem(KEY, key);
export const bearer = () => {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

async function checked(answer) {
  if (answer.ok) return answer;
  const said = await answer.json().then((body) => body.error?.message, () => answer.statusText);
  if (answer.status === 401 || answer.status === 403) throw new Unauthorized(said);
  throw new Error(said);
}

export const ask = async (path) => (await checked(await fetch(path, { headers: bearer() }))).json();

/** What an operator does to a model, by its alias, or to a request, by its id. */
export async function command(what, alias) {
  const send = (path, body) => fetch(path, { method: "POST", headers: { "Content-Type": "application/json", ...bearer() }, body: JSON.stringify(body) });
  if (what === "cancel") return (await checked(await send(`/v1/requests/${encodeURIComponent(alias)}/cancel`, {}))).json();
  if (what === "reset") return (await checked(await send(`/v1/models/${alias}/reset`, {}))).json();
  return (await checked(await send(`/v1/models/${what}${what === "load" ? "?wait=false" : ""}`, { model: alias }))).json();
}

async function* texts(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The events of an answer: { event, id, data }. */
async function* of(answer) {
  let rest = "";
  for await (const text of texts(answer)) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const found = { event: "message", id: null, data: "" };
      for (const line of block.split("\n")) {
        const at = line.indexOf(":");
        if (at <= 0) continue;
        const [name, value] = [line.slice(0, at), line.slice(at + 1).replace(/^ /, "")];
        if (name === "data") found.data += (found.data && "\n") + value;
        else if (name in found) found[name] = value;
      }
      if (found.data) yield found;
    }
  }
}

const pause = (signal) => new Promise((resolve) => {
  const timer = setTimeout(resolve, RETRY_MS);
  signal.addEventListener("abort", () => { clearTimeout(timer); resolve(); });
});

/** Read a stream for ever, taking it up where it broke; `told(name, data)`, `up(whether it is open)`. */
export async function events(path, told, up, signal) {
  let last = null;
  while (!signal.aborted) {
    try {
      const headers = { Accept: "text/event-stream", ...bearer(), ...(last ? { "Last-Event-ID": last } : {}) };
      const answer = await checked(await fetch(path, { headers, signal }));
      up(true);
      for await (const each of of(answer)) {
        last = each.id ?? last;
        told(each.event, JSON.parse(each.data));
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof Unauthorized) { told("locked", null); return; }
    }
    if (signal.aborted) return;
    up(false);
    await pause(signal);
  }
}
events.of = of;

/** Follow a text for ever; `told(lines)`. */
export async function lines(path, told, signal) {
  while (!signal.aborted) {
    try {
      const answer = await checked(await fetch(path, { headers: bearer(), signal }));
      let rest = "";
      for await (const text of texts(answer)) {
        const found = (rest + text).split("\n");
        rest = found.pop();
        if (found.length) told(found);
      }
    } catch (error) {
      if (signal.aborted || error instanceof Unauthorized) return;
    }
    await pause(signal);
  }
}
