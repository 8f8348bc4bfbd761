// Tables: a click on a heading sorts by it, a second one the other way; missing values stay last.
// A setting's name opens what is known of it.
const valueOf = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace("\u2212", "-"));
  return text === "\u2013" ? null : Number.isNaN(number) ? text : number;
};
const compare = (a, b) =>
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => heading.addEventListener("click", () => {
    const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [valueOf(a, column), valueOf(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return sign * compare(x, y);
    });
    table.tBodies[0].append(...rows);
  }));
}

for (const cell of document.querySelectorAll("table.sortable td:first-child")) {
  const known = settings.filter((setting) => setting.label === cell.textContent);
  if (!known.length) continue;
  const button = element("button", { type: "button", textContent: cell.textContent });
  button.addEventListener("click", () => openCell(known.flatMap((setting) => tell(setting))));
  cell.replaceChildren(button);
}
