// Keys, zoom, and a guard against answers given too soon after an edit appeared.
(() => {
  const TOO_SOON = 400; // milliseconds; a click this early is a second click on the previous edit
  let shown = null, shownAt = 0, zoomed = -1;

  // The first aspect without a score. A digit scores it; with all of them scored, it rates the edit.
  const openAspect = () =>
    [...document.querySelectorAll(".aspect")].find((one) => one.offsetParent && !one.querySelector("input:checked"));
  document.addEventListener("change", (event) => event.target.matches("input[type=radio]") && event.target.blur());

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
    // An Enter that ends the input of a Chinese word is no answer.
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || event.isComposing) return;
    const press = (id) => {
      const button = document.getElementById(id);
      if (!button?.offsetParent) return false;
      event.preventDefault();
      button.click();
      return true;
    };
    const enter = (id) => {
      const field = document.querySelector(`#${id} textarea`);
      if (!field?.offsetParent) return;
      event.preventDefault();
      field.focus();
    };
    const field = event.target.closest?.("input:not([type=radio]), textarea, select, [contenteditable]");
    if (field) {
      if (event.key === "Escape") field.blur();
      else if (event.key === "Enter" && !event.shiftKey) {
        const into = field.closest("#texts") ? "answer-c" : field.closest("#comment") ? "answer-r" : null;
        // Otherwise the next key would be typed into the text of the next case.
        if (into && press(into)) field.blur();
      }
      return;
    }
    const key = event.key.toLowerCase();
    if (zoomed >= 0 && event.key === "Escape") zoom(-1);
    else if (zoomed >= 0 && event.key === "ArrowLeft") zoom(zoomed - 1 + pictures().length);
    else if (zoomed >= 0 && event.key === "ArrowRight") zoom(zoomed + 1);
    else if (key === "c") enter("prompt");
    else if (key === "r" && !document.querySelector("#comment textarea")?.value.trim()) {
      if (document.getElementById("answer-r")) enter("comment");
    } else if (/^[0-5]$/.test(key) && openAspect()) {
      if (performance.now() - shownAt >= TOO_SOON) openAspect().querySelectorAll("input")[Number(key)].click();
    } else if (/^[0-9ar]$/.test(key)) press(`answer-${key}`);
    else if (key === "s") press("skip");
    else if (event.key === "ArrowLeft" || event.key === "Backspace") press("back");
    else if (event.key === "ArrowRight") press("forward");
  });
})();
