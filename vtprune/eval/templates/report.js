"use strict";
// Draws the charts when they come into view, and makes tabs, tables and sliders work.

const dark = matchMedia("(prefers-color-scheme: dark)");
// Named one by one: what plotly shows by itself includes a button that uploads the chart.
const buttons = ["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"];

function colors() {
  const style = getComputedStyle(document.documentElement);
  const [text, quiet, line, ground] = ["--text", "--quiet", "--line", "--ground"].map(
    (name) => style.getPropertyValue(name).trim(),
  );
  return {
    "font.color": text, "xaxis.gridcolor": line, "yaxis.gridcolor": line,
    "xaxis.zerolinecolor": line, "yaxis.zerolinecolor": line,
    "modebar.bgcolor": "rgba(0, 0, 0, 0)", "modebar.color": quiet, "modebar.activecolor": text,
    "hoverlabel.bgcolor": ground, "hoverlabel.font.color": text, "hoverlabel.bordercolor": text,
  };
}

function draw(place) {
  const found = document.querySelector(`script[data-for="${CSS.escape(place.id)}"]`);
  const { data, layout } = JSON.parse(found.textContent);
  if (place.clientWidth < 700) {
    layout.legend = { ...layout.legend, orientation: "h", y: -0.25, font: { size: 10 } };
    layout.xaxis.title.font = { size: 11 };
    layout.height += 16 * data.length;
  }
  Plotly.newPlot(place, data, layout, { responsive: true, displaylogo: false, modeBarButtons: [buttons] });
  Plotly.relayout(place, colors());
}

for (const place of document.querySelectorAll(".chart:not([hidden])")) draw(place);

dark.addEventListener("change", () => {
  for (const place of document.querySelectorAll(".js-plotly-plot")) Plotly.relayout(place, colors());
});

for (const tabs of document.querySelectorAll("[data-tabs]")) {
  tabs.addEventListener("change", (event) => {
    for (const tab of tabs.querySelectorAll("input")) {
      document.getElementById(tab.value).hidden = tab !== event.target;
    }
    const shown = document.getElementById(event.target.value);
    if (shown.classList.contains("js-plotly-plot")) Plotly.Plots.resize(shown);
    else draw(shown);
  });
}

for (const slider of document.querySelectorAll("input[type=range]")) {
  const gallery = slider.closest(".gallery"), names = JSON.parse(slider.dataset.names);
  const show = () => {
    gallery.querySelector("output").textContent = names[slider.value];
    slider.setAttribute("aria-valuetext", names[slider.value]);
    for (const step of gallery.querySelectorAll("[data-step]")) step.hidden = step.dataset.step !== slider.value;
  };
  slider.addEventListener("input", show);
  show(); // a browser may remember where the slider was
}

function sort(table, head) {
  const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
  const text = (row) => row.cells[column].textContent.trim().replace(/^</, "");
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [text(a), text(b)], difference = parseFloat(x) - parseFloat(y);
    return (Number.isNaN(difference) ? x.localeCompare(y) : difference) * (down ? -1 : 1);
  });
  table.tBodies[0].append(...rows);
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
}

for (const button of document.querySelectorAll(".sortable thead button")) {
  button.addEventListener("click", () => sort(button.closest("table"), button.closest("th")));
}
