"use strict";

// A click on a heading sorts its table by that column, a second click the other way; what does not exist stays last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((one, other) => compared(one.cells[column].dataset.value, other.cells[column].dataset.value, sign));
      table.tBodies[0].append(...rows);
    });
  });
}

function compared(one, other, sign) {
  if (one === undefined || other === undefined) {
    return (one === undefined) - (other === undefined);
  }
  const numbers = [Number(one), Number(other)];
  const difference = numbers.some(Number.isNaN) ? one.localeCompare(other, "en", { numeric: true }) : numbers[0] - numbers[1];
  return sign * difference;
}
