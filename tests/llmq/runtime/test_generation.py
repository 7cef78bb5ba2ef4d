"""llmq.generate: prompts, chat templates, temperatures."""

import pytest

from llmq.core.errors import RequestError
from llmq.runtime.generation import GenerateConfig, encode_prompt, generate
from llmq.runtime.load import load_any


def written(llama, capsys, **options):
    """What is printed for a prompt, and the number of new tokens."""
    done = generate(GenerateConfig(str(llama), "once upon", max_new_tokens=6, device="cpu", **options))
    assert done.plain is None
    return capsys.readouterr().out, done.timing.new_tokens


def test_the_likeliest_tokens_follow_the_prompt(llama, capsys):
    model, tokenizer = load_any(str(llama), "cpu")
    prompt = tokenizer("once upon", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0]
    text, tokens = written(llama, capsys, chat=False)
    assert tokens == len(expected) - prompt["input_ids"].shape[1]
    assert text.strip() == tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_at_a_temperature_the_seed_decides(llama, capsys):
    texts = [written(llama, capsys, temperature=5.0, seed=seed, chat=False)[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_prompt_is_put_into_the_chat_template_on_request(llama):
    _, tokenizer = load_any(str(llama), "cpu")
    plain = tokenizer("a word")["input_ids"]
    assert encode_prompt(tokenizer, "a word", True)["input_ids"].tolist() == [plain]  # there is no template
    tokenizer.chat_template = "{% for m in messages %}{{ 'the ' + m['content'] + ' is' }}{% endfor %}"
    expected = tokenizer("the a word is", add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, "a word", True)["input_ids"].tolist() == [expected]
    assert encode_prompt(tokenizer, "a word", False)["input_ids"].tolist() == [plain]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"prompt": " \n"}, "--prompt is empty"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1; got 0"),
        ({"temperature": -0.5}, "--temperature must be at least 0, and a number; got -0.5"),
        ({"temperature": float("nan")}, "--temperature must be at least 0, and a number; got nan"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_its_value(options, said):
    with pytest.raises(RequestError, match=said):
        GenerateConfig(**({"model": "demo", "prompt": "a word"} | options))


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('a system prompt is required') }}", {"tool_use": "x", "rag": "y"}],
    ids=["refuses", "several without a default"],
)
def test_a_template_that_cannot_be_used_is_told_with_the_way_out(template, llama):
    _, tokenizer = load_any(str(llama), "cpu")
    tokenizer.chat_template = template
    with pytest.raises(RequestError, match=r"(?s)chat template does not take .*--no-chat continues the bare prompt"):
        encode_prompt(tokenizer, "hi", True)
    assert encode_prompt(tokenizer, "hi", False)["input_ids"].shape == (1, 2)


@pytest.mark.parametrize("temperature", [-1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(RequestError, match="--temperature must be at least 0, and a number"):
        GenerateConfig("m", "hi", temperature=temperature)
