// Draws the figures that the server wrote as JSON, keeps them fresh while a run trains, and listens for keys. No framework.
"use strict";

const page = document.body.dataset.page;
const live = document.body.dataset.live === "yes";
const EVERY = 2000; // milliseconds between two looks at a run that is training

// -- theme ----------------------------------------------------------------------------------------------------------

const root = document.documentElement;

function storage(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    localStorage.setItem(key, value);
  } catch { /* a file opened from disk may have no storage */ }
  return null;
}

function dark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function switchTheme() {
  root.dataset.theme = dark() ? "light" : "dark";
  storage("sppo-theme", root.dataset.theme);
  draw();
}

const remembered = storage("sppo-theme");
if (remembered) root.dataset.theme = remembered;

// -- figures --------------------------------------------------------------------------------------------------------

const written = document.getElementById("figures");
let figures = written ? JSON.parse(written.textContent) : [];

function layoutOf(figure, width) {
  const ink = dark() ? "#d8d8d8" : "#333333", grid = dark() ? "#3a3a3a" : "#e6e6e6";
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true, exponentformat: "e", fixedrange: width < 500 };
  return {
    ...figure.layout,
    xaxis: { ...axis, ...figure.layout.xaxis },
    yaxis: { ...axis, rangemode: "tozero", ...figure.layout.yaxis },
    font: { color: ink, size: 12, family: "system-ui, sans-serif" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 55, r: 12, t: 8, b: 40 }, height: width < 500 ? 240 : 280,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom" }, hovermode: "closest", uirevision: figure.id,
  };
}

function drawOne(figure) {
  const plot = document.querySelector(`[data-figure="${figure.id}"]`);
  if (!plot || !figure.traces.length) return;
  if (plot.classList.contains("empty")) { plot.classList.remove("empty"); plot.textContent = ""; }
  Plotly.react(plot, structuredClone(figure.traces), layoutOf(figure, plot.clientWidth), { displaylogo: false, responsive: true, displayModeBar: false });
  plot.dataset.drawn = "yes";
}

// What is on the screen first; the rest when it comes into view.
const seen = "IntersectionObserver" in window ? new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    entry.target.dataset.visible = "yes";
    const figure = figures.find((f) => f.id === entry.target.dataset.figure);
    if (figure && typeof Plotly !== "undefined") drawOne(figure);
  }
}, { rootMargin: "300px" }) : null;

function draw() {
  if (typeof Plotly === "undefined") return;
  for (const figure of figures) {
    const plot = document.querySelector(`[data-figure="${figure.id}"]`);
    if (!seen || (plot && plot.dataset.visible)) drawOne(figure);
  }
}

// The words first: the drawing library is five megabytes, and comes when they are on the screen.
if (live && figures.length && typeof Plotly === "undefined") {
  addEventListener("load", () => {
    const script = document.createElement("script");
    script.src = "/static/plotly.js";
    script.addEventListener("load", draw);
    document.body.append(script);
  });
}
if (seen) document.querySelectorAll("[data-figure]").forEach((plot) => seen.observe(plot));
else draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
addEventListener("beforeprint", () => { if (typeof Plotly !== "undefined") figures.forEach(drawOne); });

// -- a run that is training -----------------------------------------------------------------------------------------

async function look() {
  if (document.visibilityState === "visible") {
    try {
      const answer = await fetch(`/data/${page}${location.search}`);
      if (answer.ok) {
        const fresh = await answer.json();
        figures = fresh.figures;
        const summary = document.getElementById("summary");
        if (summary && summary.innerHTML !== fresh.summary) summary.innerHTML = fresh.summary; // escaped where it was made
        const alerts = document.getElementById("alerts");
        if (alerts && alerts.innerHTML !== fresh.alerts) alerts.innerHTML = fresh.alerts;
        draw();
        document.body.dataset.stale = "no";
      }
    } catch { document.body.dataset.stale = "yes"; }
  }
  setTimeout(look, EVERY);
}
if (live && ["overview", "critic", "health"].includes(page)) setTimeout(look, EVERY);

// -- rollouts -------------------------------------------------------------------------------------------------------

document.addEventListener("change", (event) => {
  const at = event.target;
  if (at.name && at.name.startsWith("shade-")) {
    const tokens = at.closest(".shade").nextElementSibling;
    tokens.className = `tokens by-${at.value}`;
  }
  if (at.dataset && "submit" in at.dataset) at.form.submit();
});

function move(by) {
  const link = document.getElementById(by > 0 ? "after" : "before");
  if (link) { link.click(); return; }
  const rows = [...document.querySelectorAll("tr[data-row]")];
  if (!rows.length) return;
  const at = rows.findIndex((row) => row.classList.contains("marked"));
  const next = rows[Math.min(Math.max(at + by, 0), rows.length - 1)];
  rows.forEach((row) => row.classList.remove("marked"));
  next.classList.add("marked");
  next.querySelector("a").focus();
  next.scrollIntoView({ block: "nearest" });
}

document.querySelectorAll("tr[data-row]").forEach((row) => row.addEventListener("click", (event) => {
  if (!event.target.closest("a") && !String(getSelection())) row.querySelector("a").click();
}));

// In the single file the menu leads to parts of one page; a link to a rollout opens it.
function arrive() {
  const here = location.hash.slice(1);
  if (live || !here) return;
  const target = document.getElementById(here);
  if (target && target.tagName === "DETAILS") target.open = true;
  document.querySelectorAll("nav a").forEach((a) => a.hash === location.hash ? a.setAttribute("aria-current", "page") : a.removeAttribute("aria-current"));
}
addEventListener("hashchange", arrive);
arrive();
const filters = document.querySelector("details.filters");
if (filters && innerWidth <= 600 && !location.search.replace(/run=\d+/, "").slice(1)) filters.open = false;

// -- keys -----------------------------------------------------------------------------------------------------------

const keys = document.getElementById("keys");
document.getElementById("theme").addEventListener("click", switchTheme);
document.getElementById("help").addEventListener("click", () => keys.showModal());
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("select, textarea, input:not([type=radio]):not([type=checkbox])");
  if (event.ctrlKey || event.metaKey || event.altKey || typing) return;
  const link = document.querySelector(`nav a[data-key="${CSS.escape(event.key)}"]`);
  if (link) link.click();
  else if (event.key === "j" || event.key === "k") move(event.key === "j" ? 1 : -1);
  else if (event.key === "t") switchTheme();
  else if (event.key === "?") keys.showModal();
  else if (event.key === "/") { const find = document.getElementById("find"); if (find) { event.preventDefault(); find.focus(); } }
});
