// An equation inside a sentence cannot be broken: where it is wider than its column, it gets a line of its own to scroll.
window.addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  for (const equation of document.querySelectorAll("article span.math")) {
    const column = equation.closest("p, li, dd, td, th, div");
    if (equation.firstElementChild?.getBoundingClientRect().width > column.clientWidth) {
      equation.classList.add("wide");
      equation.tabIndex = 0;
    }
  }
});
