"""fast_generate writes what transformers' generate writes, and says when it leaves the work to it."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from packed import pack
from tiny import ARCHITECTURES, tiny_model

import llmq
from llmq.runtime import decode_step, fast_generation
from llmq.runtime.fast_generation import fast_generate
from llmq.runtime.packed_linear import PackedLinear
from llmq.runtime.rounded_inputs import round_inputs

GREEDY = {"do_sample": False, "max_new_tokens": 26}


@pytest.fixture(autouse=True)
def short_windows(monkeypatch):
    """Steps that look at 16 places first, so that a text of a few tokens outgrows some of them."""
    monkeypatch.setattr(decode_step, "_SHORTEST", 16)


def endless(model):
    """A model whose texts have no end token."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def prompts(length=9, batch=1, seed=0):
    return torch.randint(5, 99, (batch, length), generator=torch.Generator().manual_seed(seed))


def steps_of(model):
    return list(model.__dict__[fast_generation._KEPT].steps.values())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_greedy_text_is_that_of_transformers(name):
    model = endless(tiny_model(name))
    for seed in (0, 1):
        ids = prompts(seed=seed)
        done = fast_generate(model, ids, **GREEDY)
        assert done.plain is None
        assert torch.equal(done.sequences, model.generate(ids, **GREEDY))


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("bits", [3, 4])
def test_packed_models_write_what_they_write_in_transformers(llama, tmp_path, bits, merge):
    model = endless(llmq.load(pack(llama, tmp_path / "packed", bits=bits), "cpu", merge=merge))
    done = fast_generate(model, prompts(), **GREEDY)
    assert done.plain is None
    assert torch.equal(done.sequences, model.generate(prompts(), **GREEDY))


@pytest.mark.parametrize("scale", [None, torch.tensor([0.5])])
def test_inputs_of_8_bits_are_rounded_in_prepared_steps_too(llama, tmp_path, scale):
    model = endless(llmq.load(pack(llama, tmp_path / "packed"), "cpu"))
    plain = fast_generate(model, prompts(), **GREEDY).sequences
    round_inputs(model)
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.input_scale = scale
    done = fast_generate(model, prompts(), **GREEDY)
    assert done.plain is None
    assert torch.equal(done.sequences, model.generate(prompts(), **GREEDY))
    assert scale is None or not torch.equal(done.sequences, plain)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma3"])
def test_prompts_in_a_batch_with_left_padding_are_continued_like_single_ones(name):
    model = endless(tiny_model(name))
    texts = [prompts(length, seed=length) for length in (4, 9, 7)]
    ids = torch.cat([torch.nn.functional.pad(text, (9 - text.shape[1], 0)) for text in texts])
    mask = torch.stack([torch.arange(9) >= 9 - text.shape[1] for text in texts]).long()
    together = fast_generate(model, ids, mask, **GREEDY)
    assert together.plain is None
    for text, line in zip(texts, together.sequences, strict=True):
        assert torch.equal(fast_generate(model, text, **GREEDY).sequences[0, text.shape[1] :], line[9:])


def test_a_second_prompt_makes_nothing_ready_again(monkeypatch):
    made = []
    prepare = decode_step.DecodeStep._prepare
    monkeypatch.setattr(decode_step.DecodeStep, "_prepare", lambda self, key: made.append(key) or prepare(self, key))
    model = endless(tiny_model("llama-gqa"))
    first = fast_generate(model, prompts(), **GREEDY)
    assert made == [(16, False), (32, False), (48, False)]  # the last one has all the room there is
    assert first.timing.capture_seconds > 0
    second = fast_generate(model, prompts(5, seed=1), **GREEDY)
    assert len(made) == 3
    assert second.timing.capture_seconds < first.timing.capture_seconds  # each is checked once
    assert second.timing.prefill_seconds > 0
    assert second.timing.decode_seconds > 0
    assert (first.timing.capture_steps, second.timing.capture_steps) == (6, 2)  # made and checked; checked
    assert first.timing.decode_rate == (25 - 6) / first.timing.decode_seconds
    assert (second.timing.prompt_tokens, second.timing.new_tokens) == (5, 26)


def test_samples_follow_the_seed_and_the_settings():
    model = endless(tiny_model("llama-gqa"))
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 20, "repetition_penalty": 1.3, "max_new_tokens": 20}
    texts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        texts.append(fast_generate(model, prompts(batch=2), **settings).sequences.tolist())
    torch.manual_seed(0)
    assert texts[0] == texts[1] == model.generate(prompts(batch=2), **settings).tolist()
    assert texts[0] != texts[2]


class _Heard:
    def __init__(self):
        self.parts, self.ended = [], 0

    def put(self, tokens):
        self.parts.append(tokens.flatten().tolist())

    def end(self):
        self.ended += 1


def test_a_text_ends_at_its_end_token_and_is_streamed_as_it_grows():
    model = endless(tiny_model("llama-gqa"))
    text = fast_generate(model, prompts(), **GREEDY).sequences[0].tolist()
    model.generation_config.eos_token_id = text[15]
    heard = _Heard()
    done = fast_generate(model, prompts(), streamer=heard, **GREEDY)
    stopped = text[: text.index(text[15], 9) + 1]
    assert done.sequences[0].tolist() == stopped
    assert heard.parts == [stopped[:9], *([token] for token in stopped[9:])]
    assert heard.ended == 1


def test_sequences_that_end_early_are_filled_up_like_in_transformers():
    model = endless(tiny_model("llama-gqa"))
    ids = prompts(batch=3)
    texts = model.generate(ids, **GREEDY)
    model.generation_config.eos_token_id = [int(texts[0, 12]), int(texts[1, 20])]
    assert torch.equal(fast_generate(model, ids, **GREEDY).sequences, model.generate(ids, **GREEDY))


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"use_cache": False}, {"return_dict_in_generate": True}, {"prompt_lookup_num_tokens": 2}],
)
def test_settings_of_other_loops_are_left_to_transformers_which_is_told(settings):
    model = endless(tiny_model("llama-gqa"))
    done = fast_generate(model, prompts(), **GREEDY, **settings)
    name, value = next(iter(settings.items()))
    assert done.plain == f"{name}={value} needs another loop"
    expected = model.generate(prompts(), **GREEDY, **settings)
    expected = getattr(expected, "sequences", expected)
    assert torch.equal(done.sequences, expected)
    assert done.timing.new_tokens == expected.shape[1] - 9


def test_models_without_a_step_of_fixed_operators_are_left_to_transformers():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = endless(MambaForCausalLM(MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4)))
    done = fast_generate(model, prompts(), do_sample=False, max_new_tokens=5)
    assert done.plain is not None
    assert torch.equal(done.sequences, model.generate(prompts(), do_sample=False, max_new_tokens=5))


class _Looks(torch.nn.Module):
    """Adds what Python makes of each call."""

    def __init__(self, inner, number):
        super().__init__()
        self.inner, self.number = inner, number

    def forward(self, x):
        return self.inner(x) + self.number(x)


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (lambda x: float(x.sum() > 0), "depends on values"),
        (lambda x, calls=[]: calls.append(1) or len(calls) % 3, "differs from the model"),
    ],
)
def test_a_model_whose_steps_differ_runs_through_itself_and_that_is_told(number, why):
    model = endless(tiny_model("llama-gqa"))
    model.model.layers[1].mlp = _Looks(model.model.layers[1].mlp, number)
    done = fast_generate(model, prompts(), **GREEDY)
    assert done.plain is not None
    assert why in done.plain


def test_another_state_of_the_model_gets_steps_of_its_own():
    model = endless(tiny_model("llama-gqa"))
    before = fast_generate(model, prompts(), **GREEDY).sequences
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-2, 2, 64))
    changed = fast_generate(model, prompts(), **GREEDY).sequences
    assert torch.equal(changed, model.generate(prompts(), **GREEDY))
    assert not torch.equal(changed, before)
    model.model.layers[0].mlp.forward = MethodType(lambda self, x: -x, model.model.layers[0].mlp)
    model.model.layers[0].mlp = _Looks(model.model.layers[0].mlp, lambda _: 0.5)
    assert torch.equal(fast_generate(model, prompts(), **GREEDY).sequences, model.generate(prompts(), **GREEDY))


def test_copies_and_pickles_of_a_model_have_no_steps_and_still_write(llama, tmp_path):
    model = endless(llmq.load(pack(llama, tmp_path / "packed"), "cpu"))
    expected = fast_generate(model, prompts(), **GREEDY).sequences
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert steps_of(model)
        assert not other.__dict__[fast_generation._KEPT].steps
        assert torch.equal(fast_generate(other, prompts(), **GREEDY).sequences, expected)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(
        fast_generate(endless(llmq.load(tmp_path / "saved", "cpu")), prompts(), **GREEDY).sequences, expected
    )


def test_few_numbers_of_sequences_keep_their_caches():
    model = endless(tiny_model("llama-gqa"))
    for batch in (1, 2, 3):
        fast_generate(model, prompts(batch=batch), **GREEDY)
    assert list(model.__dict__[fast_generation._KEPT].steps) == [2, 3]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_each_batch_has_the_padding_of_its_own_prompts(name):
    model, ids = endless(tiny_model(name)), prompts(batch=2)
    for padding in ((3, 0), (0, 5), (1, 2), (0, 0), (6, 0)):
        mask = torch.stack([torch.arange(9) >= places for places in padding]).long()
        done = fast_generate(model, ids, mask, **GREEDY)
        assert done.plain is None
        assert torch.equal(done.sequences, model.generate(ids, attention_mask=mask, **GREEDY))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.model.norm.weight.data.copy_(torch.linspace(-2, 2, 64)),  # leaves no trace
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 3.0),
        lambda model: setattr(model.model.layers[1].mlp, "forward", lambda x: -x),
    ],
)
def test_a_change_that_leaves_no_trace_is_seen_in_the_next_text(change):
    model = endless(tiny_model("gemma3"))
    fast_generate(model, prompts(), **GREEDY)
    change(model)
    for _ in range(2):
        done = fast_generate(model, prompts(), **GREEDY)
        assert done.plain is None
        assert torch.equal(done.sequences, model.generate(prompts(), **GREEDY))


def test_processors_may_write_into_the_scores_they_get():
    def forbid(ids, scores):
        scores[:, ::2] = -float("inf")
        return scores

    model = endless(tiny_model("llama-gqa"))
    settings = GREEDY | {"logits_processor": [forbid]}
    done = fast_generate(model, prompts(), **settings)
    assert torch.equal(done.sequences, model.generate(prompts(), **settings))
    assert bool((done.sequences[:, 9:] % 2 == 1).all())


def test_calls_at_the_same_time_write_their_own_texts():
    model = endless(tiny_model("llama-gqa"))
    fast_generate(model, prompts(), **GREEDY)
    expected = [model.generate(prompts(seed=seed), **GREEDY).tolist() for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda seed: fast_generate(model, prompts(seed=seed), **GREEDY), range(4)))
    assert [each.sequences.tolist() for each in done] == expected
    assert fast_generate(model, prompts(), **GREEDY).plain is None


def test_a_call_within_a_call_is_left_to_transformers():
    model, inner = endless(tiny_model("llama-gqa")), []

    class Asks(_Heard):
        def put(self, tokens):
            inner.append(fast_generate(model, prompts(seed=5), do_sample=False, max_new_tokens=3))

    done = fast_generate(model, prompts(), streamer=Asks(), **GREEDY)
    assert {each.plain for each in inner} == {"another call generates with this model"}
    assert torch.equal(done.sequences, model.generate(prompts(), **GREEDY))


def test_autocast_and_padding_on_the_right_are_left_to_transformers():
    model = endless(tiny_model("llama-gqa"))
    fast_generate(model, prompts(), **GREEDY)
    with torch.autocast("cpu", torch.bfloat16):
        done = fast_generate(model, prompts(), **GREEDY)
        assert torch.equal(done.sequences, model.generate(prompts(), **GREEDY))
    assert done.plain == "torch.autocast is on"
    mask = torch.tensor([[1] * 6 + [0] * 3])
    assert fast_generate(model, prompts(), mask, **GREEDY).plain == "there is padding on the right"


@pytest.mark.parametrize(("length", "fast"), [(10, False), (40, True)])
def test_a_text_that_outgrows_the_first_rotations_of_longrope_is_left_to_transformers(length, fast):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope |= {"factor": 16.0, "original_max_position_embeddings": 32}
    sizes = {"max_position_embeddings": 512, "original_max_position_embeddings": 32}
    model = endless(tiny_model("phi3", rope_parameters=rope, **sizes))
    done = fast_generate(model, prompts(length), **GREEDY)
    assert (done.plain is None) == fast
    assert torch.equal(done.sequences, model.generate(prompts(length), **GREEDY))
