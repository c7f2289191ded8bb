import { html, useEffect, useRef } from "./vendor/htm-preact.js";
import uPlot from "./vendor/uplot.js";
import { number } from "./format.js";

const SHOWN_SECONDS = 60;
const HEIGHT = 150;

/** Lines over time. `series`: { label, stroke, value(numbers) }; what stands beside the title is the last of `headline`. */
export function Chart({ title, unit, history, series, headline }) {
  const place = useRef();
  const plot = useRef();
  const data = [history.map((each) => each.at), ...series.map((one) => history.map(one.value))];
  const labels = series.map((one) => one.label).join("\n");
  useEffect(() => {
    const grid = { stroke: "rgba(128,128,128,.15)", width: 1 };
    const axis = { stroke: "#8a94a6", grid, ticks: grid, font: "11px system-ui" };
    plot.current = new uPlot({
      width: place.current.clientWidth, height: HEIGHT, padding: [8, 28, 0, 0],
      cursor: { y: false }, legend: { show: false },
      scales: {
        x: { range: (_, low, high) => (high ? [Math.min(low, high - SHOWN_SECONDS), high] : [Date.now() / 1000 - SHOWN_SECONDS, Date.now() / 1000]) },
        y: { range: (_, low, high) => [0, Math.max(1, (high || 0) * 1.15)] },
      },
      axes: [{ ...axis, values: (_, times) => times.map((at) => new Date(at * 1000).toLocaleTimeString([], { hour12: false })), space: 70 }, { ...axis, size: 44 }],
      series: [{}, ...series.map((one) => ({ label: one.label, stroke: one.stroke, fill: one.stroke + "1f", width: 2, points: { show: false }, spanGaps: true }))],
    }, data, place.current);
    const seen = new ResizeObserver(() => plot.current.setSize({ width: place.current.clientWidth, height: HEIGHT }));
    seen.observe(place.current);
    return () => { seen.disconnect(); plot.current.destroy(); };
  }, [labels]);
  useEffect(() => { plot.current.setData(data); }, [history]);
  const last = history[history.length - 1];
  const told = last ? headline.map((value) => number(value(last))).join(" / ") : "";
  return html`<article><h2>${title} <output>${told} <small>${unit}</small></output></h2>
    <div ref=${place}></div>
    <div class="legend">${series.map((one) => html`<span><i style=${{ background: one.stroke }}></i>${one.label}</span>`)}</div></article>`;
}
