"""attn_implementation="bivec" against "eager" on whole models: states and gradients, in every layout of a batch."""

import types

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, AutoModelForCausalLM

import bivec.engine.integrations.transformers as integration
from bivec.engine.errors import ConfigError
from bivec.engine.integrations.transformers import attention_forward, register, visibility_mask
from bivec.models.families import MODEL_CLASSES

FAMILIES = sorted(MODEL_CLASSES)
LENGTHS = (5, 40, 1, 31)  # the windows are of 24 tokens
TOLERANCE = 1e-5

register()


@pytest.fixture(scope="module")
def models(tiny_dir):
    loaded = {}

    def get(family):
        if family not in loaded:
            loaded[family] = AutoModel.from_pretrained(tiny_dir(family), attn_implementation="bivec").eval()
            assert loaded[family].config._attn_implementation == "bivec"
        return loaded[family]

    return get


def texts(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 1000, (length,), generator=generator) for length in LENGTHS]


def padded(side):
    rows, mask = torch.ones(len(LENGTHS), max(LENGTHS), dtype=torch.int64), torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, text in enumerate(texts()):
        place = slice(len(text)) if side == "right" else slice(max(LENGTHS) - len(text), None)
        rows[row, place], mask[row, place] = text, 1
    return {"input_ids": rows, "attention_mask": mask.long()}


def packed():
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return {"input_ids": torch.cat(texts())[None], "position_ids": positions[None]}


def bounds():
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    longest = max(LENGTHS)
    named = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": longest, "max_length_k": longest}
    return packed() | named


def run(model, implementation, batches, causal):
    """States of the real tokens [T, D] and the gradients of all parameters."""
    model.set_attn_implementation(implementation)
    model.config.is_causal = causal
    model.zero_grad()
    states = []
    for batch in batches:
        hidden = model(**batch, use_cache=False).last_hidden_state
        states.append(hidden[batch["attention_mask"].bool()] if "attention_mask" in batch else hidden.flatten(0, 1))
    states = torch.cat(states)
    probe = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * probe).sum().backward()
    return states.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def difference(ours, theirs):
    """Of the states, and of the gradients in parts of the largest entry of each parameter's."""
    gradients = [float((ours[1][n] - g).abs().max() / g.abs().max().clamp(min=1)) for n, g in theirs[1].items()]
    return float((ours[0] - theirs[0]).abs().max()), max(gradients)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("layout", ["right", "left", "packed", "bounds", "one by one"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients(models, family, layout, causal, record_property):
    model = models(family)
    alone = [{"input_ids": text[None]} for text in texts()]
    makers = {"packed": packed, "bounds": bounds}
    ours = alone if layout == "one by one" else [makers[layout]() if layout in makers else padded(layout)]
    # eager forgets the packing when it sees both sides: its reference is one text at a time
    theirs = ours if layout in ("right", "left") else alone
    states, gradients = difference(run(model, "bivec", ours, causal), run(model, "eager", theirs, causal))
    record_property("states", states)
    record_property("gradients", gradients)
    assert states <= TOLERANCE
    assert gradients <= TOLERANCE


def test_packed_rows_of_a_batch(models):
    """Two rows of packed texts, as eager takes them too where it is causal."""
    model, positions = models("mistral"), torch.cat([torch.arange(17), torch.arange(30)])
    ids = torch.randint(2, 1000, (2, 47), generator=torch.Generator().manual_seed(3))
    batch = {"input_ids": ids, "position_ids": torch.stack([positions, positions.roll(0)])}
    ours, theirs = run(model, "bivec", [batch], True), run(model, "eager", [batch], True)
    assert max(difference(ours, theirs)) <= TOLERANCE


@pytest.fixture
def calls(monkeypatch):
    seen = []

    def spy(q, k, v, cu_seqlens, max_seqlen, **options):
        seen.append(types.SimpleNamespace(q=q, k=k, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **options))
        return flash_attention(q, k, v, cu_seqlens, max_seqlen, **options)

    flash_attention = integration.flash_attention
    monkeypatch.setattr(integration, "flash_attention", spy)
    return seen


@pytest.mark.parametrize("batch", [padded("left"), packed(), bounds()], ids=["padded", "packed", "bounds"])
def test_the_kernel_sees_real_tokens_and_unrepeated_heads(models, calls, batch):
    model = models("gemma2")
    model.set_attn_implementation("bivec")
    model.config.is_causal = False
    model(**batch)
    assert [call.q.shape for call in calls] == [(sum(LENGTHS), 4, 32)] * 2
    assert [call.k.shape for call in calls] == [(sum(LENGTHS), 2, 32)] * 2
    assert [call.cu_seqlens.diff().tolist() for call in calls] == [list(LENGTHS)] * 2
    assert sorted(str(call.window) for call in calls) == ["(24, 24)", "None"]
    assert {call.softcap for call in calls} == {5.0}
    assert {call.causal for call in calls} == {False}


def test_layers_of_one_kind_share_a_plan(models, calls):
    model = models("llama")
    model.set_attn_implementation("bivec")
    model(**packed())
    assert len({id(call.plan) for call in calls}) == 1
    assert len(calls) == 2


def test_is_causal_as_an_argument(models):
    model = models("llama")
    both = run(model, "bivec", [{"input_ids": texts()[1][None], "is_causal": False}], causal=True)
    assert max(difference(both, run(model, "eager", [{"input_ids": texts()[1][None]}], causal=False))) <= TOLERANCE


def test_it_trains_with_dropout_and_checkpointing(tiny_dir):
    """The recomputed layers draw the masks of the first pass; another seed draws others."""
    model = AutoModel.from_pretrained(tiny_dir("llama"), attn_implementation="bivec", attention_dropout=0.3).train()

    def gradient(seed):
        torch.manual_seed(seed)
        return run(model, "bivec", [padded("right")], False)[1]["layers.0.self_attn.q_proj.weight"]

    first, other = gradient(0), gradient(1)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(0), first, rtol=0, atol=1e-6)
    assert (first - other).abs().max() > 1e-2


def test_autocast(models):
    """Rotated queries are fp32 there, values bf16."""
    model, states = models("llama"), {}
    for implementation in ("bivec", "eager"):
        with torch.autocast("cpu", torch.bfloat16):
            states[implementation] = run(model, implementation, [padded("right")], False)[0]
    assert states["bivec"].dtype == states["eager"].dtype
    assert (states["bivec"] - states["eager"]).abs().max() < 0.1 < states["eager"].abs().max()


def test_registering_again_changes_nothing():
    register()
    assert AttentionInterface()["bivec"] is attention_forward
    assert AttentionMaskInterface()["bivec"] is visibility_mask
    assert list(AttentionInterface()).count("bivec") == 1


def test_the_prompt_of_a_cache_and_generation_without(tiny_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_dir("llama"), attn_implementation="bivec").eval()
    prompt = {"input_ids": texts()[0][None], "attention_mask": torch.ones(1, LENGTHS[0], dtype=torch.int64)}
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False, "pad_token_id": 1}
    ours = model.generate(**prompt, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(**prompt, **options))
    model.set_attn_implementation("bivec")
    with pytest.raises(ConfigError, match=r"1 queries for 6 keys .*use_cache=False"):
        model.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=1)


SQUARE = torch.ones(1, 1, 5, 5, dtype=torch.bool)
TEXT = texts()[0][None]
HOLES = torch.tensor([[1, 1, 0, 1, 1]])
REFUSED = {
    "a 4D mask": ({"attention_mask": SQUARE}, r"shape \(1, 1, 5, 5\): give a 2D attention_mask"),
    "attention weights": ({"output_attentions": True}, 'attn_implementation="eager"'),
    "sinks": ({"s_aux": torch.zeros(4)}, "attention sinks"),
    "bounds and padding": (
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "cu_seq_lens_q": torch.tensor([0, 5])},
        "not both",
    ),
    "packing and padding": (
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]]), "position_ids": torch.tensor([[0, 1, 0, 1, 2]])},
        "give no attention_mask",
    ),
    "holes in a window": ({"attention_mask": HOLES}, "holes between real tokens"),
    "bounds of another batch": ({"cu_seq_lens_q": torch.tensor([0, 3, 6])}, r"0 to the 5 tokens .* ends \[0, 6\]"),
    "other keys": (
        {"cu_seq_lens_q": torch.tensor([0, 5]), "cu_seq_lens_k": torch.tensor([0, 2, 5])},
        "must equal cu_seq_lens_q",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused(models, case):
    arguments, message = REFUSED[case]
    model = models("mistral")
    model.set_attn_implementation("bivec")
    model.config.is_causal = True
    with pytest.raises(ConfigError, match=message):
        model(TEXT, use_cache=False, **arguments)


def test_holes_without_a_window(models):
    ours, theirs = (
        run(models("llama"), name, [{"input_ids": TEXT, "attention_mask": HOLES}], True) for name in ("bivec", "eager")
    )
    assert max(difference(ours, theirs)) <= TOLERANCE


def test_other_mask_functions_are_refused_by_name():
    from transformers.masking_utils import and_masks, chunked_overlay, or_masks

    chunks = and_masks(chunked_overlay(4, torch.zeros(1).long()), transformers.masking_utils.causal_mask_function)
    with pytest.raises(ConfigError, match=r"chunked_overlay: load the model with attn_implementation=\"sdpa\""):
        visibility_mask(1, 8, chunks, q_length=8)
    either = or_masks(transformers.masking_utils.causal_mask_function, lambda *indices: True)
    with pytest.raises(ConfigError, match="also has or_masks"):
        visibility_mask(1, 8, either, q_length=8)
    with pytest.raises(ConfigError, match=r"test_transformers_attention.*lambda"):
        visibility_mask(1, 8, lambda *indices: True, q_length=8)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_a_layer_called_by_itself(causal, window):
    """Without a mask table: the layer's own flag, a 2D mask or none, a window as an argument."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    layer = types.SimpleNamespace(is_causal=causal)
    away = torch.arange(9)[:, None] - torch.arange(9)
    seen = away >= 0 if causal else torch.ones(9, 9, dtype=torch.bool)
    if window is not None:
        seen = seen & (away < window if causal else away.abs() <= window)
    keys = torch.ones(2, 9, dtype=torch.bool)
    keys[1, 6:] = False
    for mask in (None, keys):
        out, weights = attention_forward(layer, q, k, v, mask, scaling=0.3, sliding_window=window)
        visible = seen if mask is None else seen & mask[:, None, None, :]
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible.expand(2, 1, 9, 9), scale=0.3, enable_gqa=True
        ).transpose(1, 2)
        real = keys if mask is not None else torch.ones_like(keys)
        torch.testing.assert_close(out[real], expected[real], rtol=0, atol=1e-5)
        assert weights is None
        assert not out[~real].any()


def test_lengths_as_older_versions_give_them():
    """By the positions in the cache; with neither, a row has as many queries as keys."""
    for options in ({"q_length": 5}, {"cache_position": torch.arange(5)}, {}):
        assert visibility_mask(1, 5, **options).causal
    with pytest.raises(ConfigError, match="got 1 queries for 5 keys"):
        visibility_mask(1, 5, cache_position=torch.tensor([4]))


@pytest.mark.parametrize("causal", [True, False])
def test_a_flag_against_the_models_mask(causal):
    masks = transformers.masking_utils
    function = masks.causal_mask_function if causal else masks.bidirectional_mask_function
    q, seen = torch.randn(1, 2, 5, 16), visibility_mask(1, 5, function, q_length=5)
    layer = types.SimpleNamespace(is_causal=not causal)  # which the mask overrules
    by_mask, _ = attention_forward(layer, q, q, q, seen)
    assert torch.equal(by_mask, attention_forward(layer, q, q, q, seen, is_causal=causal)[0])
    said = f"is_causal={not causal} was passed, .* mask that is {'' if causal else 'not '}causal: set model.config"
    with pytest.raises(ConfigError, match=said):
        attention_forward(layer, q, q, q, seen, is_causal=not causal)


def test_mixed_head_dims_are_refused():
    q, v = torch.randn(1, 4, 3, 16), torch.randn(1, 4, 3, 8)
    with pytest.raises(ConfigError, match="got 16 for queries and 8"):
        attention_forward(types.SimpleNamespace(is_causal=True), q, q, v, None)
