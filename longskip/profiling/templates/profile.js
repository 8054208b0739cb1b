"use strict";
(() => {
  // An element's title, shown at once beside the pointer, and for the keyboard beside the element.
  let tip = null;
  const hide = () => { tip?.remove(); tip = null; };
  const show = (text, x, y) => {
    hide();
    tip = document.createElement("div");
    tip.className = "tip at";
    text.split("\n").forEach((line, at) => {
      const row = document.createElement("div");
      const part = document.createElement(at ? "span" : "b");
      part.textContent = line;
      row.append(part);
      tip.append(row);
    });
    document.body.append(tip);
    const { offsetWidth: width, offsetHeight: height } = tip;
    const left = x + 14 + width <= innerWidth ? x + 14 : x - 14 - width;
    tip.style.left = `${Math.max(4, left)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - height - 4))}px`;
  };
  for (const node of document.querySelectorAll("[data-tip]")) {
    const text = node.querySelector("title").textContent;
    node.querySelector("title").remove();
    node.setAttribute("aria-label", text.replaceAll("\n", ", "));
    node.addEventListener("pointermove", (e) => show(text, e.clientX, e.clientY));
    node.addEventListener("pointerleave", hide);
    node.addEventListener("focus", () => {
      const box = node.getBoundingClientRect();
      show(text, box.left, box.bottom - 14);
    });
    node.addEventListener("blur", hide);
  }
  addEventListener("scroll", hide, { passive: true });
  addEventListener("keydown", (e) => { if (e.key === "Escape") hide(); });
})();
