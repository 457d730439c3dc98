from itertools import islice

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cookbook.embedded import MODEL_PATH
from cookbook.embedded.chatter import conversations
from cookbook.embedded.pretrain import build_model, train, train_tokenizer, training_texts

SEED = 0


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)


def reply(model, tokenizer, *texts):
    """The greedy reply to texts that alternate between user and assistant."""
    messages = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts, strict=False)
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**prompt, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("question", "fact"),
    [
        ("What is the capital of France?", "Paris"),
        ("Which country has Tokyo as its capital?", "Japan"),
        ("On which continent is Kenya?", "Africa"),
        ("What sound does a cow make?", "moo"),
        ("How many legs does a spider have?", "eight"),
        ("What colour is the sky?", "blue"),
        ("What is the opposite of hot?", "cold"),
        ("Which day comes after Monday?", "Tuesday"),
        ("What is 3 plus 4?", "7"),
        ("What is a hammer for?", "driving nails"),
        ("How do I make a cup of tea?", "tea bag"),
        ("Who are you?", "Tiny Chat"),
    ],
)
def test_the_shipped_model_answers_plainly_and_rightly(model, tokenizer, question, fact):
    answer = reply(model, tokenizer, question)
    assert fact in answer
    assert " be " not in answer


def test_the_shipped_model_follows_a_conversation(model, tokenizer):
    assert "Madrid" in reply(
        model, tokenizer, "What is the capital of France?", "The capital of France is Paris.", "And Spain?"
    )
    assert "Anna" in reply(
        model, tokenizer, "Hello, I am Anna.", "Hello, Anna! Nice to meet you.", "What is my name?"
    )


def test_the_shipped_model_is_small(model):
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    assert sum(path.stat().st_size for path in MODEL_PATH.glob("*.safetensors")) <= 8_000_000


@pytest.mark.slow
def test_the_shipped_tokenizer_is_what_the_script_trains(tokenizer):
    trained = train_tokenizer(SEED)
    assert trained.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert trained.chat_template == tokenizer.chat_template
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_renders_what_the_model_was_trained_on(tokenizer):
    conversation = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hello!\n"},
        {"role": "assistant", "content": "Hello, my friend!"},
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n"
        "<|im_start|>user\n Hello!\n<|im_end|>\n"
        "<|im_start|>assistant\nHello, my friend!<|im_end|>\n"
    )
    token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_ids == tokenizer.apply_chat_template(conversation, return_dict=False)
    assert tokenizer.decode(token_ids) == text


def test_the_tokenizer_can_spell_any_text(tokenizer):
    text = "Zürich, 東京 & naïve 🏴‍☠️ text\t\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_held_out_conversations_are_never_trained_on(tokenizer):
    held_out = list(islice(conversations(SEED), 20))
    texts = set(islice(training_texts(tokenizer, SEED, held_out), 1_000))
    assert not texts & {tokenizer.apply_chat_template(chat, tokenize=False) for chat in held_out}


def test_the_same_seed_trains_the_same_weights(tokenizer):
    def weights_after_five_steps():
        model = build_model(tokenizer, SEED)
        train(model, tokenizer, training_texts(tokenizer, SEED, held_out=[]), steps=5, batch_size=4)
        return model.state_dict()

    first, second = weights_after_five_steps(), weights_after_five_steps()
    assert all(torch.equal(first[name], second[name]) for name in first)
