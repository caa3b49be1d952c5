"""A chat template runs in a sandbox: its errors have a line, it ends, and it makes no more than it may."""

from datetime import datetime

import pytest

from lm.data.hub import sandbox
from lm.data.hub.template import ChatTemplate, TemplateError
from lm.experiment import UserError

TALK = [{"role": "user", "content": "Hi"}]


def render(source: str, **variables) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(TALK, variables=variables)


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("{% for m in messages %}\n{{ m.content }}\n{% endfo %}", "line 3 ({% endfo %})"),
        ("{{ bos_token }}\n{{ messages[0].content + 1 }}", "line 2 ({{ messages[0].content + 1 }})"),
        ("a\nb\n{{ messages[3].content.x }}", "line 3 ("),
        ("a\n{{ raise_exception('Roles must alternate') }}", "Roles must alternate, line 2 ("),
        ("a\n{{ nothing.of.this }}", "line 2 ("),
        ("a\n{{ messages | no_such_filter }}", "line 2 ("),
        ("{% generation %}\n{{ messages }}", "endgeneration"),
        ("a\n{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "line 2 ("),
    ],
)
def test_an_error_of_a_template_shows_its_line(source, line):
    with pytest.raises(UserError) as error:
        render(source)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


LOOPS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        LOOPS,
        "{% for i in range(99999) %}{% for j in range(99999) %}{% if i < 0 %}{% break %}{% endif %}{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% set x = namespace(s='x') %}{% for i in range(99) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
        "{% set x = namespace(s='x') %}{% for i in range(99) %}{% set x.s = x.s + x.s %}{% endfor %}{{ x.s }}",
        "{% set x = namespace(s=[1]) %}{% for i in range(99) %}{% set x.s = x.s + x.s %}{% endfor %}",
        "{% set x = namespace(s=[1]) %}{% for i in range(99) %}{% set x.s = [x.s, x.s] %}{% endfor %}{{ x.s }}",
        "{% set x = namespace(s=1) %}{% for i in range(99) %}{% set x.s = {'a': x.s, 'b': (x.s,)} %}{% endfor %}{{ x.s }}",
        "{% set x = namespace(s='long' * 9999) %}{% for i in range(99) %}{% set x.s = [x.s] * 2 %}{% endfor %}{{ x.s }}",
        "{% set x = namespace(s='x') %}{% for i in range(99) %}{% set x.s = x.s | replace('x', 'xx') %}{% endfor %}",
        "{% set x = namespace(s='xx') %}{% for i in range(99) %}{% set x.s = x.s.join([x.s, x.s]) %}{% endfor %}",
        "{% set x = namespace(s=2) %}{% for i in range(99) %}{% set x.s = x.s * x.s %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'a long text that is written again and again ' * 99 }}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 10000000000 * 'x' }}",
        "{{ [1] * 10000000000 }}",
        "{{ 10 ** 99999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ 'x'.center(9999999999) }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ 'x' | indent(9999999999, true) }}",
        "{{ messages | tojson(indent=9999999999) }}",
        "{{ (range(99999) | list) | tojson(indent=999999) }}",
        "{{ 'x'.encode() * 9999999 }}{{ ('x'.encode() * 99999999999) | length }}",
        "{% macro m(n) %}{% for i in range(999) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(1) }}",
    ],
)
def test_a_template_that_would_not_end_is_stopped(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_STEPS", 20_000)
    with pytest.raises(TemplateError, match=r"does not end|cannot render") as error:
        render(source)
    assert "\n" not in str(error.value)


def test_namespaces_in_namespaces_have_a_short_text():
    double = "{% set y = namespace() %}{% set y.a = x.s %}{% set y.b = x.s %}{% set x.s = y %}"
    source = f"{{% set x = namespace(s=1) %}}{{% for i in range(99) %}}{double}{{% endfor %}}{{{{ x.s }}}}"
    assert render(source) == "<Namespace>"


def test_a_template_that_takes_long_is_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.05)
    with pytest.raises(TemplateError, match="seconds"):
        render(LOOPS)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ self._TemplateReference__context.vars }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
    ],
)
def test_a_template_reaches_and_changes_nothing_outside(source):
    with pytest.raises(TemplateError):
        render(source)
    assert TALK == [{"role": "user", "content": "Hi"}]


def test_a_template_has_what_the_models_templates_use():
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{{ {'b': '<é>', 'a': 1} | tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{{ {'a': [1]} | tojson(indent=1) }}") == '{\n "a": [\n  1\n ]\n}'
    assert render("{{ bos_token }}{{ enable_thinking }}", enable_thinking=False) == "<s>False"
    assert render("{{ 'a' ~ 1 ~ messages[0].content }}{{ '%s!' % 'b' }}{{ '{}?'.format('c') }}") == "a1Hib!c?"
    assert render("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a') }}") == "[a]"
    at = datetime(2024, 7, 26)
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}", now=at).render(TALK) == "26 Jul 2024"
