// Sorting: the heads of sortable tables become buttons. Without this the tables are as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const isNumber = head.classList.contains("number");
      const valueOf = (row) => {
        const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
        return isNumber ? (text === "" ? NaN : Number(text)) : text;
      };
      const compare = (a, b) => {
        const [one, other] = [valueOf(a), valueOf(b)];
        if (!isNumber) return (up ? 1 : -1) * one.localeCompare(other, "en", { numeric: true });
        if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other);
        return (up ? 1 : -1) * (one - other);
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
