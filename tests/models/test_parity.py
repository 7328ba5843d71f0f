"""Whole models against transformers in fp32: padded batches there, packed ones here."""

import copy
import dataclasses

import pytest
import torch
import transformers

from bivec.engine.packaged import find_smollm2
from bivec.models import CheckpointError, DecoderConfig, Mistral, PackedBatch, load_pretrained
from bivec.models.families import FAMILIES, MODEL_CLASSES

VOCAB, POSITIONS = 96, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,  # at the default 0.02 attention is flat, and a wrong mask would hardly show
}
TOKENS = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])  # defaults are outside of the vocabulary
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 4,
        "beta_slow": 1,
    },
}
MODELS = {
    **{f"llama-{kind}": ("llama", {"rope_parameters": rope}) for kind, rope in ROPE.items()},
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-gqa": ("llama", {"num_key_value_heads": 6}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "mistral-window-of-one": ("mistral", {"sliding_window": 1}),
    "mistral-window-yarn-tied": (
        "mistral",
        {"sliding_window": 10, "rope_parameters": ROPE["yarn"], "tie_word_embeddings": True},
    ),
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7}
# the embedding is multiplied by the root of the width: smaller weights keep the states as large as LLaMA's
GEMMA = {"head_dim": 16, "initializer_range": 0.1}
GEMMA2 = {**GEMMA, "sliding_window": 7, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 5.0}
GEMMA3 = {**GEMMA, "sliding_window": 7, "query_pre_attn_scalar": 20}
NESTED_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
}
MODELS |= {
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": ROPE["yarn"]}),
    "qwen2-window-from-layer-1": ("qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-biases-window-in-one-layer": (
        "qwen3",
        {
            **WINDOW,
            "head_dim": 16,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3-window-without-rope": ("smollm3", {**WINDOW, "no_rope_layer_interval": 2, "attention_bias": True}),
    "gemma": ("gemma", GEMMA),
    "gemma-one-kv-head-biases": ("gemma", {**GEMMA, "num_key_value_heads": 1, "attention_bias": True}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-caps-nothing": ("gemma2", {**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3_text", {**GEMMA3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "gemma3-two-rotations": ("gemma3_text", {**GEMMA3, "sliding_window_pattern": 2, "rope_parameters": NESTED_ROPE}),
}
OTHERS = sorted(FAMILIES.keys() - {family for family, _ in MODELS.values()})  # registered, with no row above
MODELS |= {family: (family, {"head_dim": 16}) for family in OTHERS}
LENGTHS = [5, 40, 1, 23, 64]
TOLERANCE, PACKING_TOLERANCE = 1e-4, 1e-5
both_directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def sequences(lengths=LENGTHS, vocab=VOCAB):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def pair(name):
    """The model of transformers, randomly initialised with its norms and biases too, and ours with its weights."""
    family, settings = MODELS[name]
    settings = copy.deepcopy({**SIZES, **settings, **TOKENS})  # transformers adds to the dicts
    if family == "gemma2":
        settings["attn_implementation"] = "eager"  # before transformers 5.21 "sdpa" leaves the cap out
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.AutoConfig.for_model(family, **settings)
        theirs = getattr(transformers, FAMILIES[family].causal_lm)(config).eval()
        for parameter in theirs.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    ours = MODEL_CLASSES[family](DecoderConfig.from_dict(theirs.config.to_dict(), name)).eval()
    ours.load_state_dict(theirs.model.state_dict())
    return theirs, ours


def padded_states(model, texts, causal):
    """All hidden states of a transformers trunk on one right-padded batch; every text's rows, packed: [L+1, T, D]."""
    model.config.is_causal = causal
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    return torch.stack([state[mask.bool()] for state in out.hidden_states])


def packed_states(model, texts, causal, **options):
    with torch.no_grad():
        last, states = model(PackedBatch.from_sequences(texts), causal=causal, output_hidden_states=True, **options)
    assert torch.equal(last, states[-1])
    return torch.stack(states)


@both_directions
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_are_those_of_transformers(name, causal):
    theirs, ours = pair(name)
    texts = sequences()
    expected = padded_states(theirs.model, texts, causal)
    states = packed_states(ours, texts, causal)
    assert states.shape == expected.shape == (4, sum(LENGTHS), 48)
    assert (states - expected).abs().max() <= TOLERANCE
    # the test would see a wrong mask: the other direction is far away
    other = packed_states(ours, texts, not causal)
    if name != "mistral-window-of-one":
        assert (other[-1] - expected[-1]).abs().max() > 100 * TOLERANCE


@both_directions
@pytest.mark.parametrize(
    "name",
    [
        "llama-biases",
        "mistral-window",
        "qwen2-window-from-layer-1",
        "qwen3",
        "smollm3-window-without-rope",
        "gemma",
        "gemma2",
        "gemma3-two-rotations",
        *OTHERS,
    ],
)
def test_gradients_are_those_of_transformers(name, causal):
    theirs, ours = pair(name)
    texts = sequences([9, 1, 30])
    upstream = torch.randn(40, 48, generator=torch.Generator().manual_seed(2))
    theirs.model.config.is_causal = causal
    start = 0
    for text in texts:
        out = theirs.model(input_ids=torch.tensor([text])).last_hidden_state[0]
        (out * upstream[start : start + len(text)]).sum().backward()
        start += len(text)
    (ours(PackedBatch.from_sequences(texts), causal=causal) * upstream).sum().backward()
    references = dict(theirs.model.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        reference = references[parameter_name].grad
        # the floor is for keys' biases where nothing rotates: they shift all scores of a row alike
        assert (parameter.grad - reference).norm() <= 1e-4 * reference.norm() + 5e-6, parameter_name


@pytest.mark.parametrize("name", ["llama-llama3", "mistral-window"])
@pytest.mark.parametrize("lengths", [[12], [12, 4, 30]], ids=["one", "many"])
def test_only_without_the_causal_mask_do_tokens_see_what_follows(name, lengths):
    _, ours = pair(name)
    texts = sequences(lengths)
    changed = [list(text) for text in texts]
    changed[0][-1] = (changed[0][-1] + 1) % VOCAB
    with torch.no_grad():
        for causal in (True, False):
            before = ours(PackedBatch.from_sequences(texts), causal=causal)
            after = ours(PackedBatch.from_sequences(changed), causal=causal)
            assert torch.equal(before[0], after[0]) == causal
            assert not torch.equal(before[11], after[11])
            assert torch.equal(before[12:], after[12:])  # other sequences see nothing of it
            if not causal:
                assert (before[0] - after[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3"])
def test_the_scaled_embedding_is_rounded_as_in_transformers(name):
    """The root of 48 is not a number of bf16: with the exact one other bits come out."""
    theirs, ours = pair(name)
    theirs.bfloat16(), ours.bfloat16()
    text = sequences([30])
    with torch.no_grad():
        expected = theirs.model(torch.tensor(text), output_hidden_states=True).hidden_states[0][0]
        _, states = ours(PackedBatch.from_sequences(text), output_hidden_states=True)
        exact = (ours.embed_tokens.weight[text[0]].float() * 48**0.5).bfloat16()
    assert torch.equal(states[0], expected) and not torch.equal(exact, expected)


@pytest.mark.parametrize("window", [8, 9])
def test_embedding_gemma(window):
    """``use_bidirectional_attention`` means half the window on either side; we write it in the common form."""
    name = "gemma3-two-rotations"
    theirs, ours = pair(name)
    theirs.config.use_bidirectional_attention = True
    raw = {**theirs.config.to_dict(), "sliding_window": window}
    theirs = transformers.Gemma3TextModel(transformers.Gemma3TextConfig(**copy.deepcopy(raw))).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    config = DecoderConfig.from_dict(raw, name)
    assert config.is_causal is False and config.sliding_window == window // 2
    ours.config = config
    texts = sequences()
    expected = torch.cat([theirs(torch.tensor([text])).last_hidden_state[0] for text in texts])
    assert (packed_states(ours, texts, False)[-1] - expected).abs().max() <= TOLERANCE
    ours.config = dataclasses.replace(config, sliding_window=window)
    assert (packed_states(ours, texts, False)[-1] - expected).abs().max() > 100 * TOLERANCE


def test_a_window_reaches_as_far_as_it_says():
    """One layer: a changed token is seen w - 1 positions further when causal, w on either side when bidirectional."""
    config = DecoderConfig.from_dict(
        {**SIZES, "model_type": "mistral", "sliding_window": 5, "num_hidden_layers": 1}, "test"
    )
    torch.manual_seed(0)
    model, text = Mistral(config).eval(), sequences([30])[0]
    changed = [*text[:15], (text[15] + 1) % VOCAB, *text[16:]]
    for causal, expected in ((True, range(15, 20)), (False, range(10, 21))):
        with torch.no_grad():
            difference = model(PackedBatch.from_sequences([text]), causal=causal) - model(
                PackedBatch.from_sequences([changed]), causal=causal
            )
        assert difference.abs().amax(1).nonzero().flatten().tolist() == list(expected)


@both_directions
@pytest.mark.parametrize("name", ["llama-yarn", "mistral-window", "qwen3", "smollm3", "gemma2", "gemma3-two-rotations"])
def test_a_sequence_is_the_same_alone_and_in_any_company(name, causal):
    _, ours = pair(name)
    texts = sequences()
    together = packed_states(ours, texts, causal)[-1].split(LENGTHS)
    order = [3, 0, 4, 1, 2]
    shuffled = packed_states(ours, [texts[i] for i in order], causal)[-1].split([LENGTHS[i] for i in order])
    for position, i in enumerate(order):
        alone = packed_states(ours, [texts[i]], causal)[-1]
        assert (together[i] - alone).abs().max() <= PACKING_TOLERANCE
        assert (shuffled[position] - alone).abs().max() <= PACKING_TOLERANCE


def test_dropout_follows_the_sample_and_needs_a_seed():
    _, ours = pair("llama-default")
    texts = sequences([9, 20, 14])
    with torch.no_grad():
        together = ours(PackedBatch.from_sequences(texts, sample_ids=[5, 6, 7]), attention_dropout=0.3, seed=1)
        alone = ours(PackedBatch.from_sequences(texts[1:2], sample_ids=[6]), attention_dropout=0.3, seed=1)
        assert (together[9:29] - alone).abs().max() <= PACKING_TOLERANCE
        for sample, seed in ((7, 1), (6, 2)):
            other = ours(PackedBatch.from_sequences(texts[1:2], sample_ids=[sample]), attention_dropout=0.3, seed=seed)
            assert (other - alone).abs().max() > 1e-2
        assert torch.equal(
            ours(PackedBatch.from_sequences(texts), seed=1), ours(PackedBatch.from_sequences(texts), seed=2)
        )
    with pytest.raises(ValueError, match=r"attention_dropout=0\.3 needs a seed"):
        ours(PackedBatch.from_sequences(texts), attention_dropout=0.3)


def test_empty_sequences_and_empty_batches():
    _, ours = pair("mistral-window")
    texts = sequences([6, 11])
    with torch.no_grad():
        plain = ours(PackedBatch.from_sequences(texts))
        assert torch.equal(ours(PackedBatch.from_sequences([[], texts[0], [], texts[1], []])), plain)
        for nothing in ([], [[]], [[], []]):
            last, states = ours(PackedBatch.from_sequences(nothing), output_hidden_states=True)
            assert last.shape == (0, 48) and len(states) == 4


def test_bad_batches_are_refused():
    _, ours = pair("llama-default")
    with torch.no_grad():
        ours(PackedBatch.from_sequences([[1] * POSITIONS]))
    with pytest.raises(ValueError, match=rf"a sequence of {POSITIONS + 1} tokens exceeds the model's {POSITIONS}"):
        ours(PackedBatch.from_sequences([[1], [1] * (POSITIONS + 1)]))
    with pytest.raises(ValueError, match=rf"token ids 3 … {VOCAB}.*vocabulary of {VOCAB}"):
        ours(PackedBatch.from_sequences([[3, VOCAB]]))
    with pytest.raises(ValueError, match="token ids -1"):
        ours(PackedBatch.from_sequences([[-1, 3]]))


def test_training_works_after_inference_mode():
    """The rotary tables are kept from one call to the next, whatever the first one was made under."""
    _, ours = pair("llama-default")
    batch = PackedBatch.from_sequences(sequences([7, 3]))
    with torch.inference_mode():
        expected = ours(batch)
    out = ours(batch)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected.clone())  # with a graph other kernels run
    assert ours.embed_tokens.weight.grad is not None


TEXTS = [
    "The capital of Japan is Tokyo, a city of fourteen million people.",
    "Encoders read the whole sentence at once.",
    (
        "A small decoder parks its attention on the first token; that is why every sequence starts with one and the "
        "same token, which means nothing else."
    ),
]


@pytest.fixture(scope="module")
def smollm2():
    try:
        path = find_smollm2()
    except CheckpointError as error:
        pytest.skip(f"no SmolLM2 weights: {error}")
    pytest.importorskip("gguf", reason="transformers reads GGUF files through the package gguf")
    # the trunk alone, by AutoModel, finds no tensor in transformers 5.2
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    theirs = theirs.model.eval()
    return load_pretrained(path).model, theirs, path


@pytest.mark.slow
@both_directions
def test_smollm2_is_that_of_transformers(smollm2, causal):
    from bivec.engine.tokenizer import load_tokenizer

    ours, theirs, path = smollm2
    tokenizer = load_tokenizer(path, bos_token="<|endoftext|>")
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert all(text[0] == 0 and len(text) > 5 for text in texts)
    expected = padded_states(theirs, texts, causal)
    states = packed_states(ours, texts, causal)
    cosine = torch.nn.functional.cosine_similarity(states[-1].double(), expected[-1].double(), dim=-1)
    print(f"SmolLM2, causal={causal}: worst cosine 1 - {1 - cosine.min().item():.1e} over {len(cosine)} tokens")
    assert cosine.min() >= 0.99999
    other = packed_states(ours, texts, not causal)[-1]
    assert torch.nn.functional.cosine_similarity(other, expected[-1], dim=-1).min() < 0.99
