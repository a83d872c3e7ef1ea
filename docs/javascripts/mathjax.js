// What pymdownx.arithmatex marks as a formula, and nothing else.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]], processEscapes: true },
  options: { ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex" },
};

// Pages that are loaded without a reload of the site.
window.document$?.subscribe(() => window.MathJax.typesetPromise?.());
