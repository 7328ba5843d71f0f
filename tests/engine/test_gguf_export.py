"""GGUF files that are written here: read back tensor for tensor, by us, by the gguf package and by transformers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bivec import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import CheckpointError, ConfigError
from bivec.engine.lora import LoraConfig, add_lora
from bivec.engine.origin import Origin
from bivec.engine.tokenizer import load_tokenizer
from bivec.models import DecoderConfig, Mistral, load_pretrained

gguf = pytest.importorskip("gguf")
TEXTS = [
    "A lobster is blue.",
    "The red colour only appears after cooking, which takes some time and a large pot of boiling salted water.",
    "",
    "Na\u00efve caf\u00e9 \u2014 \u4f60\u597d \U0001f642  12345\tx=f(y)[0]\n",
]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def close(one, other, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)


def edited(source, folder, **fields):
    """A copy of a checkpoint with other fields in its config.json."""
    shutil.copytree(source, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


@pytest.fixture
def directory(family, tiny_dir, tmp_path):
    """Without windows in some layers only, which GGUF cannot say."""
    plain = {"use_sliding_window": False, "layer_types": None, "sliding_window": None}
    return edited(tiny_dir(family), tmp_path / family, **plain) if family == "qwen2" else tiny_dir(family)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore:.*sliding window")
def test_every_tensor_comes_back(family, dtype, directory, tmp_path):
    encoder = Encoder.from_pretrained(directory)
    encoder.save_gguf(tmp_path / "m.gguf", dtype=dtype)
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    kind = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    theirs = dict(again.model.named_parameters())
    assert theirs.keys() == dict(encoder.model.named_parameters()).keys()
    for name, parameter in encoder.model.named_parameters():
        expected = parameter.to(kind).float() if parameter.dim() == 2 else parameter  # norms and biases stay fp32
        assert torch.equal(theirs[name], expected), name
    assert again.tokenizer(TEXTS).input_ids == encoder.tokenizer(TEXTS).input_ids
    assert again.config == encoder.config
    if dtype == "f32":
        close(again.encode(TEXTS), encoder.encode(TEXTS))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("pooling", "number"), [("mean", 1), ("bos_token", 2), ("last_token", 3), ("eos_token", 3)])
def test_metadata(pooling, number, causal, tiny_llama_dir, tmp_path):
    """What llama.cpp reads, by the gguf package's own reader; and what we read of a file that others wrote."""
    settings = {"pooling": pooling, "causal": causal, "max_length": 99, "skip_instruction": False}
    base = Encoder.from_pretrained(tiny_llama_dir)
    encoder = Encoder(base.model, base.tokenizer, EncoderConfig(**settings), origin=Origin("x/y"), prompts={"q": "Q:"})
    encoder.save_gguf(tmp_path / "m.gguf", dtype="f32")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.pooling_type"] == number and fields["llama.attention.causal"] is causal
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.add_eos_token"] is (pooling == "eos_token")
    assert fields["tokenizer.ggml.bos_token_id"] == 0 and fields["tokenizer.ggml.eos_token_id"] == 1
    assert len(fields["tokenizer.ggml.tokens"]) == fields["llama.vocab_size"] == 1000
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    assert again.config == encoder.config and again.origin == Origin("x/y") and again.prompts == {"q": "Q:"}
    close(again.encode(TEXTS), encoder.encode(TEXTS))
    # of the same file without our own key
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"bivec.encoder", b"other.encoder"))
    pooling = "last_token" if pooling == "eos_token" else pooling
    assert Encoder.from_pretrained(tmp_path / "m.gguf").config == EncoderConfig(pooling=pooling, causal=causal)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_reads_it(family, directory, tmp_path):
    """Its own reader of GGUF: weights, rotation and tokenizer."""
    from transformers import AutoModelForCausalLM

    encoder = Encoder.from_pretrained(directory, causal=True)
    encoder.save_gguf(tmp_path / "m.gguf", dtype="f32")
    # the trunk alone, by AutoModel, finds no tensor in transformers 5.2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).model.eval()
    for text in TEXTS[:2]:
        with torch.no_grad():
            hidden = theirs(input_ids=torch.tensor([encoder.tokenizer(text).input_ids])).last_hidden_state[0]
        close(hidden, encoder.encode_tokens(text))


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_sentencepiece_tokenizers(version, tiny_mistral_dir, tmp_path):
    """The real ones of Mistral, with scores instead of merges."""
    package = pytest.importorskip("mistral_common", reason="pip install --no-deps mistral-common")
    pytest.importorskip("sentencepiece")
    names = {
        "v1": "tokenizer.model.v1",
        "v2": "mistral_instruct_tokenizer_240216.model.v2",
        "v3": "mistral_instruct_tokenizer_240323.model.v3",
    }
    shutil.copy(Path(next(iter(package.__path__))) / "data" / names[version], tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    shape = DecoderConfig.from_pretrained(tiny_mistral_dir)
    shape = replace(shape, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, sliding_window=None)
    model = Mistral(shape).requires_grad_(False)
    encoder = Encoder(model, tokenizer)
    encoder.save_gguf(tmp_path / "m.gguf")
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    assert again.tokenizer(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    assert again.config == encoder.config


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 8 / 3},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "beta_fast": 16.0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32},
        {"rope_type": "yarn", "factor": 4.0, "truncate": True},
        LLAMA3_ROPE,
    ],
)
@pytest.mark.filterwarnings("ignore:.*of YaRN it does not read")
def test_rope_scaling(scaling, tiny_llama_dir, tmp_path):
    folder = edited(tiny_llama_dir, tmp_path / "m", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    encoder = Encoder.from_pretrained(folder)
    encoder.save_gguf(tmp_path / "m.gguf", dtype="f32")
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    scaling.pop("truncate", None)
    usual = {"original_max_position_embeddings": 1024} if scaling["rope_type"] == "yarn" else {}
    found, expected = dict(again.model.config.rope_scaling), usual | scaling
    assert found.pop("rope_type") == expected.pop("rope_type") and found == pytest.approx(expected, rel=1e-6)
    close(again.encode(TEXTS), encoder.encode(TEXTS))
    plain = Encoder.from_pretrained(tiny_llama_dir)
    if scaling["rope_type"] != "llama3":  # which leaves short texts nearly alone
        assert np.abs(plain.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-3


def test_what_llama_cpp_does_not_do_is_told(tiny_llama_dir, tiny_mistral_dir, tmp_path):
    for settings, message in (
        ({"template": "mistral"}, "does not put texts into the template"),
        ({"pool_bos": False}, "it pools the BOS"),
    ):
        with pytest.warns(UserWarning, match=message) as caught:
            Encoder.from_pretrained(tiny_llama_dir, **settings).save_gguf(tmp_path / "m.gguf")
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="the sliding window of 24 tokens"):
        Encoder.from_pretrained(tiny_mistral_dir).save_gguf(tmp_path / "m.gguf")


PLAIN = {"rope_parameters": None, "rope_theta": 10000.0, "use_sliding_window": False, "layer_types": None}


@pytest.mark.parametrize(
    ("family", "scaling", "message"),
    [
        ("llama", {"rope_type": "yarn", "beta_fast": 16.0}, "of YaRN it does not read beta_fast = 16.0"),
        ("llama", {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 2.0}, "it does not read beta_slow = 2.0"),
        ("llama", LLAMA3_ROPE, None),
        ("qwen2", {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0}, None),
    ],
)
def test_scalings_that_llama_cpp_does_not_read_are_told(family, scaling, message, tiny_dir, tmp_path, recwarn):
    folder = edited(tiny_dir(family), tmp_path / "m", **PLAIN, rope_scaling={"factor": 4.0} | scaling)
    Encoder.from_pretrained(folder).save_gguf(tmp_path / "m.gguf")
    told = [str(one.message) for one in recwarn if "llama.cpp does not give this encoder's vectors" in str(one.message)]
    assert len(told) == (message is not None) and all(text.endswith(message) for text in told)


def test_what_cannot_be_written(tiny_llama_dir, tiny_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    path = tmp_path / "m.gguf"
    with pytest.raises(ConfigError, match="dtype 'q4_0': choose one of f32, f16, bf16"):
        encoder.save_gguf(path, dtype="q4_0")
    with pytest.raises(ConfigError, match=r"ends in \.gguf"):
        encoder.save_gguf(tmp_path / "m")
    with pytest.raises(ConfigError, match="model type 'gemma2' is written; there is llama, mistral, qwen2, qwen3"):
        Encoder.from_pretrained(tiny_dir("gemma2")).save_gguf(path)
    with pytest.raises(ConfigError, match="which layers of a qwen2 model have the sliding window"):
        Encoder.from_pretrained(tiny_dir("qwen2")).save_gguf(path)
    with pytest.raises(ConfigError, match="no pooling 'weighted_mean'"):
        Encoder.from_pretrained(tiny_llama_dir, pooling="weighted_mean").save_gguf(path)
    other = {**LLAMA3_ROPE, "factor": 5.0}
    folder = edited(tiny_llama_dir, tmp_path / "x", rope_parameters=None, rope_theta=10000.0, rope_scaling=other)
    with pytest.raises(ConfigError, match="not the llama3 scaling"):
        Encoder.from_pretrained(folder).save_gguf(path)
    folder = edited(tiny_dir("qwen2"), tmp_path / "q", **PLAIN, rope_scaling=LLAMA3_ROPE)
    with pytest.raises(ConfigError, match="does not load a qwen2 model with the llama3 scaling"):
        Encoder.from_pretrained(folder).save_gguf(path)
    add_lora(encoder.model, LoraConfig(rank=2))
    with pytest.raises(CheckpointError, match="merge it first"):
        encoder.save_gguf(path)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_a_tokenizer_that_gguf_cannot_name(tiny_llama_dir, tmp_path):
    from tokenizers import Regex
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    encoder = Encoder.from_pretrained(tiny_llama_dir)
    backend = encoder.tokenizer.backend_tokenizer
    backend.normalizer = Lowercase()  # nothing in the file says it: it shows when the file is read back
    with pytest.raises(ConfigError, match=r"the tokenizer cannot be said in GGUF: .The 3rd"):
        encoder.save_gguf(tmp_path / "m.gguf")
    backend.normalizer = None
    vowels = Sequence([Split(Regex("[aeiou]"), "isolated"), ByteLevel(add_prefix_space=False)])
    for splits in (vowels, None):
        backend.pre_tokenizer = splits
        with pytest.raises(ConfigError, match="in none of the ways that GGUF export knows"):
            encoder.save_gguf(tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_setting_that_gguf_cannot_say(tiny_llama_dir, tmp_path):
    """llama.cpp has YaRN's factor and borders, but not how much warmer its attention gets."""
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "attention_factor": 1.3}
    folder = edited(tiny_llama_dir, tmp_path / "m", rope_parameters=None, rope_theta=10000.0, rope_scaling=scaling)
    with pytest.raises(ConfigError, match=r"GGUF cannot say rope_scaling = .*1\.3.* \(it would be read as .*512\}\)"):
        Encoder.from_pretrained(folder).save_gguf(tmp_path / "m.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_rows_of_the_embedding_without_a_token(tiny_llama_dir, tmp_path):
    """Checkpoints round the number of rows up; a word that looks like what stands for one is a token all the same."""
    folder = edited(tiny_llama_dir, tmp_path / "m")
    rules = json.loads((folder / "tokenizer.json").read_text())
    lost, words = rules["model"]["merges"].pop(), rules["model"]["vocab"]
    assert words.pop("".join(lost)) == 999
    rules["model"]["merges"].pop()
    words["[PAD998]"] = words.pop(next(word for word, number in words.items() if number == 998))
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    encoder = Encoder.from_pretrained(folder)
    encoder.save_gguf(tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    assert tokens[997:] == [next(word for word, number in words.items() if number == 997), "[PAD998]", "[PAD999]"]
    assert types[997:] == [gguf.TokenType.NORMAL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED]
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    assert again.tokenizer(TEXTS).input_ids == encoder.tokenizer(TEXTS).input_ids


def test_a_tokenizer_without_a_bos(tiny_llama_dir, tmp_path):
    base = load_pretrained(tiny_llama_dir)
    tokenizer = load_tokenizer(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor, tokenizer.bos_token = None, None
    encoder = Encoder(base.model, tokenizer)
    encoder.save_gguf(tmp_path / "m.gguf", dtype="f32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert "tokenizer.ggml.bos_token_id" not in fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    assert again.tokenizer(TEXTS[:2]).input_ids == tokenizer(TEXTS[:2]).input_ids
    close(again.encode(TEXTS[:2]), encoder.encode(TEXTS[:2]))


def test_a_full_disk_leaves_the_old_file(tiny_llama_dir, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    encoder.save_gguf(path)
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CheckpointError, match="disk is full"):
        encoder.save_gguf(path, dtype="f32")
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["m.gguf"]


def test_a_quantisation_that_is_not_read_is_named(tiny_llama_dir, tmp_path):
    """An integer type, which no weight has; the file is otherwise whole."""
    model = load_pretrained(tiny_llama_dir).model
    encoder = Encoder(model, load_tokenizer(tiny_llama_dir))
    encoder.save_gguf(tmp_path / "m.gguf", dtype="f32")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    name = b"blk.0.attn_norm.weight"
    place = content.index(name) + len(name) + 4 + 8  # behind the number of dimensions and the one dimension
    assert content[place : place + 4] == bytes(4)  # F32
    content[place : place + 4] = int(gguf.GGMLQuantizationType.I32).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"attn_norm\.weight is quantised as I32, which gguf cannot dequantise"):
        Encoder.from_pretrained(tmp_path / "m.gguf")
    content[place : place + 4] = (999).to_bytes(4, "little")
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="unknown type number 999"):
        Encoder.from_pretrained(tmp_path / "m.gguf")
