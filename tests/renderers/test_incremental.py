"""The texts of a long conversation's prefixes, compared with a separate run of the template for each."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import chat_formats
import pytest
from slow import slow_except

from cookbook.errors import RendererError
from renderers.jinja.chat import Chat
from renderers.jinja.incremental import IncrementalTemplate
from renderers.jinja.loop_records import Memory
from renderers.jinja.sandbox import compiled
from renderers.jinja.template import Template

LOOP = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def body(added: str) -> str:
    return LOOP.replace("{{ m.content", added + "{{ m.content")


LAST_USER_BACKWARDS = (
    "{% set ns = namespace(searches=true, last=messages|length - 1) %}{% for m in messages[::-1] %}"
    "{% set index = (messages|length - 1) - loop.index0 %}"
    "{% if ns.searches and m.role == 'user' %}"
    "{% set ns.searches = false %}{% set ns.last = index %}{% endif %}"
    "{% endfor %}"
)
LAST_USER_FORWARDS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
NEXT_ASSISTANT = (
    "{% set found = namespace(at=-1) %}{% for k in range(loop.index0 + 1, messages|length) %}"
    "{% if found.at < 0 %}"
    "{% if messages[k].role == 'assistant' %}{% set found.at = k %}{% endif %}{% endif %}"
    "{% endfor %}{{ found.at }}"
)
NEXT_ASSISTANT_WITH_FLAG = NEXT_ASSISTANT.replace("namespace(at=-1)", "namespace(at=-1, done=false)").replace(
    "{% if found.at < 0 %}", "{% if not found.done %}"
)
LAST_ASSISTANT_BY_INDEX = (
    "{% set ns = namespace(at=-1) %}{% for i in range(messages | length - 1, -1, -1) %}"
    "{% if messages[i].role == 'assistant' %}{% set ns.at = i %}{% break %}{% endif %}{% endfor %}"
)
USERS = "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
TRACED = {
    "chatml": LOOP,
    "first": body("{{ loop.index }}{% if loop.first %}!{% endif %}"),
    "system": "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}" + LOOP.replace("in messages", "in rest"),
    "same name": "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}"
    + body("{{ messages[0].content }}"),
    "nested": body("{% for c in m.content[:3] %}{{ c }}{{ loop.last }}{% endfor %}"),
    "macro": "{% macro say(m) %}[{{ m.content }}]{% endmacro %}" + LOOP.replace("m.content }}", "say(m) }}"),
    "alternating": body(
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('No.') }}{% endif %}"
    ),
    "last": body("{% if loop.last %}!{% endif %}"),
    "next": body("{{ (loop.nextitem or m).role }}{{ (loop.previtem or m).content }}"),
    "length outside of the loop": "{{ messages | length }}" + LOOP,
    "length": body("{% if loop.index == messages | length %}!{% endif %}"),
    "length of the loop": body("{% if loop.length - 2 > loop.index0 %}!{% endif %}{{ loop.revindex < 3 }}"),
    "neighbours": body(
        "{% if loop.first or messages[loop.index0 - 1].role != m.role %}[{% endif %}"
        "{% if loop.last or messages[loop.index0 + 1].role != m.role %}]{% endif %}"
    ),
    "a range": "{% for i in range(messages|length) %}{% set m = messages[i] %}{{ m.role }}"
    "{% if not loop.last and messages[i + 1].role == m.role %}={% endif %}{{ m.content }}\n{% endfor %}",
    "remembers": "{% set ns = namespace(n=0) %}" + body("{% set ns.n = ns.n + 1 %}{{ ns.n }}"),
    "remembers in a macro": "{% set ns = namespace(n=0) %}"
    "{% macro count() %}{% set ns.n = ns.n + 1 %}{% endmacro %}" + body("{{ count() }}{{ ns.n }}"),
    "two loops": LOOP + LOOP,
    "continues": body("{% if m.role == 'tool' %}{% continue %}{% endif %}"),
    "last user, backwards": LAST_USER_BACKWARDS + body("{% if loop.index0 > ns.last %}!{% endif %}"),
    "last user, forwards": LAST_USER_FORWARDS + body("{% if loop.index0 >= ns.last %}!{% endif %}"),
    "the last user only": LAST_USER_FORWARDS + body("{% if loop.index0 == ns.last %}!{% endif %}"),
    "not the last user": LAST_USER_BACKWARDS
    + body("{{ loop.index0 != ns.last }}{{ loop.index0 < ns.last }}"),
    "with a flag": body(
        NEXT_ASSISTANT_WITH_FLAG.replace("found.at = k", "found.at = k %}{% set found.done = true")
    ),
    "reads all messages for some": body(
        "{% if m.role == 'tool' %}{% for n in messages %}{{ n.role }}{% endfor %}{% endif %}"
    ),
    "compares with the last user if there are tools": USERS
    + body("{% if tools and m == users[-1] %}!{% endif %}"),
    "a beginning and the rest": LAST_ASSISTANT_BY_INDEX
    + LOOP.replace("in messages", "in messages[:ns.at + 1]")
    + body("{% if loop.last %}!{% endif %}").replace("in messages", "in messages[ns.at + 1:]"),
    "sets what the length was": "{% set ns = namespace(last=messages | length) %}"
    + body("{% set ns.last = loop.index0 %}")
    + "{{ ns.last }}",
    "generation": "{% for m in messages %}{{ m.role }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}
"""Templates that are run about once per message."""

RUN_OFTEN = {
    "from the end": body("{{ messages[-1].role }}"),
    "an unguarded neighbour": body("{{ messages[loop.index0 - 1].role }}"),
    "the last user's number": LAST_USER_FORWARDS + body("{{ ns.last }}"),
    "backwards": LOOP.replace("in messages", "in messages[::-1]"),
    "filtered": LOOP.replace("in messages", "in messages if m.role == 'user'"),
    "all at once": LOOP + "{{ messages }}",
    "prints the length": body("{{ messages | length }}"),
    "asks what the length is": body("{% if (messages | length - 1) is number %}!{% endif %}"),
    "remainder of the length": body("{{ messages | length % 3 }}{{ loop.length % 2 }}"),
    "breaks": body("{% if m.content == 'word 7' %}{% break %}{% endif %}"),
    "the loop is passed on": "{% macro f(l) %}{{ l.last }}{% endmacro %}" + body("{{ f(loop) }}"),
    "the loop is printed": body("{{ loop | string | length > 0 }}"),
    "in a nested loop": body("{% for n in messages %}{{ n.role }}{% endfor %}"),
    "otherwise": LOOP.replace("{% endfor", "{% else %}x{% endfor"),
    "captured": "{% set text %}" + LOOP + "{% endset %}{{ text | upper }}",
    "renamed in the loop": body("{% set all = messages %}{{ all | length }}"),
    "changed": body("{% if loop.changed(m.role) %}!{% endif %}"),
    "cycle": body("{{ loop.cycle('a', 'b', 'c') }}"),
    "joiner": "{% set comma = joiner(', ') %}" + body("{{ comma() }}"),
    "a namespace in a namespace": "{% set ns = namespace(inner=none) %}"
    + body(
        "{% if loop.index0 % 5 == 0 %}{% set ns.inner = namespace(n=0) %}{% endif %}"
        "{% set inner = ns.inner %}{% set inner.n = inner.n + 1 %}{{ inner.n }}"
    ),
    "a list in a namespace": "{% set ns = namespace(seen=[]) %}"
    + body("{% set ns.seen = ns.seen + [m.role] %}{{ ns.seen | length }}"),
    "looks for the next": body(NEXT_ASSISTANT),
    "the same name twice": "{% set run_of_a_template = 1 %}" + LOOP,
    "the number of users": "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    + body("{{ users | length }}"),
    "prints backwards": "{% for m in messages[::-1] %}{{ m.role }}{% if loop.first %}!{% endif %}{% endfor %}"
    + LOOP,
    "reverse": "{% set ns = namespace(n=0) %}{% for m in messages | reverse %}"
    "{% if m.role == 'user' and loop.index0 < 5 %}{% set ns.n = ns.n + loop.index %}{% endif %}"
    "{% endfor %}{{ ns.n }}" + LOOP,
}

ALL_BUT_THE_LOOP = "{% set m = messages | length %}{% set loop = messages | length %}"
HIDDEN_PARTS = "[{'hidden': false, 'n': 1}, {'hidden': true, 'n': 2}, {'hidden': false, 'n': 3}]"
EASILY_MISTAKEN = {
    "two macros of one name": "{% macro f() %}{{ n }}{% endmacro %}{% set n = messages | length %}"
    + body("{{ f() }}")
    + "{% macro f() %}{% endmacro %}",
    "a macro reads what the loop calls its item": ALL_BUT_THE_LOOP
    + "{% macro f() %}{{ m }}{% endmacro %}"
    + body("{{ f() }}"),
    "a macro reads a variable called loop": ALL_BUT_THE_LOOP
    + "{% macro f() %}{{ loop }}{% endmacro %}"
    + body("{{ f() }}"),
    "a variable called namespace": "{% set namespace = messages | length %}" + body("{{ namespace }}"),
    "a variable called range": "{% macro range(a, b) %}x{{ b }}{% endmacro %}"
    + body("{% for k in range(3, messages | length) %}{{ k }}{{ messages[3].role }}{% endfor %}"),
    "a variable instead of a macro": "{% macro f() %}{% endmacro %}"
    "{% if true %}{% set f = messages | length %}{% endif %}" + body("{{ f }}"),
    "a macro for long conversations": "{% if messages | length > 17 %}"
    "{% macro f() %}x{% endmacro %}{% endif %}" + body("{{ f is defined }}"),
    "one of two macros": "{% if messages | length > 17 %}{% macro f() %}x{% endmacro %}"
    "{% else %}{% macro f() %}y{% endmacro %}{% endif %}" + body("{{ f() }}"),
    "a loop of a constant length": "{% for i in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] %}{{ messages[i].content }}"
    "{% if messages | length > 20 %}!{% endif %}{% endfor %}",
    "sometimes two names for a namespace": "{% set a = namespace(n=0) %}{% set b = namespace(n=0) %}"
    "{% if messages | length > 17 %}{% set b = a %}{% endif %}" + body("{% set a.n = a.n + 1 %}{{ b.n }}"),
    "a namespace that a loop leaves": "{% set ns = namespace(inner=none) %}"
    + body("{% if loop.index0 == 9 %}{% set ns.inner = namespace(n=0) %}{% endif %}")
    + "{% if ns.inner %}{% set i = ns.inner %}{{ i.n }}{% set i.n = i.n + 1 %}{% endif %}",
    "not for some items": body(
        f"{{% for p in {HIDDEN_PARTS} %}}{{% if not p.hidden %}}{{{{ p.n }}}}{{% endif %}}{{% endfor %}}"
    ),
    "else for some items": body(
        f"{{% for p in {HIDDEN_PARTS} %}}"
        "{% if p.hidden %}{% else %}{{ p.n }}{% endif %}{% endfor %}"
    ),
    "what an iterator has left": body(
        "{% set ns = namespace(done=false) %}{% set parts = ['a', 'b', 'c'] | map('upper') %}"
        "{% for p in parts %}{% if not ns.done %}{% set ns.done = true %}{% endif %}{% endfor %}"
        "{{ parts | list }}"
    ),
    "a filter of the loop that counts": "{% set ns = namespace(done=false, n=0) %}"
    "{% macro f() %}{% set ns.n = ns.n + 1 %}1{% endmacro %}"
    + body(
        "{% for p in 'abcde' if f() %}{% if not ns.done %}{% set ns.done = true %}{% endif %}{% endfor %}"
        "{{ ns.n }}{% set ns.done = false %}"
    ),
    "numbers that are kept": body(
        "{% set numbers = range(3, messages | length) %}{{ numbers | list }}{{ numbers | length }}"
        "{% if messages[3] %}{% endif %}"
    ),
    "two names for the messages": "{% set all = messages %}"
    + body("{{ messages[0].role }}{{ (all | last).role }}"),
    "an iterator from the end that is read on": "{% set backwards = messages | reverse %}"
    "{% for m in backwards %}{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}"
    "{{ backwards | list | length }}",
    "the same object": "{% set last = messages | last %}" + body("{{ m is sameas last }}"),
    "the length in JSON": body("{{ [messages | length] | tojson }}{{ {'n': [loop.length]} | tojson }}"),
    "the loop is run in itself": body(
        "{% if loop.index0 == 1 %}{% for pair in loop %}<{{ pair[0].content }}>"
        "{% if loop.index0 > 3 %}{% break %}{% endif %}{% endfor %}{% endif %}"
    ),
    "the next of the loop": body("{{ (loop | first)[0].content }}"),
    "a namespace as text, backwards": "{% set ns = namespace(n=messages | length, text='') %}"
    "{% for m in messages[::-1] %}{% set ns.text = (ns | string)[-30:] %}{% endfor %}{{ ns.text }}",
    "minus nothing": "{% set ns = namespace(n=0.0) %}"
    "{% if messages | length > 17 %}{% set ns.n = -0.0 %}{% endif %}" + body("{{ ns.n }}"),
    "what a loop does not have": body("{{ loop.other.more }}"),
}
"""Templates that look traceable but are not, or whose values are easily confused."""

TEMPLATES = {**TRACED, **RUN_OFTEN}
QUICK = list(TEMPLATES)[::3]


def conversation(num_messages: int, system: bool = False) -> list[dict[str, Any]]:
    roles = ["user", "assistant"]
    messages: list[dict[str, Any]] = [
        {"role": roles[number % 2], "content": f"word {number}"} for number in range(num_messages)
    ]
    return [{"role": "system", "content": "Be brief."}, *messages] if system else messages


def rollout(num_messages: int) -> list[dict[str, Any]]:
    """Returns two questions, each followed by calls and results; half of the calls have thinking."""
    messages: list[dict[str, Any]] = []
    while len(messages) < num_messages:
        number = len(messages)
        if number in (0, num_messages // 2):
            messages.append({"role": "user", "content": f"Question {number}"})
        call = {
            "type": "function",
            "id": f"call{number:05d}",
            "function": {"name": "f", "arguments": {"at": number}},
        }
        thought = {"reasoning_content": f"thought {number}"} if number % 4 == 1 else {}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call], **thought})
        messages.append({"role": "tool", "content": f"Result {number}", "tool_call_id": f"call{number:05d}"})
    return messages[:num_messages]


def printed(render: Any, *arguments: Any) -> str:
    try:
        return str(render(*arguments))
    except RendererError as error:
        return f"refused: {error}"


def check_every_beginning(template: Template, messages: list[dict[str, Any]], tools: Any = None) -> Chat:
    chat = Chat(template, messages, tools)
    order = [len(messages), *range(1, len(messages) + 1)]
    for number in order:
        for prompt in (False, True):
            expected = printed(template.text, chat.messages[:number], chat.tools, prompt)
            assert printed(chat.text, number, prompt) == expected
    for index in range(0, len(messages), 5):
        stand_in = {**chat.messages[index], "content": "another word"}
        for number in (index + 1, (index + 1 + len(messages)) // 2, len(messages)):
            changed = [*chat.messages[:index], stand_in, *chat.messages[index + 1 : number]]
            expected = printed(template.text, changed, chat.tools)
            assert printed(chat.text_with, index, stand_in, number) == expected
    return chat


@pytest.mark.cases(10)
@pytest.mark.parametrize("name", slow_except(QUICK, TEMPLATES))
@pytest.mark.parametrize("kind", ["plain", "system", "calls"])
def test_every_prefix_has_the_text_that_the_template_prints(small_tokenizer, name, kind):
    template = Template(small_tokenizer(TEMPLATES[name] + PROMPT))
    messages = rollout(40) if kind == "calls" else conversation(40, kind == "system")
    check_every_beginning(template, messages)


@pytest.mark.cases(8)
@pytest.mark.parametrize("name", EASILY_MISTAKEN)
def test_templates_that_are_hard_to_trace_print_every_prefix_the_same(small_tokenizer, name):
    template = Template(small_tokenizer(EASILY_MISTAKEN[name] + PROMPT))
    two = conversation(2)
    for messages in (conversation(26), [dict(two[number % 2]) for number in range(26)]):
        check_every_beginning(template, messages)


@pytest.mark.cases(10)
@pytest.mark.parametrize("name", TRACED)
def test_the_template_runs_about_once_per_message(name):
    template = IncrementalTemplate.of(TRACED[name])
    assert template is not None
    memory = Memory()
    messages = conversation(200)
    for number in (200, *range(1, 201)):
        template.text(messages[:number], {"add_generation_prompt": False}, memory)
    assert memory.num_runs == 201
    assert memory.num_iterations <= 9 * 200 < memory.num_reused / 4


def test_a_loop_that_is_run_again_each_time_is_no_longer_traced():
    source = LOOP + RUN_OFTEN["in a nested loop"]
    template, memory, messages = IncrementalTemplate.of(source), Memory(), conversation(40)
    assert template is not None
    for number in (40, *range(1, 41)):
        expected = compiled(source).render(messages=messages[:number])
        assert template.text(messages[:number], {}, memory) == expected
    assert {counts.is_of_use for counts in memory.loops.values()} == {True, False}
    assert memory.is_of_use
    assert sum(counts.num_entries for counts in memory.loops.values()) < 2 * memory.num_runs


@pytest.mark.cases(12)
@pytest.mark.parametrize("order", ["backwards", "mixed"])
@pytest.mark.parametrize("name", slow_except(QUICK, TEMPLATES))
def test_prefixes_can_be_rendered_in_any_order(small_tokenizer, name, order):
    template = Template(small_tokenizer(TEMPLATES[name] + PROMPT))
    messages = conversation(30)
    chat = Chat(template, messages, None)
    numbers = list(range(1, 31))
    numbers.reverse() if order == "backwards" else random.Random(7).shuffle(numbers)
    for number in numbers:
        expected = printed(template.text, messages[:number])
        assert printed(chat.text, number) == expected


CONDITIONS = [
    "loop.first",
    "loop.last",
    "not loop.last",
    "m.role == 'user'",
    "m.role != 'tool'",
    "loop.index0 % 3 == 0",
    "loop.index0 > ns.last",
    "loop.index <= ns.last",
    "loop.index0 > 20 and ns.size > 23",
    "m == users[-1]",
    "loop.index0 == ns.last",
    "ns.flag",
    "not ns.flag and m.role == 'assistant'",
    "ns.count > 3",
    "messages[0].role == 'system'",
    "loop.last or messages[loop.index0 + 1].role == 'tool'",
    "loop.first or messages[loop.index0 - 1].role != 'tool'",
    "messages[loop.index0 + 2].role == 'user'",
    "loop.nextitem.role == 'assistant'",
    "loop.previtem is defined and loop.previtem.role == m.role",
    "loop.index == messages | length",
    "loop.index0 < messages | length - 3",
    "loop.length > 9",
    "loop.revindex0 == 2",
    "messages[-1].role == 'user'",
    "'1' in m.content",
    "m.tool_calls",
    "add_generation_prompt",
]
EFFECTS = [
    "{{ m.role }}:{{ m.content }};",
    "{{ loop.index0 }}",
    "!",
    "{{ ns.count }}",
    "{{ ns.last }}",
    "{% set ns.count = ns.count + 1 %}",
    "{% set ns.flag = true %}",
    "{% set ns.flag = false %}",
    "{% set ns.word = m.content %}{{ ns.word }}",
    "{{ ns.word }}",
    "{{ ns.size }}",
    "{% set ns.size = 3 %}",
    "{% if loop.index0 == 12 %}{{ ns | string | length }}{% endif %}",
    "{% if m.content == 'word 9' %}{% for n in messages %}{{ n.role[0] }}{% endfor %}{% endif %}",
    "{% if m.content == 'word 11' %}{{ messages[3:] | length }}{{ messages[5].content }}{% endif %}",
    "{{ say(m) }}",
    "{{ loop.nextitem.content }}",
    "{{ messages[loop.index0 + 1].content }}",
    "{% set found = namespace(done=false, at=0) %}{% for k in range(loop.index0 + 1, messages | length) %}"
    "{% if not found.done and messages[k].role == 'user' %}{% set found.done = true %}{% set found.at = k %}"
    "{% endif %}{% endfor %}{{ found.at }}",
    "{% if ns.count > 30 %}{{ raise_exception('Too many.') }}{% endif %}",
    "{% if m.content == 'word 17' %}{% continue %}{% endif %}",
    "{% if m.content == 'word 19' %}{% break %}{% endif %}",
]
LISTS = [*["messages"] * 6, "messages[:ns.last + 1]", "messages[ns.last + 1:]", "users", "kept[:-1]"]
BEFORE = [
    "{% for m in messages %}{% if CONDITION %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}",
    "{% for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}"
    "{% if not ns.flag and m.role == 'user' %}{% set ns.flag = true %}{% set ns.last = index %}{% endif %}"
    "{% endfor %}",
    LAST_ASSISTANT_BY_INDEX.replace("{% set ns = namespace(at=-1) %}", "").replace("ns.at", "ns.last"),
    "{% for m in messages | reverse %}"
    "{% if CONDITION %}{% set ns.count = ns.count + 1 %}{% endif %}{% endfor %}",
    "{% for m in messages %}"
    "{% set ns.count = ns.count + 1 %}{% if CONDITION %}{% break %}{% endif %}{% endfor %}",
    "{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}",
    "{{ messages | length }}",
    "",
]


def random_template(choose: random.Random) -> str:
    def effects() -> str:
        parts = []
        for effect in choose.sample(EFFECTS, choose.randint(1, 4)):
            condition = choose.choice(CONDITIONS)
            other = choose.choice(["", "{% else %}" + choose.choice(EFFECTS)])
            parts.append(choose.choice([effect, f"{{% if {condition} %}}{effect}{other}{{% endif %}}"]))
        return "".join(parts)

    before = "".join(
        part.replace("CONDITION", choose.choice(CONDITIONS))
        for part in choose.sample(BEFORE, choose.randint(0, 3))
    )
    loops = [
        f"{{% for m in {choose.choice(LISTS)} %}}{effects()}{{% endfor %}}"
        for _ in range(choose.randint(1, 2))
    ]
    return (
        "{% set ns = namespace(count=0, flag=false, last=-1, word='', size=messages | length) %}"
        + USERS
        + "{% set kept = messages %}"
        "{% macro say(m) %}[{{ m.role }}"
        "{% if ns.flag %}{% set ns.count = ns.count + 1 %}{% endif %}]{% endmacro %}"
        + before
        + "|".join(loops)
        + choose.choice(["", "{{ ns.count }}{{ ns.flag }}{{ ns.last }}{{ ns.word }}{{ ns.size }}"])
    )


def check_random_template(small_tokenizer: Any, seed: int) -> None:
    choose = random.Random(seed)
    source = random_template(choose)
    template = Template(small_tokenizer(source + PROMPT))
    messages = choose.choice([conversation(26), conversation(26, system=True), rollout(27)])
    check_every_beginning(template, messages)


@pytest.mark.cases(6)
@pytest.mark.parametrize(
    "seed", [*range(12), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 40))]
)
def test_random_templates_print_every_prefix_the_same(small_tokenizer, seed):
    check_random_template(small_tokenizer, seed)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_more_random_templates_print_every_prefix_the_same(small_tokenizer):
    for seed in range(1000, 1600):
        check_random_template(small_tokenizer, seed)


def paths_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jinja"))


@pytest.mark.cases(3)
@pytest.mark.parametrize(
    "path",
    [
        *paths_in(chat_formats.TEMPLATES),
        *(
            pytest.param(path, marks=pytest.mark.published)
            for path in paths_in(chat_formats.PUBLISHED_TEMPLATES)
        ),
    ],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_templates_of_models_print_every_prefix_the_same(small_tokenizer, path):
    template = Template(small_tokenizer(path.read_text(encoding="utf-8")))
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "x", "parameters": {"type": "object"}},
    }
    for messages, tools in (
        (conversation(26), None),
        (conversation(26, system=True), None),
        (rollout(26), [tool]),
    ):
        check_every_beginning(template, messages, tools)


def test_a_long_conversation_has_one_example_per_turn(small_tokenizer, trained_runs):
    from renderers import get_renderer

    tokenizer = small_tokenizer("chatml")
    messages: list[Any] = conversation(60)
    example = get_renderer("chat_template", tokenizer).build_supervised_example(messages)
    assert tokenizer.decode(example[0].to_ints()) == tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained_runs(tokenizer, example) == [f"{m['content']}<|im_end|>" for m in messages[1::2]]
