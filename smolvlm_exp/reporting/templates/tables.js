"use strict"; // Sorts and copies tables, copies commands. The only script of a page, which allows it alone, by its hash.
const text = (cell) => (cell.querySelector("svg") ? "" : cell.innerText.replace(/\s+/g, " ").trim());
const plain = (value) => value.replace(/[,\u00a0]/g, "").replace(/\u2212/g, "-");
const amount = (value) => parseFloat(/^[^\w-]*(-?\d[\d.]*(e-?\d+)?)/.exec(plain(value))?.[1]);

function button(label, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.append(...label);
  made.onclick = action;
  return made;
}

function compare(a, b) {
  if (/^\W?$/.test(a) || /^\W?$/.test(b)) return /^\W?$/.test(a) - /^\W?$/.test(b);
  const [x, y] = [amount(a), amount(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
}

function sort(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const down = heads[column].ariaSort === "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].ariaSort = down ? "descending" : "ascending";
  const key = (row) => text(row.cells[column] ?? row.cells[0]);
  const missing = (row) => /^\W?$/.test(key(row));
  const order = (a, b) => (down && !missing(a) && !missing(b) ? -1 : 1) * compare(key(a), key(b));
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
}

function copy(element, content) {
  const made = button(["Copy"], async () => {
    try {
      await navigator.clipboard.writeText(content());
      made.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(element);
      made.textContent = "Selected: press Ctrl+C";
    }
    setTimeout(() => (made.textContent = "Copy"), 2000);
  });
  made.className = "copy";
  element.before(made);
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (head.textContent.trim()) head.append(button(head.childNodes, () => sort(table, column)));
  });
  copy(table, () => [...table.rows].map((row) => [...row.cells].map(text).join("\t")).join("\n"));
}
for (const command of document.querySelectorAll(".command")) copy(command, () => command.textContent);
