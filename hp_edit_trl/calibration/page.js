// Keys, zoom, and a guard against answers given too soon after an edit appeared.
(() => {
  const TOO_SOON = 400; // milliseconds; a click this early is a second click on the previous edit
  let shown = null, shownAt = 0, zoomed = -1;

  const pictures = () => [...document.querySelectorAll("#shown .hp-images img")];

  function zoom(index) {
    let box = document.getElementById("hp-zoom");
    if (!box) {
      box = document.createElement("div");
      box.id = "hp-zoom";
      box.innerHTML = "<img alt=''><p></p>";
      box.addEventListener("click", () => zoom(-1));
      document.body.append(box);
    }
    const images = pictures();
    zoomed = index < 0 || !images.length ? -1 : (index + images.length) % images.length;
    box.classList.toggle("open", zoomed >= 0);
    if (zoomed >= 0) {
      box.querySelector("img").src = images[zoomed].src;
      box.querySelector("p").textContent =
        `${images[zoomed].alt} \u00b7 Left and Right: other image, Escape or click: close`;
    } else {
      box.querySelector("img").removeAttribute("src");
    }
  }

  new MutationObserver(() => {
    const element = document.querySelector("#shown [data-token]");
    if (!element || element.dataset.token === shown) return;
    shown = element.dataset.token;
    shownAt = performance.now();
    zoom(-1);
    // A reloaded tab keeps its annotator.
    const address = new URL(location);
    if (element.dataset.annotator && address.searchParams.get("annotator") !== element.dataset.annotator) {
      address.searchParams.set("annotator", element.dataset.annotator);
      history.replaceState(history.state, "", address);
    }
  }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["data-token"] });

  document.addEventListener("click", (event) => {
    if (event.target.closest(".answer") && performance.now() - shownAt < TOO_SOON) {
      event.preventDefault();
      event.stopImmediatePropagation();
      return;
    }
    const index = pictures().indexOf(event.target);
    if (index >= 0) zoom(index);
  }, true);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.closest?.("input, textarea, select, [contenteditable]")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    const press = (id) => {
      event.preventDefault();
      const button = document.getElementById(id);
      if (button?.offsetParent) button.click();
    };
    if (zoomed >= 0 && event.key === "Escape") zoom(-1);
    else if (zoomed >= 0 && event.key === "ArrowLeft") zoom(zoomed - 1 + pictures().length);
    else if (zoomed >= 0 && event.key === "ArrowRight") zoom(zoomed + 1);
    else if (/^[0-5]$/.test(event.key)) press(`score-${event.key}`);
    else if (event.key === "s" || event.key === "S") press("skip");
    else if (event.key === "ArrowLeft" || event.key === "Backspace") press("back");
    else if (event.key === "ArrowRight") press("forward");
  });
})();
