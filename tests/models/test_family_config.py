"""config.json of the families beside LLaMA and Mistral: defaults, layers that differ, what is refused."""

import copy
import json

import pytest
import torch
import transformers

from bivec.engine.cli.versions import older
from bivec.models import ConfigError, DecoderConfig, Llama, Qwen2
from bivec.models.config_fields import FULL, SLIDING
from bivec.models.families import FAMILIES, MODEL_CLASSES, register
from bivec.models.rope import rotary_tables

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
ALTERNATING = [SLIDING, FULL] * 3
NESTED_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 500.0},
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
}
# a configuration of every kind that a family may have
CONFIGS = {
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {**WINDOW, "max_window_layers": 2}),
    "qwen2-window-everywhere": ("qwen2", {**WINDOW, "max_window_layers": 0}),
    "qwen2-window-nowhere": ("qwen2", {**WINDOW, "max_window_layers": 6}),
    "qwen2-window-unused": ("qwen2", {"sliding_window": 8, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-layer-types": ("qwen3", {**WINDOW, "layer_types": ALTERNATING}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 3, "mlp_bias": True}),
    "smollm3-window": ("smollm3", {**WINDOW, "no_rope_layers": [1, 0, 1, 1, 0, 0, 1]}),
    "gemma": ("gemma", {"head_dim": 16, "attention_bias": True}),
    "gemma-first-release": ("gemma", {"hidden_act": "gelu", "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma2-uncapped": (
        "gemma2",
        {"head_dim": 16, "attn_logit_softcapping": None, "final_logit_softcapping": None, "layer_types": [FULL] * 6},
    ),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 20.0}),
    "gemma3-scaled": (
        "gemma3_text",
        {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 2e6},
    ),
    "gemma3-nested": ("gemma3_text", {"layer_types": ALTERNATING, "rope_parameters": NESTED_ROPE}),
}
COVERED = {"llama", "mistral", *(family for family, _ in CONFIGS.values())}  # the first two in test_config.py
CONFIGS |= {family: (family, {"head_dim": 16}) for family in FAMILIES if family not in COVERED}


def config_of(family, **fields):
    return transformers.AutoConfig.for_model(family, **copy.deepcopy(fields))  # it adds to the dicts


def read(family, **fields):
    return DecoderConfig.from_dict({**SIZES, "model_type": family, **copy.deepcopy(fields)}, "config.json")


def assert_same_meaning(ours, theirs):
    """Field by field, whatever is written or a default."""
    layers = range(ours.num_layers)
    window = getattr(theirs, "sliding_window", None)
    if not getattr(theirs, "use_sliding_window", True):
        window = None
    implied = [FULL if window is None else SLIDING for _ in layers]
    assert [ours.layer_type(layer) for layer in layers] == (getattr(theirs, "layer_types", None) or implied)
    assert ours.sliding_window == window
    assert (
        list(ours.no_rope_layers or [1] * ours.num_layers) == getattr(theirs, "no_rope_layers", [1] * 99)[: len(layers)]
    )
    assert (ours.num_kv_heads, ours.max_position_embeddings) == (
        theirs.num_key_value_heads,
        theirs.max_position_embeddings,
    )
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.rms_norm_eps, ours.tie_word_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in tokens)
    assert ours.query_pre_attn_scalar == getattr(theirs, "query_pre_attn_scalar", None)
    assert ours.final_logit_softcapping == getattr(theirs, "final_logit_softcapping", None)
    # transformers 5.24 hands Gemma 3's to no attention
    cap = None if ours.model_type == "gemma3_text" else getattr(theirs, "attn_logit_softcapping", None)
    assert ours.attn_logit_softcapping == cap
    assert ours.attention_bias == (ours.model_type == "qwen2" or getattr(theirs, "attention_bias", False))
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    rope = theirs.rope_parameters
    local, rope = (rope[SLIDING], rope[FULL]) if FULL in rope else (None, rope)
    assert ours.rope_theta == rope["rope_theta"]
    assert (ours.rope_scaling or {"rope_type": "default"})["rope_type"] == rope["rope_type"]
    assert ours.rope_local_theta == (local and local["rope_theta"])
    activation = getattr(theirs, ours.family.activation_field)
    assert activation == ours.family.activations[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_has_transformers_default(family):
    needed = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    raw = {**needed, "num_attention_heads": 32, "hidden_size": 64, "num_hidden_layers": 40}
    ours = DecoderConfig.from_dict({**raw, "model_type": family}, "config.json")
    assert_same_meaning(ours, config_of(family, **raw))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways(name, tmp_path):
    """What transformers writes is read here, and what we write by both, with one meaning."""
    family, fields = CONFIGS[name]
    theirs = config_of(family, **{**SIZES, **fields})
    ours = read(family, **fields)
    if name == "gemma-first-release" and older(transformers.__version__, "5.18"):
        assert theirs.hidden_act == "gelu"  # taken at its word, which the release did not mean
        theirs.hidden_act = "gelu_pytorch_tanh"
    assert_same_meaning(ours, theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    assert DecoderConfig.from_pretrained(tmp_path / "theirs") == ours
    (tmp_path / "config.json").write_text(json.dumps(ours.to_dict()))
    assert DecoderConfig.from_pretrained(tmp_path) == ours
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(theirs)
    assert_same_meaning(ours, again)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count(name):
    family, fields = CONFIGS[name]
    theirs = getattr(transformers, FAMILIES[family].causal_lm)
    with torch.device("meta"):
        theirs = theirs(config_of(family, **{**SIZES, **fields}))
        config = read(family, **fields)
        ours = MODEL_CLASSES[family](config)
    assert config.num_parameters() == sum(p.numel() for p in ours.parameters())
    assert config.num_parameters() == sum(p.numel() for p in theirs.model.parameters())
    assert config.num_parameters(lm_head=True) == sum(p.numel() for p in theirs.parameters())


def test_null_where_null_means_something():
    config = read("gemma2", attn_logit_softcapping=None, final_logit_softcapping=None, bos_token_id=None)
    assert config.attn_logit_softcapping is config.final_logit_softcapping is config.bos_token_id is None
    assert read("qwen2", num_key_value_heads=None).num_kv_heads == 4
    assert read("gemma2", query_pre_attn_scalar=None, head_dim=None).head_dim == 256


def test_families_read_only_what_they_have():
    others = {"query_pre_attn_scalar": 5, "attn_logit_softcapping": 5.0, "no_rope_layers": [0] * 6, "layer_types": 3}
    for family in ("llama", "mistral", "gemma"):
        config = read(family, sliding_window=None, **others)
        assert config.softmax_scale is config.attn_logit_softcapping is config.layer_types is None
        assert config.no_rope_layers is None
    assert read("gemma", sliding_window=8).sliding_window is None
    assert read("llama", use_bidirectional_attention=True).is_causal is None
    assert not read("qwen2", mlp_bias=True).mlp_bias and not read("gemma2", mlp_bias=True).mlp_bias


def test_qwen2_has_no_bias_on_the_output():
    with torch.device("meta"):
        model = MODEL_CLASSES["qwen2"](read("qwen2", attention_bias=False))
    biases = {name.rpartition(".")[0].rpartition(".")[2] for name, _ in model.named_parameters() if "bias" in name}
    assert biases == {"q_proj", "k_proj", "v_proj"}


def test_only_layers_without_a_window_are_scaled():
    tables = rotary_tables(read("gemma3_text", head_dim=8, rope_parameters=NESTED_ROPE), 40)
    plain = rotary_tables(read("llama", rope_theta=500.0), 40)[FULL]
    assert all(torch.equal(a, b) for a, b in zip(tables[SLIDING], plain, strict=True))
    scaled = rotary_tables(read("llama", rope_theta=1e5, rope_scaling={"rope_type": "linear", "factor": 8.0}), 40)
    assert all(torch.equal(a, b) for a, b in zip(tables[FULL], scaled[FULL], strict=True))
    assert scaled[FULL] is scaled[SLIDING]


def test_the_text_half_of_a_multimodal_file():
    text = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "sliding_window": 8}
    raw = {"model_type": "gemma3", "eos_token_id": [1, 106], "vision_config": {"hidden_size": 9}, "text_config": text}
    config = DecoderConfig.from_dict({**raw, "torch_dtype": "bfloat16"}, "config.json")
    theirs = transformers.Gemma3Config(**copy.deepcopy(raw)).text_config
    theirs.eos_token_id = [1, 106]
    assert_same_meaning(config, theirs)
    assert (config.model_type, config.vocab_size, config.dtype) == ("gemma3_text", 262208, "bfloat16")
    assert DecoderConfig.from_dict(config.to_dict(), "config.json") == config
    broken = {**raw, "text_config": {**text, "hidden_size": "64"}}
    with pytest.raises(ConfigError, match=r"^config\.json: text_config: hidden_size is '64'"):
        DecoderConfig.from_dict(broken, "config.json")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported; expected 'gelu_pytorch_tanh' or 'gelu'"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' .*expected 'gelu_pytorch_tanh'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention .*gemma; set is_causal: false"),
        ("gemma3_text", {"use_bidirectional_attention": "yes"}, "use_bidirectional_attention is 'yes', expected true"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1, expected true or false"),
        ("qwen2", {**WINDOW, "sliding_window": 0}, "sliding_window is 0, expected a positive integer"),
        ("qwen2", {**WINDOW, "max_window_layers": -1}, "max_window_layers is -1, expected an integer of at least 0"),
        ("qwen2", {"layer_types": ALTERNATING}, "layer_types has 'sliding_attention', but sliding_window is not set"),
        ("gemma2", {"sliding_window": None}, "layer_types has 'sliding_attention', but sliding_window is not set"),
        ("qwen3", {**WINDOW, "layer_types": ALTERNATING[:5]}, "layer_types is .*for each of 6 layers"),
        ("qwen3", {**WINDOW, "layer_types": ["chunked_attention"] * 6}, r"layer_types is \['chunked_attention'"),
        ("qwen3", {"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, r"no_rope_layers is \[1, 0, 1\], expected .* each of 6 layers"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 2, 0, 0]}, "no_rope_layers is"),
        ("smollm3", {"no_rope_layers": [True, 0, 1, 1, 0, 0]}, "no_rope_layers is"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("gemma2", {"attn_logit_softcapping": -50.0}, r"attn_logit_softcapping is -50\.0, expected a positive number"),
        ("gemma2", {"query_pre_attn_scalar": "256"}, "query_pre_attn_scalar is '256'"),
        ("gemma2", {"rope_parameters": NESTED_ROPE}, "expected one flat object for all layers"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is .*expected an object with full_"),
        ("gemma3_text", {"rope_parameters": {FULL: 3}}, "rope_parameters is .*expected an object with full_"),
        ("gemma3_text", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected one flat object"),
        ("gemma3_text", {"rope_local_base_freq": 0}, "rope_local_base_freq is 0"),
        (
            "gemma3_text",
            {"rope_parameters": {**NESTED_ROPE, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention has a scaling",
        ),
    ],
)
def test_bad_values_are_named(family, changes, message):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{message}"):
        read(family, **changes)


def test_a_model_type_has_one_class():
    """A copy of a model's file would else take its place without a word."""
    stray = type("Stray", (Llama,), {"__module__": "bivec.models.stray"})
    with pytest.raises(ValueError, match=r"'qwen2' is registered by bivec\.models\.qwen and by bivec\.models\.stray"):
        register("qwen2", FAMILIES["qwen2"])(stray)
    assert MODEL_CLASSES["qwen2"] is register("qwen2", FAMILIES["qwen2"])(Qwen2)
