"use strict";
// Asks the server about an image and places what it answers. All figures, colours and words come
// from the server, where `regraft report` makes the same ones.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const STATES = [["before", "Baseline"], ["after", "Patched"]];
  const THUMB = 16; // pixels of the slider's thumb, whose middle never reaches the ends
  const $ = (id) => document.getElementById(id);
  const short = (v) => String(Number(v.toPrecision(4)));
  const percent = (v) => `${Number((100 * v).toPrecision(3))}%`;
  const at = (list, row, col, cols) => list[row * cols + col];

  let key = null; // of the server; null for none
  let models = [], maxBody = Infinity;
  let file = null; // that is looked at
  let found = null; // what the server said of it
  let cursor = null; // [row, col] of the patch whose numbers are read
  let asking = new AbortController();

  // The server.

  class WrongKey extends Error {}

  async function ask(path, options = {}) {
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers, cache: "no-store" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server does not answer. Is it still running?");
    }
    if (answer.status === 401) throw new WrongKey("This is not the server's key.");
    const told = await answer.json().catch(() => null);
    if (!answer.ok) throw new Error(told?.error ?? `The server answered ${answer.status}.`);
    return told;
  }

  async function start() {
    if (document.body.dataset.key === "true" && key === null) return askForKey();
    try {
      const told = await ask("page/models");
      $("key-form").hidden = true;
      $("intro").hidden = $("drop").hidden = false;
      ({ models, max_body: maxBody } = told);
      if (!models.length) {
        say("The server has loaded no model yet.");
        setTimeout(start, 2000);
        return;
      }
      say("");
      offer();
      if (file) look(file);
    } catch (error) {
      if (error instanceof WrongKey) return askForKey(error);
      complain("There is nothing to show.", error);
    }
  }

  function askForKey(error) {
    key = null;
    busy(false);
    $("key-form").hidden = false;
    $("intro").hidden = $("drop").hidden = true;
    if (error) complain("Not let in.", error);
    $("key").focus();
  }

  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const given = $("key").value.trim();
    $("key").value = "";
    if (!/^[\x21-\x7e]+$/.test(given)) {
      return complain("Not let in.", new Error("A key is printable ASCII without spaces."));
    }
    key = given;
    complain();
    start();
  });

  // The bundles.

  function offer() {
    const before = $("model").value;
    $("model").replaceChildren(...models.map((model, i) => {
      const several = models.filter((other) => other.name === model.name).length > 1;
      return new Option(several ? `${model.name}, version ${model.version}` : model.name, i);
    }));
    if (before && before < models.length) $("model").value = before;
    $("choice").hidden = models.length < 2;
    chosen();
  }

  function chosen() {
    const model = models[$("model").value];
    if (!model) return;
    $("source").textContent = `${model.source}, variant ${model.variant}`;
    $("obstacle").textContent = model.obstacle
      ? `There are no maps of ${model.name}: ${model.obstacle}.` : "";
    $("obstacle").hidden = !model.obstacle;
    $("drop").hidden = Boolean(model.obstacle);
  }

  $("model").addEventListener("change", () => {
    chosen();
    if (models[$("model").value].obstacle) {
      asking.abort();
      busy(false);
      say("");
      clear();
    } else if (file) look(file);
  });

  // The image.

  async function look(chosenFile) {
    file = chosenFile;
    complain();
    const model = models[$("model").value];
    if (!model) return; // it is looked at as soon as the models are known
    if (model.obstacle) return;
    asking.abort();
    asking = new AbortController();
    const { signal } = asking;
    if (file.size > maxBody) {
      const size = `${(file.size / 2 ** 20).toFixed(1)} MiB`;
      const most = `at most ${maxBody / 2 ** 20} MiB (--max-body)`;
      return complain(`${file.name} was not looked at.`, new Error(`It has ${size}; this server takes ${most}.`));
    }
    busy(true);
    say(`Computing the maps of ${file.name}`);
    const path = `page/models/${encodeURIComponent(model.name)}/versions/${model.version}`;
    const post = (what) => ask(`${path}/${what}`, { method: "POST", body: chosenFile, signal });
    try {
      const told = await post("maps");
      show(told, chosenFile.name);
      say("Measuring how long it takes");
      fill("latency", { value: "…", note: "being measured" });
      try {
        fill("latency", await post("latency"));
      } catch (error) {
        if (error.name === "AbortError" || error instanceof WrongKey) throw error;
        fill("latency", { value: "–", note: error.message });
      }
      say("");
    } catch (error) {
      if (error.name === "AbortError") return; // another one took its place
      busy(false);
      say("");
      if (error instanceof WrongKey) return askForKey(error);
      complain(`${chosenFile.name} was not looked at.`, error);
    }
  }

  function show(told, name) {
    const first = found === null || found.layers.length !== told.layers.length;
    found = told;
    cursor = null;
    busy(false);
    document.body.classList.add("shown");
    $("intro").hidden = true;
    for (const id of ["result", "depth", "made"]) $(id).hidden = false;
    $("picture").src = told.picture;
    $("picture").alt = `${name} as the model sees it`;
    outline(document.querySelector(".picture svg"), told.outlines.before);
    $("file").textContent = name;
    $("headline").textContent = told.headline;
    for (const id of ["outliers", "cosine"]) fill(id, told.figures[id]);
    $("attention-title").textContent = told.attention_of[0].toUpperCase() + told.attention_of.slice(1);
    $("aside").textContent = `Outlined patches are outlier tokens of the detection layer, in every layer the same places. ${told.aside}`;
    $("engine").textContent = told.engine;
    // Markup of the server's own making, in which all names are escaped.
    document.querySelector(".charts").innerHTML = told.charts.join("");
    $("table").innerHTML = told.table;
    $("layer").max = told.layers.length - 1;
    if (first) $("layer").value = told.detection_layer;
    for (const pane of panes) outline(pane.svg, told.outlines[pane.state]);
    showLayer();
  }

  function clear() {
    found = null;
    document.body.classList.remove("shown");
    for (const id of ["result", "depth", "made"]) $(id).hidden = true;
    $("intro").hidden = false;
  }

  function fill(id, { name, value, note }) {
    const [first, strong, small] = $(id).children;
    if (name !== undefined) first.textContent = name;
    strong.textContent = value;
    small.textContent = note;
  }

  // The maps.

  const panes = [...document.querySelectorAll(".group")].flatMap((group) =>
    STATES.map(([state, title]) => {
      const pane = { kind: group.dataset.kind, state, title };
      const figure = element("figure", { class: "pane" });
      pane.frame = element("div", { class: "frame", tabindex: 0, role: "application", "aria-roledescription": "map" });
      pane.image = element("img", { class: "map", alt: "" });
      pane.svg = document.createElementNS(SVG, "svg");
      pane.svg.setAttribute("preserveAspectRatio", "none");
      pane.svg.setAttribute("aria-hidden", "true");
      pane.note = element("span");
      const caption = element("figcaption");
      const bold = element("b");
      bold.textContent = title;
      caption.append(bold, element("br"), pane.note);
      pane.frame.append(pane.image, pane.svg);
      figure.append(pane.frame, caption);
      group.querySelector(".pair").append(figure);
      pane.frame.addEventListener("pointermove", point);
      pane.frame.addEventListener("pointerdown", point);
      pane.frame.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && read(null));
      pane.frame.addEventListener("keydown", step);
      pane.frame.addEventListener("blur", () => read(null));
      return pane;
    }));

  function element(name, attributes = {}) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function shape(name, attributes, text = "") {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  function outline(svg, path) {
    const [rows, cols] = found.grid;
    svg.setAttribute("viewBox", `0 0 ${cols} ${rows}`);
    svg.replaceChildren(
      ...["under", "over"].map((kind) => shape("path", { d: path, class: kind })),
      shape("rect", { class: "cursor", width: 1, height: 1, visibility: "hidden" }));
  }

  function showLayer() {
    const layer = found.layers[$("layer").value];
    $("layer-name").textContent = layer.name;
    $("layer").setAttribute("aria-valuetext", layer.name);
    fill("ratio", layer.ratio);
    fill("register", layer.register);
    for (const pane of panes) {
      const map = layer.maps[pane.state][pane.kind];
      pane.image.src = map.image;
      pane.note.textContent = map.note;
      pane.values = map.values.split(" ").map(Number);
      const what = pane.kind === "norm" ? "Norm of the patches" : $("attention-title").textContent;
      pane.frame.setAttribute("aria-label", `${what}, ${pane.title.toLowerCase()}, ${layer.name.toLowerCase()}: ${map.note}. Arrow keys read single patches.`);
    }
    for (const group of document.querySelectorAll(".group")) {
      group.querySelector(".bar").innerHTML = layer.bars[group.dataset.kind];
    }
    drawMarks();
    read(cursor);
  }

  function drawMarks() {
    const width = $("marks").clientWidth, count = found.layers.length, now = Number($("layer").value);
    const every = [1, 2, 4, 5, 10, 20].find((n) => (width * n) / count >= 24) ?? count;
    const place = (i) => THUMB / 2 + (count > 1 ? i / (count - 1) : 0.5) * (width - THUMB);
    $("marks").replaceChildren(...found.layers.flatMap((layer, i) => [
      layer.touched
        ? shape("path", { class: "touched", d: `M${place(i)},0l4,7h-8z` })
        : shape("line", { x1: place(i), x2: place(i), y1: 1, y2: 6 }),
      ...(i === now || (i % every === 0 && Math.abs(i - now) >= every / 2 && i !== now)
        ? [shape("text", { x: place(i), y: 21, class: i === now ? "current" : "" }, i)] : []),
    ]));
  }

  $("layer").addEventListener("input", showLayer);
  new ResizeObserver(() => found && drawMarks()).observe($("marks"));

  function point(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const [rows, cols] = found.grid;
    const within = (share, size) => Math.min(size - 1, Math.max(0, Math.floor(share * size)));
    read([within((event.clientY - box.top) / box.height, rows), within((event.clientX - box.left) / box.width, cols)]);
  }

  function step(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") return read(null);
    const move = moves[event.key];
    if (!move || !found) return;
    event.preventDefault();
    const to = (i) => cursor === null ? 0 : Math.min(found.grid[i] - 1, Math.max(0, cursor[i] + move[i]));
    read([to(0), to(1)]);
  }

  function read(patch) {
    cursor = patch;
    for (const rect of document.querySelectorAll("#result .cursor")) {
      rect.setAttribute("visibility", patch ? "visible" : "hidden");
      if (patch) {
        rect.setAttribute("x", patch[1]);
        rect.setAttribute("y", patch[0]);
      }
    }
    if (!patch) return ($("readout").textContent = "Point at a patch, or walk over a map with the arrow keys, to read its numbers.");
    const [row, col] = patch;
    const values = panes.map((pane) => at(pane.values, row, col, found.grid[1]));
    $("readout").textContent =
      `Row ${row}, column ${col}: norm ${short(values[0])} → ${short(values[1])}; ` +
      `attention ${percent(values[2])} → ${percent(values[3])}`;
  }

  // What is said, and where images come from.

  const say = (text) => ($("status").textContent = text);
  const busy = (is) => document.body.classList.toggle("busy", is);

  function complain(title, error) {
    $("alert").replaceChildren();
    if (!error) return;
    const bold = element("b");
    bold.textContent = title;
    $("alert").append(bold, error.message);
  }

  $("choose").addEventListener("change", () => {
    if ($("choose").files.length) look($("choose").files[0]);
    $("choose").value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) look(event.clipboardData.files[0]);
  });
  const carriesFiles = (event) => event.dataTransfer.types.includes("Files");
  let depth = 0; // dragging over a child leaves its parent
  const dragging = (by) => {
    depth = by === null ? 0 : depth + by;
    document.body.classList.toggle("dragging", depth > 0);
  };
  document.addEventListener("dragenter", (event) => carriesFiles(event) && dragging(1));
  document.addEventListener("dragleave", (event) => carriesFiles(event) && dragging(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    dragging(null);
    if (event.dataTransfer.files.length) return look(event.dataTransfer.files[0]);
    complain("Nothing was dropped.", new Error("Drop a file, not a link or a text."));
  });

  start();
})();
