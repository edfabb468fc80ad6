"use strict";
// Without this script all frames of an attack stand beside each other and tables keep their order.

function addSlider(card) {
  const frames = [...card.querySelectorAll(".frame")];
  if (frames.length < 2) return;
  const wrapper = document.createElement("div");
  wrapper.className = "slider";
  const label = document.createElement("label");
  label.textContent = "Adaptation step";
  const slider = document.createElement("input");
  slider.type = "range";
  slider.min = 0;
  slider.max = frames.length - 1;
  slider.step = 1;
  slider.value = frames.length - 1;
  slider.id = `${card.getAttribute("aria-labelledby")}-step`;
  label.htmlFor = slider.id;
  const output = document.createElement("output");
  output.htmlFor = slider.id;
  const ticks = document.createElement("div");
  ticks.className = "ticks";
  ticks.setAttribute("aria-hidden", "true");
  for (const frame of frames) {
    const tick = document.createElement("span");
    tick.textContent = frame.dataset.step;
    ticks.append(tick);
  }
  const show = () => {
    frames.forEach((frame, index) => { frame.hidden = index !== Number(slider.value); });
    const step = frames[slider.value].dataset.step;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    output.textContent = step;
  };
  slider.addEventListener("input", show);
  label.append(" ", output);
  wrapper.append(label, slider, ticks);
  card.querySelector(".frames").before(wrapper);
  card.classList.add("moving");
  show();
}

// Numbers before words, and what was not measured last, in either direction.
function compareCells(first, second, sign) {
  if ("value" in first.dataset) {
    const [a, b] = [first.dataset.value, second.dataset.value];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (Number(a) - Number(b));
  }
  return sign * first.textContent.localeCompare(second.textContent, "en", { numeric: true });
}

function makeSortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const descending = header.getAttribute("aria-sort") === "ascending";
      for (const other of headers) other.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      const sign = descending ? -1 : 1;
      rows.sort((a, b) => compareCells(a.cells[column], b.cells[column], sign));
      table.tBodies[0].append(...rows);
    });
  });
}

document.querySelectorAll(".card").forEach(addSlider);
document.querySelectorAll("table.sortable").forEach(makeSortable);
