// Sorting, filtering, the switches of the drawings, and where a number comes from. Without this file
// every table and drawing is still there, and a number's link leads to its runs on the same page.
"use strict";

document.documentElement.classList.add("js");

// --- sorting ---------------------------------------------------------------------------------

function sortKey(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? cell.textContent.trim().toLowerCase();
  const number = Number(text);
  return text === "" ? null : Number.isNaN(number) ? text : number;
}

function compareKeys(a, b, sign) {
  if (a === null || b === null) return (a === null) - (b === null); // nothing stands last
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  if (typeof a === "number") return a === b ? 0 : sign * (a < b ? -1 : 1);
  return sign * a.localeCompare(b, "en", { numeric: true });
}

function sortTable(table, column, direction) {
  const sign = direction === "descending" ? -1 : 1;
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => [row, sortKey(row, column)]);
  rows.sort((a, b) => compareKeys(a[1], b[1], sign)); // stable, so ties keep their order
  body.append(...rows.map(([row]) => row));
  for (const [place, header] of [...table.tHead.rows[0].cells].entries()) {
    if (place === column) header.setAttribute("aria-sort", direction);
    else header.removeAttribute("aria-sort");
  }
}

for (const table of document.querySelectorAll("table.sortable")) {
  for (const [column, header] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const again = header.getAttribute("aria-sort") === "ascending";
      sortTable(table, column, again ? "descending" : "ascending");
    });
  }
}

// --- filtering -------------------------------------------------------------------------------

function startFilter(form) {
  const table = document.getElementById(form.dataset.for);
  const rows = [...table.tBodies[0].rows];
  const names = [...new Set([...form.querySelectorAll("input[type=checkbox]")].map((box) => box.name))];
  const texts = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));

  function apply() {
    const allowed = names.map((name) => [
      name,
      new Set([...form.querySelectorAll(`input[name="${name}"]:checked`)].map((box) => box.value)),
    ]);
    const words = form.elements.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      // A claim that was never run has no scale: the filter of scales does not speak of it.
      const kept = allowed.every(([name, values]) => !row.dataset[name] || values.has(row.dataset[name]));
      row.hidden = !(kept && words.every((word) => texts.get(row).includes(word)));
      shown += row.hidden ? 0 : 1;
    }
    form.querySelector(".count").textContent = `${shown} of ${rows.length} shown`;
  }

  const sorter = form.elements.sort;
  sorter.append(new Option("the given order", ""));
  for (const [column, header] of [...table.tHead.rows[0].cells].entries()) {
    for (const direction of ["ascending", "descending"]) {
      const arrow = direction === "ascending" ? "\u2191" : "\u2193";
      sorter.append(new Option(`${header.textContent} ${arrow}`, `${column} ${direction}`));
    }
  }
  sorter.addEventListener("change", () => {
    if (sorter.value === "") table.tBodies[0].append(...rows);
    else sortTable(table, Number(sorter.value.split(" ")[0]), sorter.value.split(" ")[1]);
  });
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}

for (const form of document.querySelectorAll("form.filters")) startFilter(form);

// --- drawings --------------------------------------------------------------------------------

function startFigure(figure) {
  const training = figure.querySelector(".training");
  const lines = [...figure.querySelectorAll(".legend input")];

  function apply() {
    const axis = figure.querySelector(".axis input:checked").value;
    training.className = `panels training axis-${axis}`;
    figure.classList.toggle("show-seeds", figure.querySelector('input[value="seeds"]').checked);
    figure.classList.toggle("hide-bands", !figure.querySelector('input[value="bands"]').checked);
    for (const box of lines) {
      for (const group of figure.querySelectorAll(`svg .${box.value}`)) {
        group.style.display = box.checked ? "" : "none";
      }
    }
  }

  for (const choice of figure.querySelectorAll(".subsets input")) {
    choice.addEventListener("input", () => {
      const members = new Set(choice.value.split(" "));
      for (const box of lines) box.checked = members.has(box.value);
    });
  }
  figure.addEventListener("input", apply);
  apply();
}

for (const figure of document.querySelectorAll(".figure")) startFigure(figure);

// --- where a number comes from -----------------------------------------------------------------

const dialog = document.getElementById("source-dialog");
document.addEventListener("click", (event) => {
  const link = event.target.closest("a.n");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const blocks = link.dataset.src.split(" ").map((id) => {
    const block = document.getElementById(id).cloneNode(true);
    block.removeAttribute("id");
    return block;
  });
  const heading = document.createElement("h2");
  heading.textContent = `${link.textContent.trim()} comes from`;
  dialog.querySelector(".body").replaceChildren(heading, ...blocks);
  dialog.showModal();
});
