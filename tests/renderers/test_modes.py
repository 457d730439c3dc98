"""Prompts and conversations in the mode of each reply: thinking or not, by the template's own variables."""

from __future__ import annotations

from typing import Any

import pytest

from cookbook.errors import RendererError
from cookbook.utils import notes
from renderers import get_renderer
from renderers.jinja.modes import mode_of_all, modes_of, values_of_variables
from renderers.jinja.template import Template

START = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
END = (
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
THOUGHT = "<think>\n{{ m.reasoning_content }}\n</think>\n\n"

# An empty thought is printed in another way than a thought (Nemotron 3).
CLOSED = (
    "{% set enable_thinking = enable_thinking | default(true) %}"
    + START
    + "{% if m.reasoning_content and loop.last %}"
    + THOUGHT
    + "{% else %}<think></think>{% endif %}"
    + END
    + "{{ '<think>\n' if enable_thinking else '<think></think>' }}{% endif %}"
)
# The prompt ends with an empty thought that no conversation shows, and the start tells the mode (Gemma 4).
EMPTY = (
    "{% if mode is defined and mode == 'deep' %}<|text|>{% endif %}"
    + START
    + "{% if m.reasoning_content %}"
    + THOUGHT
    + "{% endif %}"
    + END
    + "{% if not (mode is defined and mode == 'deep') %}<think>\n</think>\n{% endif %}{% endif %}"
)
# The prompt always opens a thought (MiniMax M2).
OPENED = START + "{% if m.reasoning_content %}" + THOUGHT + "{% endif %}" + END + "<think>\n{% endif %}"
# The thought is printed only if two variables are set (EXAONE 4).
TWO = (
    "{% if not skip is defined %}{% set skip = true %}{% endif %}"
    + START
    + "{% if m.reasoning_content and not skip %}"
    + THOUGHT
    + "{% else %}<think>\n\n</think>\n\n{% endif %}"
    + END
    + "{{ '<think>\n' if think is defined and think else '<think>\n\n</think>\n\n' }}{% endif %}"
)
# The thought is opened and printed only if three variables are set, and two of them change nothing alone.
THREE = (
    "{% set on = thinking is defined and thinking and keep_reasoning is defined and keep_reasoning "
    "and effort is defined and effort in ['high', 'max'] %}"
    + START
    + "{% if m.reasoning_content and on %}"
    + THOUGHT
    + "{% else %}<think></think>{% endif %}"
    + END
    + "{{ '<think>\n' if on else '<think></think>' }}{% endif %}"
)
# An empty reply is not printed (Seed-OSS).
NO_EMPTY = (
    "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.content %}{{ '\n' ~ m.content }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# An empty reply is not printed, and the prompt opens a thought (Nemotron Nano 2).
NO_EMPTY_OPENED = NO_EMPTY.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace(
    "m.content }}", "('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') ~ m.content }}"
)
# Every reply has a thought, which the prompt opens in one mode, and opens and closes in the other (Qwen3.5).
BOTH = (
    START
    + THOUGHT
    + END
    + "{{ '<think>\n' if enable_thinking is defined and enable_thinking else '<think>\n\n</think>\n\n' }}"
    + "{% endif %}"
)

# The system message is in the prompt only, in front of the last user's message (Mistral 7B v0.3, Nemo).
MOVED = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}<|im_start|>"
    "{% if m.role == 'user' and loop.last and system is defined %}"
    "{{ system }}\n\n{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
# The prompt has an empty thought, and no conversation has a thought (Gemma 4 by other trainers).
NO_THOUGHT = START + END + "{{ '<|header|>thought\n<|text|>' if not deep else '' }}{% endif %}"
# The prompt has an empty thought, of which the conversation prints the end (DeepSeek V3.2 behind results).
HALF_THOUGHT = START + "</think>" + END + "<think></think>{% endif %}"
# One value of a variable closes the thought in the prompt, and no conversation shows it (Cohere's North).
SWITCHED = (
    "{% set reasoning = reasoning | default(true) %}"
    + START
    + "{% if m.reasoning_content %}<|header|>{{ m.reasoning_content }}<|text|>{% endif %}<bos>"
    + END
    + "<|header|>{% if not reasoning %}<|text|>{% endif %}{% endif %}"
)
# The prompt begins the thought with words (Apriel).
WORDS = (
    START
    + "{% if m.reasoning_content %}{{ m.reasoning_content }}\n[ANSWER]\n{% endif %}"
    + END
    + "My thoughts:\n{% endif %}"
)
# The prompt opens a thought, and a conversation has only what follows one (DeepSeek R1's distilled models).
STRIPPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# The prompt opens a thought, and a last reply is printed as if it were one (Nemotron Nano 2).
AS_THOUGHT = (
    START
    + "{% if loop.last %}<think>\n{% endif %}{% set after = m.content.split('</think>')[-1] %}"
    + END
    + "<think>\n{% endif %}"
)
# A tool's result is a part of the reply's turn, and the prompt opens another one (Apertus).
CONTINUED = (
    "{% set ns = namespace(open=false) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if ns.open %}<|im_end|>{% endif %}<|im_start|>user\n{{ m.content }}<|eot|>"
    "{% set ns.open = false %}{% else %}{% if not ns.open %}<|header|>{% set ns.open = true %}{% endif %}"
    "{{ '[' ~ m.content ~ ']' if m.role == 'tool' else m.content }}{% endif %}{% endfor %}"
    "{% if ns.open and not add_generation_prompt %}<|im_end|>{% endif %}"
    "{% if add_generation_prompt %}<|header|>{% endif %}"
)
# The end of a tool's result is printed only if it is the last message (Bielik, with a system message).
LOST_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.role != 'tool' or loop.last %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content: str) -> Any:
    return {"role": "user", "content": content}


def reply(content: str, thought: str = "") -> Any:
    return {"role": "assistant", "content": content, **({"reasoning_content": thought} if thought else {})}


def check(tokenizer: Any, trained_runs: Any, chat: list[Any], said: str, variables: dict[str, Any]) -> str:
    """Compares the last reply with the template's own prompt; returns the text of the example."""
    renderer = get_renderer("chat_template", tokenizer)
    example = renderer.build_supervised_examples(chat)[-1]
    assert trained_runs(tokenizer, example)[-1] == said
    assert renderer.template_kwargs_of(chat) == variables
    prompt = renderer.with_template_kwargs(variables).build_generation_prompt(chat[:-1]).to_ints()
    theirs = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True, **variables)
    assert tokenizer.decode(prompt) == theirs
    assert example[0].to_ints()[: len(prompt)] == prompt
    text = tokenizer.decode(example[0].to_ints())
    assert text.startswith(theirs + said)
    assert renderer.with_template_kwargs(variables).parse_response(
        [
            token
            for token, weight in zip(
                example[0].to_ints()[len(prompt) :], example[1][len(prompt) :], strict=True
            )
            if weight
        ]
    )[1]
    return text


@pytest.mark.parametrize(
    ("template", "thought", "said", "variables"),
    [
        (CLOSED, "", "b<|im_end|>", {"enable_thinking": False}),
        (CLOSED, "hm", "hm\n</think>\n\nb<|im_end|>", {}),
        (EMPTY, "hm", "<think>\nhm\n</think>\n\nb<|im_end|>", {"mode": "deep"}),
        (OPENED, "hm", "hm\n</think>\n\nb<|im_end|>", {}),
        (TWO, "", "b<|im_end|>", {}),
        (TWO, "hm", "hm\n</think>\n\nb<|im_end|>", {"skip": False, "think": True}),
        (THREE, "", "b<|im_end|>", {}),
        (
            THREE,
            "hm",
            "hm\n</think>\n\nb<|im_end|>",
            {"thinking": True, "keep_reasoning": True, "effort": "high"},
        ),
    ],
)
def test_prompt_and_conversation_are_of_one_mode(
    small_tokenizer, trained_runs, template, thought, said, variables
):
    tokenizer = small_tokenizer(template)
    chat = [user("a"), reply("b", thought)]
    text = check(tokenizer, trained_runs, chat, said, variables)
    assert text == tokenizer.apply_chat_template(chat, tokenize=False, **variables)


def test_an_empty_thought_of_the_prompt_stands_before_the_reply_and_is_not_trained(
    small_tokenizer, trained_runs
):
    tokenizer = small_tokenizer(EMPTY)
    with notes.collected() as found:
        check(tokenizer, trained_runs, [user("a"), reply("b"), user("c"), reply("d")], "d<|im_end|>", {})
    assert any("2 turns followed an empty thought" in line for line in notes.lines(found))


def test_a_thought_that_every_prompt_opens_is_closed_by_a_reply_without_one(small_tokenizer, trained_runs):
    chat = [user("a"), reply("b", "hm"), user("c"), reply("d")]
    with notes.collected() as found:
        check(small_tokenizer(OPENED), trained_runs, chat, "\n</think>\n\nd<|im_end|>", {})
    assert any("1 turn closed a thought that the prompt opens" in line for line in notes.lines(found))


def test_an_empty_reply_that_is_not_printed_ends_its_turn(small_tokenizer, trained_runs):
    check(small_tokenizer(NO_EMPTY), trained_runs, [user("a"), reply("")], "<|im_end|>", {})


def test_an_empty_reply_that_is_not_printed_closes_a_thought_that_the_prompt_opens(
    small_tokenizer, trained_runs
):
    for chat in ([user("a"), reply("")], [user("a"), reply("b"), user("c"), reply("")]):
        check(small_tokenizer(NO_EMPTY_OPENED), trained_runs, chat, "\n</think>\n\n<|im_end|>", {})


def test_each_turn_of_a_mixed_conversation_is_in_its_own_mode(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(CLOSED)
    renderer = get_renderer("chat_template", tokenizer)
    chat = [user("a"), reply("b"), user("c"), reply("d", "hm"), user("e"), reply("f")]
    with notes.collected() as found:
        examples = renderer.build_supervised_examples(chat)
    runs = [run for example in examples for run in trained_runs(tokenizer, example)]
    assert runs == ["b<|im_end|>", "hm\n</think>\n\nd<|im_end|>", "f<|im_end|>"]
    assert [renderer.template_kwargs_of(chat[:end]) for end in (2, 4, 6)] == [
        {"enable_thinking": False},
        {},
        {"enable_thinking": False},
    ]
    (note,) = (line for line in notes.lines(found) if "Prompts of trained replies" in line)
    assert note.endswith("""to choose): {"enable_thinking": false} (2 turns), usual (1 turn)""")
    assert mode_of_all(found) is None


def test_every_turn_of_a_mixed_conversation_follows_the_tokens_of_the_prompt_that_it_is_sampled_with(
    small_tokenizer, trained_runs
):
    tokenizer = small_tokenizer(BOTH)
    assert tokenizer.tokenize("\n\n") != tokenizer.tokenize("\n") * 2  # a border between them shows
    renderer = get_renderer("chat_template", tokenizer)
    thoughts = ["", "hm", ""]
    chat = [message for thought in thoughts for message in (user("a"), reply("b", thought))]
    examples = renderer.build_supervised_examples(chat)
    assert [run for example in examples for run in trained_runs(tokenizer, example)] == [
        "b<|im_end|>",
        "hm\n</think>\n\nb<|im_end|>",
        "b<|im_end|>",
    ]
    for turn in range(3):
        tokens, weights = examples[min(turn, len(examples) - 1)]
        before = chat[: 2 * turn + 1]
        sampled = renderer.with_template_kwargs(renderer.template_kwargs_of(chat[: 2 * turn + 2]))
        prompt = sampled.build_generation_prompt(before).to_ints()
        assert tokens.to_ints()[: len(prompt)] == prompt
        assert not weights[: len(prompt)].any()
        assert weights[len(prompt)]


def test_the_note_gives_a_setting_with_which_plain_prompts_are_those_of_training(
    small_tokenizer, trained_runs
):
    tokenizer = small_tokenizer(CLOSED)
    chat = [user("a"), reply("b")]
    renderer = get_renderer("chat_template", tokenizer, template_kwargs={"own": 1})
    with notes.collected() as found:
        (example,) = renderer.build_supervised_examples(chat)
    (line,) = notes.lines(found)
    assert line.endswith("""to choose): {"enable_thinking": false} (1 turn)""")
    setting = mode_of_all(found)
    assert setting == {"enable_thinking": False}
    sampled = get_renderer("chat_template", tokenizer, template_kwargs=setting)
    prompt = sampled.build_generation_prompt(chat[:1]).to_ints()
    first = int(example[1].argmax())
    assert prompt == example[0].to_ints()[:first]
    assert trained_runs(tokenizer, sampled.build_supervised_examples(chat)[0]) == ["b<|im_end|>"]


def test_variables_that_the_user_gives_are_kept(small_tokenizer, trained_runs):
    tokenizer = small_tokenizer(CLOSED)
    renderer = get_renderer("chat_template", tokenizer)
    thinking = renderer.with_template_kwargs({"enable_thinking": True})
    chat = [user("a"), reply("b")]
    (example,) = thinking.build_supervised_examples(chat)
    assert trained_runs(tokenizer, example) == ["\n</think>\n\nb<|im_end|>"]
    assert thinking.template_kwargs_of(chat) == {}
    thoughtless = renderer.with_template_kwargs({"enable_thinking": False})
    with pytest.raises(RendererError, match="sampled from other prompts"):
        thoughtless.build_supervised_examples([user("a"), reply("b", "hm")])


def test_a_system_message_that_only_prompts_have_is_in_front_of_the_reply(small_tokenizer, trained_runs):
    chat = [{"role": "system", "content": "s"}, user("a"), reply("b"), user("c"), reply("d")]
    with notes.collected() as found:
        text = check(small_tokenizer(MOVED), trained_runs, chat, "d<|im_end|>", {})
    assert text == "".join(f"<|im_start|>{said}<|im_end|>" for said in ("a", "b", "s\n\nc", "d"))
    assert any("2 turns followed messages that the template prints" in line for line in notes.lines(found))


def test_an_empty_thought_of_the_prompt_is_found_where_no_conversation_has_a_thought(
    small_tokenizer, trained_runs
):
    for template in (NO_THOUGHT, HALF_THOUGHT):
        check(small_tokenizer(template), trained_runs, [user("a"), reply("b")], "b<|im_end|>", {})


@pytest.mark.parametrize(
    ("thought", "said", "variables"),
    [("", "<bos>d<|im_end|>", {"reasoning": False}), ("hm", "hm<|text|><bos>d<|im_end|>", {})],
)
def test_a_prompt_whose_thought_a_variable_closes_is_that_of_a_reply_without_one(
    small_tokenizer, trained_runs, thought, said, variables
):
    chat = [user("a"), reply("b", "x"), user("c"), reply("d", thought)]
    check(small_tokenizer(SWITCHED), trained_runs, chat, said, variables)


@pytest.mark.parametrize("thought", ["", "hm"])
def test_a_thought_that_the_prompt_begins_with_words_is_continued(small_tokenizer, trained_runs, thought):
    chat = [user("a"), reply("b", thought)]
    check(small_tokenizer(WORDS), trained_runs, chat, f"{thought}\n[ANSWER]\nb<|im_end|>", {})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (reply("<think>\nhm\n</think>\n\nd"), "hm\n</think>\n\nd<|im_end|>"),
        (reply("d", "hm"), "hm\n</think>\n\nd<|im_end|>"),
        (reply("d"), "\n</think>\n\nd<|im_end|>"),
    ],
)
def test_thinking_that_the_template_removes_is_trained_behind_a_prompt_that_opens_it(
    small_tokenizer, trained_runs, answer, said
):
    tokenizer = small_tokenizer(STRIPPED)
    check(tokenizer, trained_runs, [user("a"), reply("b", "x"), user("c"), answer], said, {})
    sampled = tokenizer(said, add_special_tokens=False).input_ids
    parsed, ended = get_renderer("chat_template", tokenizer).parse_response(sampled)
    assert ended
    assert parsed == reply("d", "hm" if "hm" in said else "")


def test_thinking_is_trained_where_the_template_prints_only_its_end(small_tokenizer, trained_runs):
    """DeepSeek V3.1's template prints `</think>` before each reply, also behind a prompt that opens it."""
    template = (
        START
        + "</think>{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}"
        + END.replace("{{ m.content }}", "")
        + "{{ '<think>' if thinking is defined and thinking else '</think>' }}{% endif %}"
    )
    tokenizer = small_tokenizer(template)
    for answer, said, variables in (
        (reply("d"), "d<|im_end|>", {}),
        (reply("<think>hm</think>d"), "hm</think>d<|im_end|>", {"thinking": True}),
        (reply("d", "hm"), "hm\n</think>\n\nd<|im_end|>", {"thinking": True}),
    ):
        check(tokenizer, trained_runs, [user("a"), reply("b"), user("c"), answer], said, variables)


@pytest.mark.parametrize("tags", ["<thought>", "[REASON]"])
def test_a_thought_between_other_tags_than_usual_is_closed_by_the_reply(small_tokenizer, trained_runs, tags):
    opening, closing = tags, f"{tags[0]}/{tags[1:]}"
    tokenizer = small_tokenizer(STRIPPED.replace("</think>", closing).replace("<think>", opening))
    for answer, said in (
        (reply(f"{opening}\nhm\n{closing}\n\nd"), f"hm\n{closing}\n\nd<|im_end|>"),
        (reply("d", "hm"), f"hm\n{closing}\n\nd<|im_end|>"),
        (reply("d"), f"\n{closing}\n\nd<|im_end|>"),
        (reply(""), f"\n{closing}\n\n<|im_end|>"),
    ):
        check(tokenizer, trained_runs, [user("a"), reply("b"), user("c"), answer], said, {})


def test_a_reply_follows_its_prompt_where_the_conversation_loses_the_end_of_a_result(
    small_tokenizer, trained_runs
):
    chat = [user("a"), reply("b"), {"role": "tool", "content": "r"}, reply("d")]
    text = check(small_tokenizer(LOST_END), trained_runs, chat, "d<|im_end|>", {})
    assert text.endswith("tool\nr<|im_end|>\n<|im_start|>assistant\nd<|im_end|>\n")


def test_a_reply_that_the_template_prints_as_a_thought_closes_it_first(small_tokenizer, trained_runs):
    chat = [user("a"), reply("b"), user("c"), reply("d")]
    check(small_tokenizer(AS_THOUGHT), trained_runs, chat, "\n</think>\n\nd<|im_end|>", {})


def test_a_reply_that_continues_a_turn_follows_the_header_of_its_prompt(small_tokenizer, trained_runs):
    chat = [user("a"), reply("b"), {"role": "tool", "content": "r"}, reply("d")]
    text = check(small_tokenizer(CONTINUED), trained_runs, chat, "d<|im_end|>", {})
    assert text == "<|im_start|>user\na<|eot|><|header|>b[r]<|header|>d<|im_end|>"


def test_a_thought_that_every_prompt_opens_is_closed_under_a_template_that_prints_none(
    small_tokenizer, trained_runs
):
    tokenizer = small_tokenizer(START + END + "<think>\n{% endif %}")
    for answer, said in (
        (reply("b"), "\n</think>\n\nb<|im_end|>"),
        (reply(""), "\n</think>\n\n<|im_end|>"),
        (reply("b", "hm"), "hm\n</think>\n\nb<|im_end|>"),
    ):
        check(tokenizer, trained_runs, [user("a"), answer], said, {})


def test_the_values_of_a_variable_are_those_it_is_compared_with(small_tokenizer):
    template = (
        "{% set effort = effort | default('mid') %}{% set chosen = effort %}{{ user_name }}{% set x = 1 %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
        "{{ '1' if chosen == 'low' }}{{ '2' if effort in ['max'] }}"
        "{{ '3' if quick }}{{ '4' if x == 7 }}{{ today }}"
        "{% set ns = namespace(n=budget if budget is defined else -1) %}"
        "{{ '5' if (ns.n | default(1) | int) == 0 }}"
    )
    made = Template(small_tokenizer(template))
    assert values_of_variables(made) == {
        "budget": [0],
        "effort": ["low", "max"],
        "quick": [True, False],
        "today": [True, False],
        "user_name": [True, False],
    }
    settings = [mode.chosen for mode in modes_of(made)]
    assert {"effort": "low"} in settings
    assert {"quick": True} in settings
    assert not any("user_name" in setting or "today" in setting for setting in settings)


# -- thinking in a reply's text, and messages in other forms -----------------------------------------


@pytest.mark.parametrize("special", [True, False])
def test_thinking_tags_are_those_of_the_reply_that_spells_them(small_tokenizer, trained_runs, special):
    template = START + END + "{# <think> </think> #}{% endif %}"
    tokenizer = small_tokenizer(template, ("<think>", "</think>") if special else ())
    if not special:
        tokenizer.add_tokens(["<think>", "</think>"])
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    renderer = get_renderer("chat_template", tokenizer)
    said = "<think>\nhm\n</think>\n\nb < c"
    (example,) = renderer.build_supervised_examples([user("a"), reply(said)])
    assert trained_runs(tokenizer, example) == [f"{said}<|im_end|>"]
    assert [token for token in example[0].to_ints() if token in tags] == tags
    if special:
        asked = renderer.build_generation_prompt([user(said)]).to_ints()
        assert not set(tags) & set(asked)


# The template keeps the text of a reply, and only the thinking of a last one (Nemotron Super 1.5, Kimi-VL).
INLINE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip() }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("tags", ["<think>", "[THINK]", "\u25c1think\u25b7", "<own:thought>", "<reasoning>"])
@pytest.mark.parametrize("special", [False, True])
def test_thinking_is_written_between_the_tags_that_the_template_knows(
    small_tokenizer, trained_runs, tags, special
):
    closing = f"{tags[0]}/{tags[1:]}"
    tokenizer = small_tokenizer(INLINE.replace("</think>", closing), (tags, closing) if special else ())
    said = f"{tags}\nhm\n{closing}\n\nd"
    for answer in (reply(said), reply("d", "hm")):
        chat = [user("a"), reply("b", "ah"), user("c"), answer]
        check(tokenizer, trained_runs, chat, f"{said}<|im_end|>", {})
    renderer = get_renderer("chat_template", tokenizer)
    with notes.collected() as found:
        first, last = renderer.build_supervised_examples(chat)
    assert trained_runs(tokenizer, first) == [f"{tags}\nah\n{closing}\n\nb<|im_end|>"]
    plain = [user("a"), reply("b"), user("c"), reply(said)]
    assert tokenizer.decode(last[0].to_ints()) == tokenizer.apply_chat_template(plain, tokenize=False)
    assert any("got thinking between" in line for line in notes.lines(found))
    sampled = tokenizer(f"{said}<|im_end|>", add_special_tokens=False).input_ids
    assert renderer.parse_response(sampled) == (reply("d", "hm"), True)
    stream = renderer.parse_stream()
    deltas = [delta for token in sampled for delta in stream.feed([token])]
    assert "".join(delta.text for delta in deltas if delta.field == "reasoning_content") == "hm"


@pytest.mark.parametrize("switch", ["on", "off"])
def test_thinking_that_the_template_always_removes_is_trained_with_both_tags(
    small_tokenizer, trained_runs, switch
):
    """Llama-Nemotron Super: the system message switches it on, and no prompt opens it."""
    template = INLINE.replace("m.content if loop.last else ", "")
    system = {"role": "system", "content": f"detailed thinking {switch}"}
    thought = "<think>\nhm\n</think>\n\n" if switch == "on" else ""
    for answer in [reply(f"{thought}d"), *([reply("d", "hm")] if thought else [])]:
        chat = [system, user("a"), reply("b"), user("c"), answer]
        check(small_tokenizer(template), trained_runs, chat, f"{thought}d<|im_end|>", {})


@pytest.mark.parametrize("known", [False, True])
def test_thinking_is_written_between_tags_of_the_tokenizer_or_refused(small_tokenizer, trained_runs, known):
    template = START + END + "{% endif %}"
    tokenizer = small_tokenizer(template, ("<think>", "</think>") if known else ())
    chat = [user("a"), reply("b", "hm")]
    if known:
        check(tokenizer, trained_runs, chat, "<think>\nhm\n</think>\n\nb<|im_end|>", {})
    else:
        with pytest.raises(RendererError, match="does not print the `reasoning_content`"):
            get_renderer("chat_template", tokenizer).build_supervised_examples(chat)


PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'thinking' %}<|text|>{{ part.thinking }}<|eot|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_content_and_thinking_are_given_as_parts_to_a_template_that_prints_only_parts(
    small_tokenizer, trained_runs
):
    tokenizer = small_tokenizer(PARTS)
    renderer = get_renderer("chat_template", tokenizer)
    (example,) = renderer.build_supervised_examples([user("a"), reply("b", "hm"), user("c"), reply("d")])
    assert trained_runs(tokenizer, example) == ["<|text|>hm<|eot|>b<|im_end|>", "d<|im_end|>"]
    text = lambda content: [{"type": "text", "text": content}]  # noqa: E731
    spelled = [
        {"role": "user", "content": text("a")},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}, *text("b")]},
        {"role": "user", "content": text("c")},
        {"role": "assistant", "content": text("d")},
    ]
    assert tokenizer.decode(example[0].to_ints()) == tokenizer.apply_chat_template(spelled, tokenize=False)


def test_calls_that_are_printed_by_their_ids_get_ids_with_their_names(small_tokenizer):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}{{ m.tool_call_id }}: "
        "{% endif %}{{ m.content }}{% for call in m.tool_calls or [] %}({{ call.id }} "
        "{{ call.function.arguments | tojson }}){% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = small_tokenizer(template)
    renderer = get_renderer("chat_template", tokenizer)

    def chat(first: str, second: str) -> list[Any]:
        calls = [
            {"id": i, "type": "function", "function": {"name": "get", "arguments": {}}}
            for i in (first, second)
        ]
        results = [{"role": "tool", "tool_call_id": i, "content": "r"} for i in (first, second)]
        return [user("a"), {**reply(""), "tool_calls": calls}, *results, reply("b")]

    named = chat("functions.get:0", "functions.get:1")
    theirs = tokenizer.apply_chat_template(named, tokenize=False)
    for given in (named, chat("call_x", "call_y")):
        examples = renderer.build_supervised_examples(given)
        assert tokenizer.decode(examples[-1][0].to_ints()) == theirs


@pytest.mark.parametrize(
    ("opening", "closing"),
    [
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("[thought_start]", "[thought_end]"),
        ("<|eot|>", "<|text|>"),
    ],
)
def test_a_thought_between_tags_of_any_spelling_is_parsed(small_tokenizer, trained_runs, opening, closing):
    """The last are control tokens whose names say nothing of thinking."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.thinking %}"
        f"{opening}{{{{ m.thinking }}}}{closing}{{% endif %}}{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = small_tokenizer(template)
    for answer, said in (
        (reply("d", "hm"), f"{opening}hm{closing}d<|im_end|>"),
        (reply("d"), "d<|im_end|>"),
    ):
        check(tokenizer, trained_runs, [user("a"), answer], said, {})
        tokens = tokenizer(said, add_special_tokens=False).input_ids
        assert get_renderer("chat_template", tokenizer).parse_response(tokens) == (answer, True)


def test_thinking_is_written_into_the_text_in_the_mode_whose_prompt_opens_it(small_tokenizer, trained_runs):
    """Cogito's template has no key for it, and opens `<think>` with `enable_thinking` alone."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}{% endif %}"
    )
    tokenizer = small_tokenizer(template)
    chat = [user("a"), reply("d", "hm")]
    check(tokenizer, trained_runs, chat, "hm\n</think>\n\nd<|im_end|>", {"enable_thinking": True})
    check(tokenizer, trained_runs, [user("a"), reply("d")], "d<|im_end|>", {})


def test_a_prompt_may_differ_from_the_conversation_in_white_space(small_tokenizer, trained_runs):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
        "{% if loop.last and add_generation_prompt %}<|im_start|>assistant{% endif %}{{ '\n' }}{% endfor %}"
    )
    tokenizer = small_tokenizer(template)
    renderer = get_renderer("chat_template", tokenizer)
    (example,) = renderer.build_supervised_examples([user("a"), reply("b")])
    prompt = renderer.build_generation_prompt([user("a")]).to_ints()
    assert tokenizer.decode(prompt) == "<|im_start|>user\na<|im_end|><|im_start|>assistant\n"
    assert example[0].to_ints()[: len(prompt)] == prompt
    assert trained_runs(tokenizer, example) == ["b<|im_end|>"]


def test_tools_are_taken_by_a_template_that_prints_only_their_names(small_tokenizer):
    names = "{% for t in tools or [] %}{{ t.function.name }}\n{% endfor %}"
    assert get_renderer("chat_template", small_tokenizer(names + OPENED)).takes_tools
    assert not get_renderer("chat_template", small_tokenizer(OPENED)).takes_tools
