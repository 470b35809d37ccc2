// Shows a model's Markdown, safely and while it grows.
//
// Three walls, each enough by itself: HTML in an answer is shown as text; what marked makes is sanitised; the page's policy
// forbids scripts, and anything from elsewhere. Images are links, because loading one would tell its host who reads.

import { Marked } from "marked";
import DOMPurify from "dompurify";

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escape(text),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || "image")} (image)</a>`,
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 2); // the page has its own h1 and h2
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS: "p br hr h3 h4 h5 h6 ul ol li blockquote pre code em strong del a table thead tbody tr th td span".split(" "),
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class") data.keepAttr = /^(language-|hljs)/.test(data.attrValue);
});

const sanitised = (html) => DOMPurify.sanitize(html, ALLOWED);

const LONGEST_HIGHLIGHTED = 50_000;
let highlighter; // fetched with the first block of code

async function highlight(code, language) {
  highlighter ||= import("./vendor/highlight.min.js").then((module) => module.default);
  const hljs = await highlighter;
  if (!hljs.getLanguage(language)) return;
  const html = hljs.highlight(code.textContent, { language, ignoreIllegals: true }).value;
  code.replaceChildren(sanitised(html));
}

function fragmentOf(tokens, settled) {
  const fragment = sanitised(marked.parser(tokens));
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) wrap(table, "scrolling").tabIndex = 0;
  for (const pre of fragment.querySelectorAll("pre")) frameCode(pre, settled);
  return fragment;
}

function wrap(element, className) {
  const box = document.createElement("div");
  box.className = className;
  element.replaceWith(box);
  box.append(element);
  return box;
}

function frameCode(pre, settled) {
  const code = pre.firstElementChild || pre;
  const language = (code.className.match(/^language-([\w+#.-]+)/) || [])[1] || "";
  const box = wrap(pre, "code-block");
  const head = document.createElement("div");
  head.className = "code-head";
  const label = document.createElement("span");
  label.textContent = language;
  head.append(label, copyButton("Copy code", () => code.textContent));
  box.prepend(head);
  pre.tabIndex = 0; // it scrolls, so the keyboard must reach it
  if (settled && language && code.textContent.length < LONGEST_HIGHLIGHTED) highlight(code, language).catch(() => {});
}

export function copyButton(name, text) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "quiet";
  button.textContent = name;
  button.addEventListener("click", async () => {
    button.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = name), 1500);
  });
  return button;
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS, browsers have no clipboard but the old way.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// One answer. Blocks that nothing can change any more are rendered once; only the last one is rendered again as it grows.
export class MarkdownView {
  constructor(element) {
    this.element = element;
    this.tail = document.createElement("div");
    this.reset();
  }

  reset() {
    this.shown = "";
    this.settled = 0;
    this.element.replaceChildren(this.tail);
  }

  update(text, whole) {
    const grown = text.startsWith(this.shown.slice(0, this.settled));
    // A definition of a link may change blocks before it.
    if (!grown || (whole && /^ {0,3}\[[^\]\n]+\]:/m.test(text))) this.reset();
    this.shown = text;
    const tokens = marked.lexer(text.slice(this.settled));
    let last = tokens.length;
    if (!whole) {
      // The last block may still grow, and a list goes on after blank lines.
      last = tokens.findLastIndex((token) => token.type !== "space");
      last = Math.max(last, 0);
    }
    const settled = tokens.slice(0, last);
    const growing = tokens.slice(last);
    settled.links = growing.links = tokens.links;
    if (settled.length) {
      this.tail.before(fragmentOf(settled, true));
      this.settled += settled.reduce((sum, token) => sum + token.raw.length, 0);
    }
    this.tail.replaceChildren(growing.length ? fragmentOf(growing, false) : "");
  }
}
