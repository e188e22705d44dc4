"use strict";
// Reads the maps out: the patch under the pointer is outlined in all five pictures of its image,
// and its four numbers stand below them. Without this script the page lacks nothing else.
(() => {
  for (const hint of document.querySelectorAll("[hidden].hint")) hint.hidden = false;
  const SVG = "http://www.w3.org/2000/svg";
  const short = (v) => String(Number(v.toPrecision(4)));
  const percent = (v) => `${Number((100 * v).toPrecision(3))}%`;

  for (const sample of document.querySelectorAll(".sample")) {
    const maps = [...sample.querySelectorAll(".map")];
    const readout = sample.querySelector(".readout");
    const [, , cols, rows] = sample.querySelector(".frame svg").getAttribute("viewBox").split(" ").map(Number);
    const values = maps.map((map) => map.dataset.values.split(" ").map(Number));
    const cursors = [...sample.querySelectorAll(".frame svg")].map((svg) => {
      const cursor = document.createElementNS(SVG, "rect");
      cursor.setAttribute("class", "cursor");
      cursor.setAttribute("width", 1);
      cursor.setAttribute("height", 1);
      cursor.setAttribute("visibility", "hidden");
      svg.append(cursor);
      return cursor;
    });
    const label = maps[2].dataset.kind;

    const show = (event) => {
      const box = event.currentTarget.getBoundingClientRect();
      const within = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
      const col = within((event.clientX - box.left) / box.width, cols);
      const row = within((event.clientY - box.top) / box.height, rows);
      for (const cursor of cursors) {
        cursor.setAttribute("x", col);
        cursor.setAttribute("y", row);
        cursor.setAttribute("visibility", "visible");
      }
      const at = values.map((numbers) => numbers[row * cols + col]);
      readout.textContent =
        `Row ${row}, column ${col}: norm ${short(at[0])} → ${short(at[1])}; ` +
        `${label} ${percent(at[2])} → ${percent(at[3])}`;
    };
    const hide = () => {
      for (const cursor of cursors) cursor.setAttribute("visibility", "hidden");
      readout.textContent = "";
    };
    for (const frame of sample.querySelectorAll(".frame")) {
      frame.addEventListener("pointermove", show);
      frame.addEventListener("pointerdown", show);
      frame.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    }
  }
})();
