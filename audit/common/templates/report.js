"use strict";
(() => {
  const hint = "Strike a word to see the magnitude without it.";
  for (const card of document.querySelectorAll(".card")) {
    const said = card.querySelector(".struck");
    if (!said) continue;
    said.hidden = false;
    said.textContent = hint;
    const images = [...card.querySelectorAll("figure[data-word]")];
    const buttons = [...card.querySelectorAll(".heatmap [data-says]")].map((word) => {
      const button = document.createElement("button");
      button.type = "button";
      button.className = word.className;
      button.title = word.title;
      Object.assign(button.dataset, word.dataset);
      button.append(...word.childNodes);
      word.replaceWith(button);
      return button;
    });
    const strike = (struck) => {
      for (const each of buttons) each.setAttribute("aria-pressed", String(each === struck));
      for (const image of images)
        image.classList.toggle("chosen", image.dataset.word === struck?.dataset.word);
      said.textContent = struck?.dataset.says ?? hint;
    };
    for (const button of buttons)
      button.addEventListener("click", () =>
        strike(button.getAttribute("aria-pressed") === "true" ? null : button));
    strike(null);
  }
})();
(() => {
  const table = document.getElementById("prompts");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const tools = document.getElementById("tools");
  const filter = document.getElementById("filter");
  const only = document.getElementById("only");
  const count = document.getElementById("count");
  const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  tools.hidden = false;

  const show = () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = text.get(row).includes(wanted) && !(only.checked && !row.dataset.flagged);
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} shown`;
  };
  filter.addEventListener("input", show);
  only.addEventListener("change", show);
  show();

  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const first = head.dataset.first ?? "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((a, b) => sign * compare(value(a, column), value(b, column)));
      body.append(...rows);
    });
  });
})();
