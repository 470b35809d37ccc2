"""HTML of chat pages, and the markdown that it must become."""

import html

BUTTON = '<button class="flex ml-auto gap-2"><svg class="h-4 w-4"><path d="M16 4h2"></path></svg>Copy code</button>'
CODE_BLOCKS = {  # the page's five shapes, and what a sanitiser left of one: (HTML with %s in the place of the code, language)
    "A": (
        '<pre><div class="bg-black mb-4 rounded-md"><div class="flex items-center">' + BUTTON + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs">%s</code></div></div></pre>',
        "",
    ),
    "B": (
        '<pre><div class="bg-black mb-4 rounded-md"><div class="flex"><span class="">bash</span>' + BUTTON + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs language-bash">%s</code></div></div></pre>',
        "bash",
    ),
    "B'": ('<pre><div class="bg-black"><div class="p-4"><code>%s</code></div></div></pre>', ""),
    "C": (
        '<pre><div class="bg-black rounded-md mb-4"><div class="flex justify-between"><span>c++</span>'
        + BUTTON
        + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs">%s</code></div></div></pre>',
        "c++",
    ),
    "D": (
        '<pre><div class="dark bg-gray-950 rounded-md"><div><span>powershell</span><span data-state="closed">'
        + BUTTON
        + '</span></div><div class="p-4"><code class="hljs language-powershell">%s</code></div></div></pre>',
        "powershell",
    ),
    "without a language, later pages": (
        '<pre><div class="bg-black rounded-md mb-4"><div class="flex"><span>plaintext</span>' + BUTTON + "</div>"
        '<div class="p-4"><code class="!whitespace-pre hljs language-plaintext">%s</code></div></div></pre>',
        "",
    ),
    "sanitised": ("<pre><div><div>pythonCopy code</div><div><code>%s</code></div></div></pre>", "python"),
    "plain": ("<pre><code>%s</code></pre>", ""),
}


def page(inner: str) -> str:
    """Return an answer in the page's wrapper."""
    return f'<div class="markdown prose w-full break-words dark:prose-invert light">{inner}</div>'


def tex(source: str) -> str:
    """Return a formula as the page states it: as MathML, as TeX and as glyphs."""
    return (
        '<span class="katex"><span class="katex-mathml"><math><semantics><mi>x</mi>'
        f'<annotation encoding="application/x-tex">{html.escape(source)}</annotation></semantics></math></span>'
        '<span class="katex-html" aria-hidden="true"><span class="mord">x</span></span></span>'
    )


GOLDEN = {
    "paragraphs": ("<p>One.</p><p>Two.</p>", "One.\n\nTwo."),
    "nothing is escaped": (
        "<p>snake_case, 5 * 3, __init__, 1. a # b [c] &lt;div&gt;</p>",
        "snake_case, 5 * 3, __init__, 1. a # b [c] <div>",
    ),
    "line break in a paragraph": ("<p>one\n  two</p>", "one\ntwo"),
    "br": ("<p>one<br>two</p>", "one  \ntwo"),
    "br and line end": ("<p>one<br>\ntwo</p>", "one  \ntwo"),
    "inline": (
        "<p><strong>b</strong> <em>i</em> <del>d</del> <code>c</code></p>",
        "**b** *i* ~~d~~ `c`",
    ),
    "spaces move out of emphasis": ("<p>a<strong> b </strong>c</p>", "a **b** c"),
    "sub and sup": ("<p>H<sub>2</sub>O m<sup>2</sup></p>", "H<sub>2</sub>O m<sup>2</sup>"),
    "code span with backticks": ("<p><code>x`y``z</code> <code>`x</code></p>", "```x`y``z``` `` `x ``"),
    "code span with spaces": ("<p><code>a  b</code></p>", "`a  b`"),
    "line break in a code span": ("<p><code>a<br>b</code></p>", "`a b`"),
    "space between marks": ("<p>a<sub> </sub>b</p>", "a b"),
    "headings": ("<h1>T</h1><h2>U <code>v</code></h2><p>x</p>", "# T\n\n## U `v`\n\nx"),
    "link": ('<p><a href="https://a.b/c_d?x=1&amp;y=2" target="_new">see</a></p>', "[see](https://a.b/c_d?x=1&y=2)"),
    "bare address": ('<p>at <a href="https://a.b/c_d">https://a.b/c_d</a>.</p>', "at https://a.b/c_d."),
    "image": ('<p><img src="a.png" alt="A" title="T"></p>', '![A](a.png "T")'),
    "rule": ("<p>a</p><hr><p>b</p>", "a\n\n---\n\nb"),
    "quote": (
        "<blockquote><p>a</p><p>b</p></blockquote><p>c</p>",
        "> a\n>\n> b\n\nc",
    ),
    "tight list": ("<ul><li>a</li><li>b</li></ul>", "- a\n- b"),
    "loose list": ("<ol><li><p>a</p></li><li><p>b</p></li></ol>", "1. a\n\n2. b"),
    "two paragraphs in an item": ("<ol><li><p>a</p><p>b</p></li></ol>", "1. a\n\n   b"),
    "nested lists": (
        "<ol><li>a<ul><li>b<ul><li>c</li></ul></li></ul></li><li>d</li></ol>",
        "1. a\n   - b\n     - c\n2. d",
    ),
    "paragraph, then nested list": ("<ol><li><p>a</p><ul><li>b</li></ul></li></ol>", "1. a\n   - b"),
    "text after a nested list": ("<ul><li>a<ul><li>b</li></ul>c</li></ul>", "- a\n  - b\n\n  c"),
    "list start": ('<ol start="9"><li>a</li><li>b</li></ol>', "9. a\n10. b"),
    "interrupted list": (
        '<ol><li>a</li></ol><pre><code>x\n</code></pre><ol start="2"><li>b</li></ol>',
        "1. a\n\n```\nx\n```\n\n2. b",
    ),
    # Early pages lost the number and showed "1." again. They do not say whether it was "2." or a new list.
    "interrupted list without its number": (
        "<ol><li>a</li></ol><pre><code>x\n</code></pre><ol><li>b</li></ol>",
        "1. a\n\n```\nx\n```\n\n1. b",
    ),
    "item in a wrapper": ("<ol><span><li>a</li></span><x-y><li>b</li></x-y></ol>", "1. a\n<x-y>\n2. b\n</x-y>"),
    "wide numbers indent": ('<ol start="10"><li><p>a</p><p>b</p></li></ol>', "10. a\n\n    b"),
    "task list": (
        '<ul><li><input type="checkbox" checked> a</li><li><input type="checkbox"> b</li></ul>',
        "- [x] a\n- [ ] b",
    ),
    "list between text": ("<p>a</p><ul><li>b</li></ul><p>c</p>", "a\n\n- b\n\nc"),
    "pretty-printed HTML": (
        "\n<ol>\n<li>\n<p>a</p>\n</li>\n<li>\n<p>b</p>\n</li>\n</ol>\n<p>c</p>\n",
        "1. a\n\n2. b\n\nc",
    ),
    "code in an item": (
        "<ol><li><p>a</p><pre><code>x\n\n  y\n</code></pre></li><li><p>b</p></li></ol>",
        "1. a\n\n   ```\n   x\n\n     y\n   ```\n\n2. b",
    ),
    "code block holding a fence": ("<pre><code>```py\nx\n```\n</code></pre>", "````\n```py\nx\n```\n````"),
    "empty code block": ("<pre><code></code></pre>", "```\n```"),
    "code keeps blank lines": ("<pre><code>\n\n  a\n\n\nb\n\n</code></pre>", "```\n\n\n  a\n\n\nb\n\n```"),
    "pre with text beside its code": ("<pre>$ <code>ls</code>\nfile\n</pre>", "```\n$ ls\nfile\n```"),
    "pre in pre": ("<pre>a\n<ol><li><pre>b\n</pre></li><li>c</li></ol></pre>", "```\na\nb\nc\n```"),
    "prompt beside code": ("<pre>$ <code>ls</code></pre>", "```\n$ ls\n```"),
    "table": (
        '<table><thead><tr><th>a</th><th style="text-align: right">b</th></tr></thead>'
        "<tbody><tr><td>1|2</td><td><code>x|y</code></td></tr><tr><td>p<br>q</td><td></td></tr></tbody></table>",
        "| a | b |\n| --- | ---: |\n| 1\\|2 | `x\\|y` |\n| p<br>q |  |",
    ),
    "table without header": (
        "<table><tbody><tr><td>a</td></tr><tr><td>b</td></tr></tbody></table>",
        "|  |\n| --- |\n| a |\n| b |",
    ),
    "code block in a cell": (
        "<table><tr><th>a</th></tr><tr><td><pre><code>x\ny\n</code></pre></td></tr></table>",
        "| a |\n| --- |\n| `x`<br>`y` |",
    ),
    "pipes in a cell": (
        f'<table><tr><th>{tex("|x|")}</th><th><a href="a|b">c</a></th></tr></table>',
        "| $\\|x\\|$ | [c](a\\|b) |\n| --- | --- |",
    ),
    "code with backticks in a cell": (
        "<table><tr><th><pre><code>a`b\n</code></pre></th></tr></table>",
        "| ``a`b`` |\n| --- |",
    ),
    "inline formula": (f'<p>so <span class="math math-inline">{tex("a_i < b*c")}</span>.</p>', "so $a_i < b*c$."),
    "display formula": (
        '<p>so</p><div class="math math-display"><span class="katex-display">'
        + tex("\\frac{a}{b}")
        + "</span></div><p>x</p>",
        "so\n\n$$\n\\frac{a}{b}\n$$\n\nx",
    ),
    "display formula without its wrapper": (f'<span class="katex-display">{tex("x")}</span>', "$$\nx\n$$"),
    "unescaped angle brackets": ("<p>a List<String> of <Item>x</Item></p>", "a List<String> of <Item>x</Item>"),
    "footer of an extension": ("<p>The end.</p>Copy123 chars / 20 words", "The end."),
    "footer in a span": ("<p>The end.</p><div><span>Copy1 chars / 2 words</span></div>", "The end."),
    "footer after a control character": ("<p>a</p>\x1bCopy1 chars / 2 words", "a\n\n\x1bCopy1 chars / 2 words"),
    "control character beside code": ("<pre><div>\x1b<code>x</code></div></pre>", "```\n\x1bx\n```"),
    "control character in a language": ('<pre><code class="language-\x1b">x</code></pre>', "```\nx\n```"),
    "text without a wrapper": ("plain a < b &amp; c", "plain a < b & c"),
    "comment and script": ("<p>a<!-- b --></p><script>c</script>", "a"),
    "no-break and ideographic spaces": ("<p>a\xa0b</p><p>\u3000c</p>", "a\xa0b\n\n\u3000c"),
}  # fmt: skip


UNREADABLE = (
    "<div>" * 3000 + "x",
    "<div>" * 2500 + "x" + "</div>" * 2500,
    "<ul><li>" * 3000,
    "<b>" * 400 + "x" + "</b>" * 400,
    "<p>a</p><!-- b",
    "<p>a</p><p",
    "<p>a</p><![foo",
)
