// What the page knows of the router: two streams of events, and what is asked for again and again.
import { useEffect, useRef, useState } from "./vendor/htm-preact.js";
import { Unauthorized, ask, events } from "./net.js";

const KEPT_SECONDS = 600;

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

export function useFleet(locked, onLocked) {
  const [fleet, setFleet] = useState(null);
  const up = useStream("/v1/models/status/stream", (name, data) => {
    if (name === "locked") onLocked();
    if (name === "full_status") setFleet(data);
    if (name === "model_update") setFleet((old) => old && { ...old, models: { ...old.models, [data.alias]: data } });
    if (name === "server_update") setFleet((old) => old && { ...old, server: data });
  }, locked);
  return [fleet, up];
}

export function useNumbers(locked) {
  const [history, setHistory] = useState([]);
  useStream("/metrics/stream", (name, data) => {
    if (name !== "metrics") return;
    const at = Date.parse(data.timestamp) / 1000;
    setHistory((old) => [...old.filter((each) => each.at > at - KEPT_SECONDS && each.at < at), { at, ...data }]);
  }, locked);
  return history;
}

/** What is at `path`, asked for every `seconds` while the page is looked at, and at once when `stamp` changes or `again` is called. */
export function usePolled(path, seconds, stamp = "") {
  const [found, setFound] = useState(null);
  const look = useRef(() => {});
  useEffect(() => {
    let over = false;
    look.current = () => !document.hidden && ask(path).then(
      (answer) => over || setFound(answer),
      (error) => over || error instanceof Unauthorized || setFound((old) => old),
    );
    look.current();
    const timer = setInterval(() => look.current(), seconds * 1000);
    return () => { over = true; clearInterval(timer); };
  }, [path, seconds, stamp]);
  return [found, () => look.current()];
}
