"""Templates that are proven to leave texts alone do so; whatever looks at a text is not proven."""

import pytest
from helpers import tiny
from helpers.bugs import bug
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.data.conversation import Message
from fastft.data.template import jinja_proof
from fastft.data.template.chat_template import BUILT_IN, ChatTemplate, built_in_templates
from fastft.data.template.jinja_proof import leaves_texts_alone

LOOP = "{%% for m in messages %%}%s<|im_end|>{%% endfor %%}"
ALONE = [
    LOOP % "{{ m.role ~ ': ' ~ m.content }}",
    LOOP % "{{ m['content'].strip() }}",
    LOOP % "{% set text = m.content | trim %}{% if m.role == 'user' %}{{ 'Q ' + text }}{% else %}{{ text }}{% endif %}",
    LOOP % "{{ m.content if loop.first or not loop.last else m.content | trim }}",
    LOOP % "{{ messages[0].role + m.content }}{{ messages[-1]['role'] }}",
    "{% set more = messages[1:] %}{% if more %}{% for m in more %}{{ m.content }}{% endfor %}{% endif %}",
    "{% set ns = namespace(n=0) %}" + LOOP % "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}",
    LOOP
    % "{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no') }}{% endif %}{{ (m.role | title) + m.content }}",
]
LOOKED_AT = [
    LOOP % "{{ m.content | upper }}",
    LOOP % "{{ (m.content | trim).split('x') | last }}",
    LOOP % "{{ m.content.strip('x') }}",
    LOOP % "{{ m.content | trim('x') }}",
    LOOP % "{{ m.content[:9] }}",
    LOOP % "{% if m.content %}{{ m.content }}{% endif %}",
    LOOP % "{% if 'x' in m.content %}{{ m.role }}{% endif %}{{ m.content }}",
    LOOP % "{{ m.content if m.content is string else '' }}",
    LOOP % "{{ m.content * 2 }}",
    LOOP % "{{ '%s' | format(m.content) }}",
    LOOP % "{{ [m.content] | join }}",
    LOOP % "{{ messages | length }}{{ m }}",
    LOOP % "{{ m | tojson }}",
    LOOP % "{{ m.get('content') }}",
    LOOP % "{% for key in m %}{{ m[key] }}{% endfor %}",
    LOOP % "{{ m[['con', 'tent'] | join] }}",
    LOOP % "{{ loop.previtem.content }}{{ m.content }}",
    LOOP % "{{ loop['next' + 'item'].content }}{{ m.content }}",
    LOOP % "{% if loop.changed(m.content) %}{{ m.content }}{% endif %}",
    LOOP % "{% for letter in m.content %}{{ letter }}{% endfor %}",
    LOOP % "{% set text = m.content %}{{ text | title }}",
    LOOP % "{% set a = m.content + 'x' %}{% set b = a ~ 'y' %}{% if b == 'z' %}!{% endif %}{{ m.content }}",
    LOOP % "{% if late == 'x' %}!{% endif %}{% set late = m.content %}{{ m.content }}",
    LOOP % "{% set ns = namespace(t='') %}{% set ns.t = m.content %}{{ ns.t | upper }}",
    LOOP % "{% set m = messages %}{{ m[0].content }}",
    LOOP % "{% set text %}{{ m.content }}{% endset %}{{ text | upper }}",
    LOOP % "{% filter upper %}{{ m.content }}{% endfilter %}",
    "{% macro say(m) %}{{ m.content | upper }}{% endmacro %}" + LOOP % "{{ say(m) }}",
    "{% macro say() %}{{ messages[0].content | upper }}{% endmacro %}" + LOOP % "{{ say() }}",
    "{% macro say() %}a{% endmacro %}" + LOOP % "{{ say() + m.content }}",
    LOOP % "{{ ('<s>' | safe) + m.content }}",  # Markup escapes what is added to it
    LOOP % "{{ m.content + ('x' | e) }}",
    LOOP % "{{ (['a'] | map('e') | first) + m.content }}",
    LOOP % "{{ lipsum(n=0) + m.content }}",
    LOOP % "{% autoescape true %}{{ 'x' }}{% endautoescape %}{{ m.content }}",
    LOOP % "{{ ['a', 'b'] | random }}{{ m.content }}",
    LOOP % "{{ cycler('a') }}{{ m.content }}",
    LOOP % "{{ strftime_now(format) }}{{ m.content }}",
    LOOP % ("{{ '' " + "+ 'x'" * 2000 + " }}"),
    LOOP % ("{{ " + "9" * 5000 + " }}"),
    "{% for m in messages if m.content != '' %}{{ m.content }}{% endfor %}",
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "{% for m in messages recursive %}{{ m.content }}{% endfor %}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ messages }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",  # a tag of transformers
]


@pytest.mark.parametrize("source", ALONE)
def test_templates_that_leave_texts_alone_are_proven(source):
    assert leaves_texts_alone(source)


@pytest.mark.parametrize("source", LOOKED_AT)
def test_templates_that_look_at_texts_are_not_proven(source):
    assert not leaves_texts_alone(source)


def test_what_we_ship_is_proven():
    assert len(built_in_templates()) == 7
    for name in built_in_templates():
        assert leaves_texts_alone((BUILT_IN / f"{name}.jinja").read_text("utf-8")), name


@settings(max_examples=200)
@given(
    source=st.sampled_from(ALONE),
    said=st.lists(st.text("aA x\n\t|<>{}%'\u00e9\u4f60", max_size=9), min_size=2, max_size=5),
    other=st.lists(st.text(max_size=9), min_size=5, max_size=5),
)
def test_what_is_proven_writes_other_texts_into_the_same_places(source, said, other):
    """Other texts with the same white space around them give the same rendering, but for the texts."""
    template = ChatTemplate.__new__(ChatTemplate)
    template.tokenizer, template.dated_source, template.name = tiny.KINDS["gpt2"](), source, "template"
    roles = ["user", "assistant"] * 3
    around = [(text[: len(text) - len(text.lstrip())], text.strip(), text[len(text.rstrip()) :]) for text in said]
    marks = [f"\ufdd0{n}\ufdd1" if core else "" for n, (_, core, _) in enumerate(around)]
    rendered = template.render([Message(r, a + m + b) for r, m, (a, _, b) in zip(roles, marks, around)])
    cores = [(text.strip() or "x") if core else "" for text, (_, core, _) in zip(other, around)]
    again = template.render([Message(r, a + c + b) for r, c, (a, _, b) in zip(roles, cores, around)])
    for mark, core in zip(marks, cores):
        rendered = rendered.replace(mark, core) if mark else rendered
    assert rendered == again


def test_a_bug_of_ours_is_not_a_template_that_is_not_proven(monkeypatch):
    monkeypatch.setattr(jinja_proof._Reader, "read", bug(jinja_proof))
    with pytest.raises(ValueError, match="not a number"):
        jinja_proof.leaves_texts_alone("{{ messages }}")
