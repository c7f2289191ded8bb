// Numbers and times as people read them.
const COLOURS = ["#0f9d78", "#3b82f6", "#c07f00", "#a855f7", "#e0567a", "#14b8a6", "#64748b"];

export const DASH = "–";
export const colour = (names, name) => COLOURS[Math.max(0, names.indexOf(name)) % COLOURS.length];
const none = (value) => value === null || value === undefined;

export const gib = (mb) => (none(mb) ? DASH : mb >= 1024 ? `${(mb / 1024).toFixed(1)} GiB` : `${mb} MiB`);
export const ms = (value) => (none(value) ? DASH : value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value)} ms`);
export const number = (value) => (none(value) ? DASH : (Math.round(value * 10) / 10).toLocaleString());

export function span(milliseconds) {
  const seconds = Math.max(0, milliseconds / 1000);
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return seconds < 86400 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

export const ago = (when) => (when ? `${span(Date.now() - Date.parse(when))} ago` : DASH);
export const clock = (when) => (when ? new Date(when).toLocaleTimeString() : DASH);
