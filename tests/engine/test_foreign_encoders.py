"""Encoders that others made keep their tokenizer, prompts, unit vectors and modules, here and when saved again."""

import json
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

from bivec import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import BivecError, ConfigError
from bivec.engine.tokenizer import load_tokenizer, prefix_ids

TEXTS = ["A lobster is blue.", "The red colour only appears after cooking, which takes some time.", "x"]
PROMPTS = {"query": "Instruct: find\nQuery:", "passage": "passage: ", "bare": ""}
TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def close(one, other, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.fixture(params=["none", "eos"])
def without_bos(request, tiny_llama_dir, tmp_path):
    """A decoder whose tokenizer puts nothing in front (Qwen, SmolLM2), or an EOS behind (Qwen3-Embedding)."""
    from transformers import AutoTokenizer

    folder = tmp_path / "decoder"
    shutil.copytree(tiny_llama_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = (
        processor if request.param == "eos" else TemplateProcessing(single="$A", special_tokens=[])
    )
    tokenizer.save_pretrained(folder)
    return folder


def sentence_transformer(folder, *, mode="mean", include_prompt=True, modules=(), **options):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    pooling = Pooling(64, pooling_mode=mode, include_prompt=include_prompt)
    return SentenceTransformer(modules=[Transformer(str(folder)), pooling, *modules], device="cpu", **options)


def reopened(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
def test_no_bos_is_added_to_an_encoder(mode, without_bos, tmp_path):
    model = sentence_transformer(without_bos, mode=mode)
    model.save(str(tmp_path / "st"))
    encoder = Encoder.from_pretrained(tmp_path / "st")
    assert encoder.tokenizer(TEXTS[0]).input_ids == model.tokenizer(TEXTS[0]).input_ids
    close(encoder.encode(TEXTS), model.encode(TEXTS))
    encoder.save_pretrained(tmp_path / "again")
    close(Encoder.from_pretrained(tmp_path / "again").encode(TEXTS), model.encode(TEXTS))
    close(reopened(tmp_path / "again").encode(TEXTS), model.encode(TEXTS))
    # a mere decoder has one, as in training here
    assert prefix_ids(Encoder.from_pretrained(without_bos).tokenizer) == [0]
    assert prefix_ids(load_tokenizer(without_bos, add_bos=False)) == []


def test_no_bos_is_added_to_an_encoder_of_llm2vec(without_bos, tmp_path):
    import peft
    from transformers import AutoModel

    shutil.copytree(without_bos, tmp_path / "whole")
    (tmp_path / "whole" / "llm2vec_config.json").write_text('{"pooling_mode": "mean", "skip_instruction": true}')
    whole = Encoder.from_pretrained(tmp_path / "whole")
    assert prefix_ids(whole.tokenizer) == []
    # the card's code does not leave out the first word
    whole.save_pretrained(tmp_path / "saved")
    assert "mask[:, 0]" not in (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    close(reopened(tmp_path / "saved").encode(TEXTS), whole.encode(TEXTS))
    model = peft.get_peft_model(AutoModel.from_pretrained(without_bos), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(without_bos))
    for encoder in (
        Encoder.from_pretrained(tmp_path / "adapter"),
        Encoder.from_pretrained(without_bos, adapters=[tmp_path / "adapter"]),
    ):
        assert prefix_ids(encoder.tokenizer) == []


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("default", [None, "query", "passage"])
def test_prompts_are_those_of_sentence_transformers(default, include_prompt, tiny_llama_dir, tmp_path):
    """A named prompt replaces the default one; each is taken to the letter, and saved again so."""
    model = sentence_transformer(
        tiny_llama_dir, include_prompt=include_prompt, prompts=PROMPTS, default_prompt_name=default
    )
    model.save(str(tmp_path / "st"))
    encoder = Encoder.from_pretrained(tmp_path / "st")
    # where it leaves prompts out of the mean it takes a prompt's last space for a token of its own: the warning says so
    names = [name for name in PROMPTS if include_prompt or name != "passage"]
    texts = [f" {text}" for text in TEXTS] if not include_prompt else TEXTS

    def same(one, other):
        for name in names:
            close(one.encode(texts, prompt_name=name), other.encode(texts, prompt_name=name))
        if default in (None, *names):
            close(one.encode(texts), other.encode(texts))

    same(encoder, model)
    with pytest.warns(UserWarning, match="the text's first") if not include_prompt else nullcontext():
        encoder.save_pretrained(tmp_path / "again")
    for again in (Encoder.from_pretrained(tmp_path / "again"), reopened(tmp_path / "again")):
        assert {name: again.prompts[name] for name in PROMPTS} == PROMPTS
        same(again, model)
    assert reopened(tmp_path / "again").default_prompt_name == default
    (tmp_path / "again" / "bivec_config.json").unlink()
    same(Encoder.from_pretrained(tmp_path / "again"), model)


def test_prompts_of_ours_with_a_template(tiny_llama_dir, tmp_path):
    base = Encoder.from_pretrained(tiny_llama_dir)
    config = EncoderConfig(template="doc: {text}", skip_instruction=False)
    encoder = Encoder(base.model, base.tokenizer, config, prompts={"q": "Find:"})
    encoder.save_pretrained(tmp_path / "m")
    model = reopened(tmp_path / "m")
    assert model.prompts["q"] == "Find:" and model.prompts["template"] == "doc: "
    close(model.encode(TEXTS), encoder.encode(TEXTS))
    close(model.encode(TEXTS, prompt_name="q"), encoder.encode(TEXTS, prompt_name="q"))
    close(encoder.encode(TEXTS, prompt="Find:"), base.encode([f"Find:{text}" for text in TEXTS]), 1e-6)
    (tmp_path / "m" / "bivec_config.json").unlink()
    again = Encoder.from_pretrained(tmp_path / "m")
    close(again.encode(TEXTS, prompt_name="q"), encoder.encode(TEXTS, prompt_name="q"), 1e-6)


def test_prompts_that_are_none(tiny_llama_dir, tmp_path):
    encoder = Encoder.from_pretrained(tiny_llama_dir)
    with pytest.raises(BivecError, match="prompt_name 'q' is unknown; the encoder has none"):
        encoder.encode(TEXTS, prompt_name="q")
    with pytest.raises(BivecError, match="give one of instruction, prompt and prompt_name"):
        encoder.encode(TEXTS, prompt="a", instruction="b")
    encoder.save_pretrained(tmp_path / "m")
    edit(tmp_path / "m" / "bivec_config.json", prompts={"q": 1})
    with pytest.raises(ConfigError, match=r"bivec_config\.json: prompts are"):
        Encoder.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_unit_vectors_and_similarity(similarity, tiny_llama_dir, tmp_path):
    from sentence_transformers.models import Normalize

    model = sentence_transformer(tiny_llama_dir, modules=[Normalize()], similarity_fn_name=similarity)
    model.save(str(tmp_path / "st"))
    encoder = Encoder.from_pretrained(tmp_path / "st")
    close(np.linalg.norm(encoder.encode(TEXTS), axis=1), np.ones(3))
    close(encoder.encode(TEXTS), model.encode(TEXTS))
    encoder.save_pretrained(tmp_path / "again")
    again = reopened(tmp_path / "again")
    assert len(again) == 3 and again.similarity_fn_name == similarity
    close(again.encode(TEXTS), model.encode(TEXTS))
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    assert "| vectors | of length 1 |" in card and f"| similarity | {similarity} |" in card
    encoder.save_pretrained(tmp_path / "plain", normalize=False)
    assert len(reopened(tmp_path / "plain")) == 2


def test_our_own_folder_saved_by_sentence_transformers(tiny_llama_dir, tmp_path):
    """The recipes' default leaves out the BOS, which a WordWeights module says there."""
    encoder = Encoder.from_pretrained(tiny_llama_dir, pool_bos=False)
    encoder.save_pretrained(tmp_path / "ours")
    reopened(tmp_path / "ours").save(str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs" / "bivec_config.json").exists()
    again = Encoder.from_pretrained(tmp_path / "theirs")
    assert again.config.pool_bos is False
    close(again.encode(TEXTS), encoder.encode(TEXTS))
    (file,) = (tmp_path / "theirs").glob("*WordWeights/model.safetensors")
    weights = load_file(file)["emb_layer.weight"].clone()  # safetensors before 0.8 maps the file, which changes below
    for index, value, message in ((7, 0.0, "weighs 2 tokens"), (7, 0.5, "weighs 1 tokens"), (0, 1.0, None)):
        changed = weights.clone()
        changed[index] = value
        save_file({"emb_layer.weight": changed}, file)
        if message is None:
            assert Encoder.from_pretrained(tmp_path / "theirs").config.pool_bos is True
            continue
        with pytest.raises(ConfigError, match=rf"model\.safetensors: {message} .* \(ids \[0\]\)"):
            Encoder.from_pretrained(tmp_path / "theirs")
    for odd in (weights[:-1], weights[:0], weights.flatten(), weights.expand(-1, 2).contiguous(), weights.long()):
        save_file({"emb_layer.weight": odd}, file)
        with pytest.raises(ConfigError, match=r"emb_layer\.weight is .*, expected floating point \[1000 or more, 1\]"):
            Encoder.from_pretrained(tmp_path / "theirs")
    file.unlink()
    with pytest.raises(ConfigError, match="no weights of a WordWeights module"):
        Encoder.from_pretrained(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([{**TRANSFORMER, "type": "custom_st.Transformer"}], "'custom_st.Transformer' is code of the checkpoint"),
        ([TRANSFORMER, TRANSFORMER], "module 'Transformer' is not supported there"),
        ([POOLING, TRANSFORMER], "module 'Transformer' is not supported there"),
        ([TRANSFORMER, {**POOLING, "path": "../outside"}], "the path '../outside' leads out of"),
        ([{**TRANSFORMER, "path": "/etc"}], "the path '/etc' leads out of"),
        ([{**TRANSFORMER, "path": "a\0b"}], "can be none"),
        ([{**TRANSFORMER, "path": "a" * 2000}], "the path 'a{80}' can be none"),
        ([{"type": 3, "path": ""}], "every module needs a type and a path"),
    ],
    ids=["custom", "twice", "order", "up", "root", "NUL", "long", "type"],
)
def test_modules_that_are_refused(modules, message, tiny_llama_dir, tmp_path):
    for folder, with_model in ((tmp_path / "m", True), (tmp_path / "nested", False)):
        if with_model:
            shutil.copytree(tiny_llama_dir, folder)
        folder.mkdir(exist_ok=True)
        (folder / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(ConfigError, match=message):
            Encoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": "true"}', "pooling_mode_mean_tokens is 'true'"),
        ("1_Pooling/config.json", '{"pooling_mode_mean_tokens": true, "include_prompt": 1}', "include_prompt is 1"),
        ("1_Pooling/config.json", '{"pooling_mode": "mean", "pooling_mode": "cls"}', "'pooling_mode' is there twice"),
        ("1_Pooling/config.json", "[" * 100_000, "nested too deep"),
        ("sentence_bert_config.json", '{"do_lower_case": "no"}', "do_lower_case is 'no', expected true or false"),
        ("sentence_bert_config.json", '{"max_seq_length": true}', "max_seq_length is True"),
        ("tokenizer_config.json", '{"model_max_length": "512"}', "model_max_length is '512'"),
        ("config_sentence_transformers.json", '{"prompts": []}', r"prompts are \[\]"),
        ("config_sentence_transformers.json", '{"prompts": ["a"]}', r"prompts and default_prompt_name are \['a'\]"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "q"}', "default_prompt_name is 'q', which"),
        ("config_sentence_transformers.json", '{"similarity_fn_name": 0}', "similarity_fn_name is 0"),
        (
            "config_sentence_transformers.json",
            '{"prompts": {"q": 5}, "default_prompt_name": "q"}',
            "the prompt 'q' is 5, expected a string",
        ),
    ],
)
def test_settings_of_another_type_are_named(file, content, message, tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    (tmp_path / "m" / "modules.json").write_text(json.dumps([TRANSFORMER, POOLING]))
    (tmp_path / "m" / "1_Pooling").mkdir()
    (tmp_path / "m" / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (tmp_path / "m" / file).write_text(content)
    with pytest.raises(BivecError, match=message) as error:
        Encoder.from_pretrained(tmp_path / "m")
    assert file in str(error.value)


@pytest.mark.parametrize("skip", ['"false"', "0", "null"])
def test_llm2vecs_flag_is_a_truth_value(skip, tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    (tmp_path / "m" / "llm2vec_config.json").write_text(f'{{"pooling_mode": "mean", "skip_instruction": {skip}}}')
    with pytest.raises(ConfigError, match=r"llm2vec_config\.json: skip_instruction is .*, expected true or false"):
        Encoder.from_pretrained(tmp_path / "m")


def test_lower_case_is_refused(tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    (tmp_path / "m" / "modules.json").write_text(json.dumps([TRANSFORMER]))
    (tmp_path / "m" / "sentence_bert_config.json").write_text('{"max_seq_length": 33, "do_lower_case": true}')
    with pytest.raises(ConfigError, match="do_lower_case is true"):
        Encoder.from_pretrained(tmp_path / "m")


def test_the_record_of_a_gguf_file_is_damaged(tiny_llama_dir, tmp_path):
    Encoder.from_pretrained(tiny_llama_dir).save_gguf(tmp_path / "m.gguf", dtype="f32")
    content = (tmp_path / "m.gguf").read_bytes()
    key = b"bivec.origin"
    assert content.count(key) == 1
    at = content.index(b"{", content.index(key))
    (tmp_path / "m.gguf").write_bytes(content[:at] + b"[" + content[at + 1 :])
    with pytest.raises(ConfigError, match=r"m\.gguf: bivec\.origin in the metadata is not JSON"):
        Encoder.from_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize("mode", ["weightedmean", "cls"])
def test_what_sentence_transformers_counts_differently_is_refused(mode, tiny_llama_dir, tmp_path):
    """Prompts outside of these poolings; weights of words before them."""
    model = sentence_transformer(tiny_llama_dir, mode=mode, include_prompt=False, prompts={"q": "Q: "})
    model.save(str(tmp_path / "st"))
    with pytest.raises(ConfigError, match=r"config_sentence_transformers\.json: has prompts that the pooling"):
        Encoder.from_pretrained(tmp_path / "st")
    edit(tmp_path / "st" / "config_sentence_transformers.json", prompts={"q": ""})
    close(Encoder.from_pretrained(tmp_path / "st").encode(TEXTS), model.encode(TEXTS))
    Encoder.from_pretrained(tiny_llama_dir, pool_bos=False).save_pretrained(tmp_path / "ours")
    reopened(tmp_path / "ours").save(str(tmp_path / "theirs"))
    (file,) = (tmp_path / "theirs").glob("*Pooling/config.json")
    content = json.loads(file.read_text())
    flags = {name: False for name in content if name.startswith("pooling_mode_")}
    edit(file, **flags, pooling_mode=mode)
    with pytest.raises(ConfigError, match="WordWeights is supported before a mean only"):
        Encoder.from_pretrained(tmp_path / "theirs")


def test_truncation_from_the_left_is_refused(tiny_llama_dir, tmp_path):
    sentence_transformer(tiny_llama_dir).save(str(tmp_path / "st"))
    edit(tmp_path / "st" / "tokenizer_config.json", truncation_side="left")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: truncation_side is 'left'"):
        Encoder.from_pretrained(tmp_path / "st")


def test_a_prompt_with_the_name_of_the_templates(tiny_llama_dir, tmp_path):
    base = Encoder.from_pretrained(tiny_llama_dir)
    config = EncoderConfig(template="doc: {text}", skip_instruction=False)
    encoder = Encoder(base.model, base.tokenizer, config, prompts={"template": "T: "})
    encoder.save_pretrained(tmp_path / "m")
    model = reopened(tmp_path / "m")
    close(model.encode(TEXTS), encoder.encode(TEXTS))
    close(model.encode(TEXTS, prompt_name="template"), encoder.encode(TEXTS, prompt_name="template"))


def test_a_gguf_file_of_others_that_appends_an_eos(tiny_llama_dir, tmp_path):
    """Without our keys: llama.cpp's pooling of the last token, which its own flag makes the EOS."""
    encoder = Encoder.from_pretrained(tiny_llama_dir, pooling="eos_token")
    encoder.save_gguf(tmp_path / "m.gguf", dtype="f32")
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content.replace(b"bivec.", b"other."))
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    assert again.config.pooling == "last_token" and again.tokenizer("x").input_ids[-1] == 1
    close(again.encode(TEXTS), encoder.encode(TEXTS), 1e-5)


@pytest.mark.parametrize("without_bos", ["eos"], indirect=True)
def test_an_encoder_that_appends_an_eos_as_gguf(without_bos, tmp_path):
    sentence_transformer(without_bos, mode="lasttoken").save(str(tmp_path / "st"))
    encoder = Encoder.from_pretrained(tmp_path / "st")
    encoder.save_gguf(tmp_path / "m.gguf", dtype="f32")
    again = Encoder.from_pretrained(tmp_path / "m.gguf")
    assert again.tokenizer(TEXTS).input_ids == encoder.tokenizer(TEXTS).input_ids
    close(again.encode(TEXTS), encoder.encode(TEXTS), 1e-5)


def test_the_hub_is_asked_for_every_layout():
    """Early versions of sentence-transformers gave the decoder a folder."""
    from fnmatch import fnmatch

    from bivec.engine.layouts import PATTERNS

    for name in ("0_Transformer/config.json", "0_Transformer/model.safetensors", "0_Transformer/tokenizer.json"):
        assert any(fnmatch(name, pattern) for pattern in PATTERNS), name
    for name in ("0_WordWeights/model.safetensors", "1_Pooling/config.json", "modules.json", "bivec_config.json"):
        assert any(fnmatch(name, pattern) for pattern in PATTERNS), name
    assert not any(fnmatch("pytorch_model.bin", pattern) for pattern in PATTERNS)


def test_dot_products_in_mteb(tiny_llama_dir):
    base = Encoder.from_pretrained(tiny_llama_dir)
    one, other = base.encode(TEXTS, convert_to_tensor=True), base.encode(TEXTS[::-1], convert_to_tensor=True)
    wrapped = Encoder(base.model, base.tokenizer, EncoderConfig(similarity="dot")).as_mteb()
    assert wrapped.mteb_model_meta.similarity_fn_name == "dot"
    close(wrapped.similarity(one, other), one @ other.T)
    close(wrapped.similarity_pairwise(one, other), (one * other).sum(1))
    assert base.as_mteb().mteb_model_meta.similarity_fn_name == "cosine"
