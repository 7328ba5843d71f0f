"""config.json in and out: what is read, what is refused and how the refusal reads."""

import json

import pytest
import transformers

from bivec.models import ConfigError, DecoderConfig
from bivec.models.families import FAMILIES
from bivec.models.rope import rotary_frequencies

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "rope_theta": 50000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16",
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def read(raw=LLAMA, **changes):
    return DecoderConfig.from_dict({**raw, **changes}, "config.json")


def test_fields():
    config = read()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (96, 32, 48, 2)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rms_norm_eps) == (4, 2, 8, 1e-5)
    assert (config.max_position_embeddings, config.rope_theta, config.rope_scaling) == (64, 50000.0, None)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (True, False, False)
    assert (config.bos_token_id, config.eos_token_id, config.dtype) == (1, [2, 3], "bfloat16")
    assert config.is_causal is None and config.sliding_window is None
    assert read(head_dim=10, dtype="float16", is_causal=False).head_dim == 10
    assert read(attention_bias=True).attention_bias and read(mlp_bias=True).mlp_bias


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_left_out_has_transformers_default(family):
    needed = [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    ]
    raw = {**{name: LLAMA[name] for name in needed}, "model_type": family, "num_attention_heads": 8}
    ours = DecoderConfig.from_dict(raw, "config.json")
    theirs = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}[family](**raw)
    assert ours.num_kv_heads == theirs.num_key_value_heads and ours.head_dim == theirs.head_dim
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rms_norm_eps == theirs.rms_norm_eps and ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"] and ours.rope_scaling is None


def test_null_means_left_out():
    nulls = dict.fromkeys(["num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters", "bos_token_id"])
    config = read(**nulls, is_causal=None, torch_dtype=None, tie_word_embeddings=None, quantization_config=None)
    assert config.num_kv_heads == 4 and config.head_dim == 8 and config.rope_scaling is None
    assert config.bos_token_id is None and config.dtype is None and config.tie_word_embeddings is False
    assert read(MISTRAL, sliding_window=None).sliding_window is None  # Mistral v0.2 and later
    assert read(MISTRAL, num_key_value_heads=None).num_kv_heads == 4


def test_families_read_only_what_they_have():
    assert read(LLAMA, sliding_window=16).sliding_window is None
    config = read(MISTRAL, attention_bias=True, mlp_bias=True)
    assert config.sliding_window == 16 and not config.attention_bias and not config.mlp_bias


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_missing_field_is_named(field):
    raw = {name: value for name, value in LLAMA.items() if name != field}
    with pytest.raises(ConfigError, match=rf"^config\.json: {field} is missing, expected a positive integer"):
        DecoderConfig.from_dict(raw, "config.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "phi3"},
            rf"model_type 'phi3' is not supported; bivec runs {', '.join(sorted(FAMILIES))}$",
        ),
        (
            {"model_type": "gemma3"},
            r"model_type 'gemma3' is not supported; bivec runs gemma, ",
        ),  # without a text_config
        ({"model_type": None}, r"model_type None"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\]"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": True}, "hidden_size is True, expected a positive integer"),
        ({"hidden_size": "32"}, "hidden_size is '32', expected a positive integer"),
        ({"hidden_size": 32.0}, r"hidden_size is 32\.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": -4}, "num_attention_heads is -4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 30}, "hidden_size 30 is no multiple of num_attention_heads 4"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expected a positive number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        ({"max_position_embeddings": None, "vocab_size": 1.5}, r"vocab_size is 1\.5"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
        ({"attention_bias": 1}, "attention_bias is 1, expected true or false"),
        ({"is_causal": "no"}, "is_causal is 'no'"),
        ({"bos_token_id": [1]}, r"bos_token_id is \[1\], expected a token id"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id.*or a list of them"),
        ({"torch_dtype": 16}, "torch_dtype is 16, expected a string"),
        ({"rope_theta": "1e4"}, "rope_theta is '1e4'"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0"),
        ({"rope_theta": 1.0}, r"rope_theta is 1\.0, expected a number above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{message}"):
        read(**changes)


@pytest.mark.parametrize("window", [0, -1, True, "4096", 4096.0])
def test_bad_windows(window):
    with pytest.raises(ConfigError, match=rf"sliding_window is {window!r}, expected a positive integer"):
        read(MISTRAL, sliding_window=window)


# --- RoPE -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default"}])
def test_default_rope(scaling):
    assert read(rope_scaling=scaling).rope_scaling is None


def test_the_legacy_key_and_the_new_object():
    linear = {"rope_type": "linear", "factor": 2.0}
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == linear
    assert read(rope_scaling={"type": "su", **linear}).rope_scaling == linear  # rope_type wins
    config = read(rope_theta=None, rope_parameters={"rope_theta": 70000, **linear})
    assert config.rope_scaling == linear and config.rope_theta == 70000.0
    assert read(rope_parameters={"rope_theta": 70000.0, "rope_type": "default"}).rope_theta == 70000.0
    assert read(rope_parameters={"rope_type": "default"}).rope_theta == 50000.0
    both = read(rope_scaling=linear, rope_parameters={"rope_type": "default", "rope_theta": 9.0})
    assert both.rope_scaling == linear and both.rope_theta == 50000.0


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope", "su", "proportional", None, 3, ["linear"]])
def test_unsupported_rope_types_are_named(field, key, kind):
    with pytest.raises(ConfigError, match=rf"^config\.json: {field}\.rope_type .*bivec knows default, linear") as error:
        read(**{field: {key: kind, "factor": 2.0}})
    assert repr(kind) in str(error.value)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("linear", "rope_scaling is 'linear', expected one flat object"),
        ([1], "rope_scaling is"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, "one flat object for all layers"),
        ({"rope_type": "linear"}, "rope_scaling: factor is missing"),
        ({"rope_type": "linear", "factor": -2.0}, r"rope_scaling: factor is -2\.0, expected a positive number"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling: factor is '2'"),
        ({"rope_type": "linear", "factor": True}, "rope_scaling: factor is True"),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 0.0}, r"rope_scaling: rope_theta is 0\.0"),
        ({**LLAMA3, "low_freq_factor": None}, "rope_scaling: low_freq_factor is None"),
        ({**LLAMA3, "low_freq_factor": 4.0}, r"low_freq_factor 4\.0 must be below high_freq_factor 4\.0"),
        ({**LLAMA3, "original_max_position_embeddings": 32.5}, r"original_max_position_embeddings is 32\.5"),
        ({"rope_type": "yarn", "factor": 2.0, "beta_fast": -1}, "rope_scaling: beta_fast is -1"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": "1"}, "rope_scaling: mscale is '1'"),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": "no"}, "rope_scaling: truncate is 'no'"),
    ],
)
def test_bad_rope_scalings(scaling, message):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{message}"):
        read(rope_scaling=scaling)


def test_a_scaling_that_slipped_in_by_hand_is_refused_too():
    config = DecoderConfig(**{**vars(read()), "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}})
    with pytest.raises(ConfigError, match="'dynamic' is not supported"):
        rotary_frequencies(config)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        LLAMA3,
        {key: value for key, value in LLAMA3.items() if not key.startswith("original")},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8, "beta_slow": 2, "attention_factor": 0.7},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.8},
        {"rope_type": "yarn", "factor": 0.5},
    ],
)
def test_frequencies_are_those_of_transformers(scaling, outside):
    raw = {**LLAMA, "hidden_size": 256, "max_position_embeddings": 2048, "rope_scaling": dict(scaling)}
    if outside:
        raw["original_max_position_embeddings"] = 128
    ours, factor = rotary_frequencies(DecoderConfig.from_dict(raw, "config.json"))
    raw["rope_scaling"] = dict(scaling)  # transformers adds to the dict
    theirs = transformers.LlamaModel(transformers.LlamaConfig(**{**raw, "vocab_size": 8, "num_hidden_layers": 1}))
    assert ((ours - theirs.rotary_emb.inv_freq).abs() / ours).max() < 1e-6
    assert abs(factor - theirs.rotary_emb.attention_scaling) < 1e-7


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(is_causal=False, head_dim=10, attention_bias=True, mlp_bias=True),
        read(MISTRAL),
        read(MISTRAL, sliding_window=None, is_causal=True),
        read(rope_scaling=LLAMA3),
        read(rope_scaling={"rope_type": "yarn", "factor": 2.0, "truncate": False, "beta_slow": 2.0}),
    ],
)
def test_what_we_write_is_read_back_by_us_and_transformers(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert DecoderConfig.from_pretrained(tmp_path) == config == DecoderConfig.from_pretrained(tmp_path / "config.json")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.model_type == config.model_type and theirs.num_key_value_heads == config.num_kv_heads
    assert getattr(theirs, "is_causal", None) == config.is_causal
    assert getattr(theirs, "sliding_window", None) == config.sliding_window
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == (config.rope_scaling or {"rope_type": "default"})["rope_type"]


@pytest.mark.parametrize("config_class", [transformers.LlamaConfig, transformers.MistralConfig])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}])
def test_reads_what_transformers_writes(config_class, scaling, tmp_path):
    copy = scaling and dict(scaling)  # transformers adds to the dict
    theirs = config_class(vocab_size=96, hidden_size=64, num_attention_heads=8, rope_theta=7e4, rope_scaling=copy)
    theirs.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())  # the new layout
    ours = DecoderConfig.from_pretrained(tmp_path)
    assert ours.rope_theta == 70000.0 and ours.rope_scaling == scaling
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.num_kv_heads == theirs.num_key_value_heads


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json: no such file"),
        (b"", r"config\.json: not a JSON file"),
        (b'{"model_type": "llama"', r"config\.json: not a JSON file"),
        (b"\xff\xfe{}", r"config\.json: not a JSON file"),
        (b"[]", r"config\.json: expected a JSON object, found list"),
        (b"{}", r"config\.json: model_type None"),
    ],
)
def test_unreadable_files(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        DecoderConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("model_class", [transformers.LlamaForCausalLM, transformers.MistralForCausalLM])
@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count(model_class, tied):
    settings = {**LLAMA, "tie_word_embeddings": tied}
    if model_class is transformers.LlamaForCausalLM:
        settings |= {"attention_bias": True, "mlp_bias": True}
    settings["model_type"] = model_class.config_class.model_type
    model = model_class(model_class.config_class(**settings))
    config = DecoderConfig.from_dict(settings, "config.json")
    assert config.num_parameters() == sum(p.numel() for p in model.model.parameters())
    assert config.num_parameters(lm_head=True) == sum(p.numel() for p in model.parameters())
