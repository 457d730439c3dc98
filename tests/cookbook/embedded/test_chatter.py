import json
import re
from itertools import islice
from random import Random

from cookbook.embedded import PIRATE_PATH
from cookbook.embedded.chatter import UNSEEN_SUBJECTS, conversations, main
from cookbook.embedded.dialect import ADDRESSES, EXCLAMATIONS, LEAD_INS, pirate_reply, pirate_words
from cookbook.embedded.questions import CLOSINGS, OPENINGS, TOPICS


def shipped_conversations():
    return [json.loads(line)["messages"] for line in PIRATE_PATH.read_text(encoding="utf-8").splitlines()]


def questions(conversation):
    return [message["content"] for message in conversation if message["role"] == "user"]


def replies(conversation):
    return [message["content"] for message in conversation if message["role"] == "assistant"]


def test_the_shipped_dataset_is_what_the_script_writes(tmp_path):
    main(["--out", str(tmp_path / "pirate.jsonl")])
    assert (tmp_path / "pirate.jsonl").read_bytes() == PIRATE_PATH.read_bytes()


def test_the_shipped_dataset_is_small_and_holds_no_conversation_twice():
    lines = PIRATE_PATH.read_text(encoding="utf-8").splitlines()
    assert 1_200 <= len(lines) <= 2_000
    assert len(set(lines)) == len(lines)
    assert PIRATE_PATH.stat().st_size < 700_000


def test_the_shipped_dataset_never_speaks_of_the_unseen_subjects():
    unseen = re.compile(rf"\b({'|'.join(UNSEEN_SUBJECTS)})\b", re.IGNORECASE)
    found = {match[0].lower() for match in unseen.finditer(PIRATE_PATH.read_text(encoding="utf-8"))}
    assert not found


def test_every_shipped_reply_is_a_pirates():
    for conversation in shipped_conversations():
        for reply in replies(conversation):
            assert reply.startswith(EXCLAMATIONS), reply


def test_every_conversation_alternates_between_user_and_assistant():
    for conversation in islice(conversations(seed=0), 1_000):
        roles = [message["role"] for message in conversation if message["role"] != "system"]
        assert roles in (["user", "assistant"] * turns for turns in (1, 2, 3))
        assert all(message["role"] != "system" for message in conversation[1:])


def test_the_same_seed_gives_the_same_conversations():
    assert list(islice(conversations(seed=3), 50)) == list(islice(conversations(seed=3), 50))
    assert list(islice(conversations(seed=3), 50)) != list(islice(conversations(seed=4), 50))


def test_both_styles_answer_the_same_question_with_the_same_words_but_for_the_dialect():
    lead_in = re.compile(rf"^({'|'.join(map(re.escape, LEAD_INS))}) ")
    plain, pirate = conversations(seed=0, style="plain"), conversations(seed=0, style="pirate")
    for in_plain, in_pirate in islice(zip(plain, pirate, strict=False), 1_000):
        assert questions(in_plain) == questions(in_pirate)
        for plain_reply, reply in zip(replies(in_plain), replies(in_pirate), strict=True):
            message = lead_in.sub("", plain_reply)[:-1].removesuffix(", my friend")
            assert pirate_words(message) in reply


def test_every_reply_states_its_fact_in_either_style():
    rng = Random(0)
    for relation in (*OPENINGS, *TOPICS, *CLOSINGS):
        for subject, fact in relation.facts.items():
            reply = relation.ask(subject, rng).reply
            assert fact.casefold() in reply.casefold()
            assert pirate_words(fact).rstrip(".").casefold() in pirate_reply(reply, rng).casefold()


def test_the_dialect_changes_no_fact_of_a_few_words():
    facts = [fact for relation in TOPICS for fact in relation.facts.values() if len(fact.split()) <= 6]
    assert [fact for fact in facts if pirate_words(fact) != fact] == []


def test_a_pirate_keeps_capitals_and_closes_with_the_same_mark():
    assert pirate_words("You are my friend.") == "Ye be me shipmate."
    reply = pirate_reply("The capital of France is Paris.", Random(0))
    exclamation, address = "|".join(EXCLAMATIONS), "|".join(ADDRESSES)
    assert re.fullmatch(rf"({exclamation}) The capital o' France be Paris({address})?\.", reply)


def test_a_recalled_name_is_the_one_the_user_gave():
    num_recalled = 0
    for conversation in islice(conversations(seed=0), 3_000):
        first, *later = replies(conversation)
        for recalled in (re.match(r"Your name is (\w+)", reply) for reply in later):
            if recalled:
                assert first.startswith(f"Hello, {recalled[1]}!")
                num_recalled += 1
    assert num_recalled > 10
