"use strict";
// Starts a page: draws its charts, and lets tables be picked from and sorted.

window.addEventListener("error", (event) => {
  const notice = document.getElementById("trouble");
  notice.textContent = `This page could not draw everything: ${event.message}`;
  notice.hidden = false;
});

// Of the groups of a table one is shown, the one that is picked.
function letPick(picker) {
  const select = picker.querySelector("select");
  const groups = [...picker.parentElement.querySelectorAll(".group")];
  const show = (index) => {
    select.selectedIndex = index;
    groups.forEach((group, i) => group.classList.toggle("left-out", i !== index));
    before.disabled = index === 0;
    after.disabled = index === groups.length - 1;
  };
  const [before, after] = picker.querySelectorAll("button");
  before.onclick = () => show(select.selectedIndex - 1);
  after.onclick = () => show(select.selectedIndex + 1);
  select.onchange = () => show(select.selectedIndex);
  picker.hidden = false;
  show(Number(picker.dataset.first));
}

// A click on the head of a column sorts its rows; another one turns them around. Cells without a
// number come last.
function letSort(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.onclick = () => {
      const wasUp = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", wasUp ? "descending" : "ascending");
      const sign = wasUp ? -1 : 1;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compareCells(a.cells[column].dataset.value, b.cells[column].dataset.value, sign));
      table.tBodies[0].append(...rows);
    };
  });
}

function compareCells(a, b, sign) {
  if (a === b) return 0;
  if (a === "" || b === "") return a === "" ? 1 : -1;
  const difference = Number(a) - Number(b);
  return sign * (Number.isNaN(difference) ? a.localeCompare(b, "en", { numeric: true }) : difference);
}

drawCharts(JSON.parse(document.getElementById("charts").textContent));
document.querySelectorAll(".picker").forEach(letPick);
document.querySelectorAll("table.sortable").forEach(letSort);
for (const button of document.querySelectorAll("table [data-series]")) button.onclick = () => toggle(button.dataset.series);
for (const details of document.querySelectorAll("details"))
  details.addEventListener("toggle", () => shared.charts.forEach((chart) => details.contains(chart.figure) && chart.draw()));
