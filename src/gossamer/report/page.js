(() => {
  "use strict";
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // theme: the system's until the reader chooses
  const remembered = () => { try { return localStorage.getItem("gossamer-theme"); } catch { return null; } };
  const dark = () => root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (remembered()) root.dataset.theme = remembered();
  document.querySelector(".theme").addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("gossamer-theme", root.dataset.theme); } catch { /* a page opened from disk may have no storage */ }
  });

  // batch tabs of the accuracy-against-latency picture
  for (const box of all("[data-tabs]")) {
    const buttons = all("[data-tab]", box);
    buttons.forEach((button) => button.addEventListener("click", () => {
      buttons.forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      all("[data-panel]", box).forEach((panel) => { panel.hidden = panel.dataset.panel !== button.dataset.tab; });
    }));
  }

  // sortable tables: first choice descending for numbers, ascending for words; empty cells last
  for (const table of all("table[data-sortable]")) {
    const heads = all("thead th", table);
    const value = (row, k) => { const cell = row.cells[k]; return cell.dataset.v ?? cell.textContent.trim(); };
    heads.forEach((head, k) => head.querySelector("button")?.addEventListener("click", () => {
      const rows = all("tbody tr", table);
      const words = rows.some((r) => value(r, k) !== "–" && value(r, k) !== "" && Number.isNaN(Number(value(r, k))));
      const now = head.getAttribute("aria-sort");
      const up = now === "none" ? words : now === "descending";
      const blank = (v) => v === "" || v === "–";
      rows.sort((a, b) => {
        const [x, y] = [value(a, k), value(b, k)];
        if (blank(x) || blank(y)) return Number(blank(x)) - Number(blank(y));
        return (up ? 1 : -1) * (words ? x.localeCompare(y) : Number(x) - Number(y));
      });
      heads.forEach((h) => h.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    }));
  }

  // tooltips, and points that lead to their row
  const tip = document.getElementById("tip");
  const show = (target, x, y) => {
    tip.textContent = target.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18}px`;
  };
  const hide = () => { tip.hidden = true; };
  const choose = (target) => {
    const row = document.getElementById(target.dataset.row);
    all("tr.chosen").forEach((r) => r.classList.remove("chosen"));
    row.classList.add("chosen");
    row.scrollIntoView({ block: "center", inline: "nearest" });
  };
  for (const target of all("[data-tip]")) {
    target.addEventListener("pointermove", (event) => show(target, event.clientX, event.clientY));
    target.addEventListener("pointerleave", hide);
    target.addEventListener("focus", () => { const b = target.getBoundingClientRect(); show(target, b.left + b.width / 2, b.top + b.height / 2); });
    target.addEventListener("blur", hide);
    if (target.dataset.row) {
      target.addEventListener("click", () => choose(target));
      target.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(target); } });
    }
  }
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  // copy buttons
  for (const button of all("[data-copy]")) {
    button.addEventListener("click", async () => {
      const pre = button.parentElement.querySelector("pre");
      try { await navigator.clipboard.writeText(pre.textContent); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(pre); button.textContent = "Selected"; }
      setTimeout(() => { button.textContent = "Copy"; }, 1600);
    });
  }

  // photographs: pruned patches darkened and hatched, merged groups in their mean colour with an outline
  const SIDE = 448;
  const square = (image) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = SIDE;
    const side = Math.min(image.naturalWidth, image.naturalHeight);
    const pen = canvas.getContext("2d", { willReadFrequently: true });
    pen.drawImage(image, (image.naturalWidth - side) / 2, (image.naturalHeight - side) / 2, side, side, 0, 0, SIDE, SIDE);
    return canvas;
  };
  const means = (source, grid, rows) => {
    const small = document.createElement("canvas");
    [small.width, small.height] = [grid.cols, rows];
    const pen = small.getContext("2d", { willReadFrequently: true });
    pen.imageSmoothingQuality = "high";
    pen.drawImage(source, 0, 0, grid.cols, rows);
    const pixels = pen.getImageData(0, 0, grid.cols, rows).data;
    const groups = new Map();
    grid.ids.forEach((id, i) => {
      if (id < 0) return;
      const g = groups.get(id) ?? { n: 0, sum: [0, 0, 0] };
      g.n += 1;
      g.sum = g.sum.map((s, c) => s + pixels[4 * i + c]);
      groups.set(id, g);
    });
    return groups;
  };
  const hatch = (pen, x, y, w, h) => {
    pen.save();
    pen.beginPath(); pen.rect(x, y, w, h); pen.clip();
    pen.fillStyle = "rgba(12,14,16,.74)"; pen.fillRect(x, y, w, h);
    pen.strokeStyle = "rgba(255,255,255,.2)"; pen.lineWidth = 1.5;
    pen.beginPath();
    for (let d = Math.floor((x - y - h) / 11) * 11; d < x + w - y; d += 11) { pen.moveTo(y + d, y); pen.lineTo(y + h + d, y + h); }
    pen.stroke(); pen.restore();
  };
  const outline = (pen, grid, rows, w, h, groups) => {
    const at = (r, c) => (r < 0 || c < 0 || r >= rows || c >= grid.cols ? null : grid.ids[r * grid.cols + c]);
    const path = new Path2D();
    for (let r = 0; r < rows; r++) for (let c = 0; c < grid.cols; c++) {
      const id = at(r, c);
      if (id < 0 || groups.get(id).n < 2) continue;
      const [x, y] = [c * w, r * h];
      if (at(r - 1, c) !== id) { path.moveTo(x, y); path.lineTo(x + w, y); }
      if (at(r + 1, c) !== id) { path.moveTo(x, y + h); path.lineTo(x + w, y + h); }
      if (at(r, c - 1) !== id) { path.moveTo(x, y); path.lineTo(x, y + h); }
      if (at(r, c + 1) !== id) { path.moveTo(x + w, y); path.lineTo(x + w, y + h); }
    }
    pen.lineCap = "square";
    pen.strokeStyle = "rgba(0,0,0,.55)"; pen.lineWidth = 3.5; pen.stroke(path);
    pen.strokeStyle = "rgba(255,255,255,.95)"; pen.lineWidth = 1.6; pen.stroke(path);
  };
  const paint = (canvas, source, grid) => {
    const pen = canvas.getContext("2d");
    pen.drawImage(source, 0, 0);
    if (!grid) return "";
    const rows = grid.ids.length / grid.cols;
    const [w, h] = [SIDE / grid.cols, SIDE / rows];
    const groups = means(source, grid, rows);
    grid.ids.forEach((id, i) => {
      const [x, y] = [(i % grid.cols) * w, Math.floor(i / grid.cols) * h];
      if (id < 0) { hatch(pen, x, y, w, h); return; }
      const g = groups.get(id);
      if (g.n > 1) { pen.fillStyle = `rgb(${g.sum.map((s) => Math.round(s / g.n)).join(",")})`; pen.fillRect(x, y, w + 0.5, h + 0.5); }
    });
    outline(pen, grid, rows, w, h, groups);
    return `${groups.size} of ${grid.ids.length} patch tokens`;
  };
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  for (const section of all("[data-photos]")) {
    const grids = pictures[section.dataset.photos];
    const figures = all("figure", section);
    const slider = section.querySelector("input[type=range]");
    const original = section.querySelector("[data-original]");
    const names = (grids.find((g) => g.length) ?? []).map((g) => g.name);
    const sources = figures.map(() => null);
    const draw = () => {
      const k = Number(slider.value);
      section.querySelector("output").textContent = names[k] ?? "–";
      slider.setAttribute("aria-valuetext", `after block ${names[k] ?? ""}`);
      figures.forEach((figure, i) => {
        if (!sources[i]) return;
        const canvas = figure.querySelector("canvas");
        const said = paint(canvas, sources[i], original.checked ? null : grids[i][Math.min(k, grids[i].length - 1)]);
        figure.querySelector(".kept").textContent = said;
        canvas.setAttribute("aria-label", `${figure.querySelector("b").textContent}: ${said || "the photograph as it is"}`);
      });
    };
    slider.max = String(Math.max(0, names.length - 1));
    slider.value = String(Math.round(0.6 * Number(slider.max)));
    section.querySelector(".controls").hidden = names.length === 0;
    slider.addEventListener("input", draw);
    original.addEventListener("change", draw);
    all("[data-step]", section).forEach((button) => button.addEventListener("click", () => { slider.value = String(Number(slider.value) + Number(button.dataset.step)); draw(); }));
    figures.forEach(async (figure, i) => {
      const image = figure.querySelector("img");
      await image.decode();
      sources[i] = square(image);
      image.hidden = true;
      figure.querySelector("canvas").hidden = false;
      draw();
    });
  }
})();
