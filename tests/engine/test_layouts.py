"""Folders of other people's making: LLM2Vec's adapters as PEFT writes them, sentence-transformers', and bad ones."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bivec import Encoder
from bivec.engine.encoder_config import EncoderConfig, write_settings
from bivec.engine.errors import BivecError, CheckpointError, ConfigError
from bivec.engine.lora import PROJECTIONS, LoraConfig, add_lora
from bivec.engine.origin import Origin, loaded_fingerprint
from bivec.models import load_pretrained

TEXTS = ["A lobster is blue.", "The red colour only appears after cooking, which takes some time.", "x"]
BASE = "meta-llama/Meta-Llama-3-8B-Instruct"
LLM2VEC = {"pooling_mode": "mean", "max_length": 128, "doc_max_length": 400, "skip_instruction": True}
MODULE = "modeling_llama_encoder"
AUTO_MAPPING = {
    "mntp": {"base_model_class": "LlamaEncoderModel", "parent_library": f"transformers_modules.x.{MODULE}"},
    "local": {"base_model_class": "LlamaBiModel", "parent_library": "llm2vec.models.bidirectional_llama"},
}


def close(one, other, tolerance=1e-4):
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=tolerance)


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def bidirectional(directory):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    model.config.is_causal = False
    return model


def add_with_peft(model, folder, seed, *, base, kind):
    """Puts a random adapter on a model, saves it as LLM2Vec's training does, and merges it."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, bias="none", target_modules=list(PROJECTIONS))
    with_adapter = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in with_adapter.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    with_adapter.save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(base), auto_mapping=AUTO_MAPPING[kind])
    stored = load_file(folder / "adapter_model.safetensors")
    assert "base_model.model.layers.0.self_attn.q_proj.lora_A.weight" in stored  # the trunk's names (METHOD 9.2)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    return with_adapter.merge_and_unload()


def mean(model, tokenizer, texts, skip=0):
    """The mean of every text's tokens, one text at a time; ``skip`` leaves out the first ones."""
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        vectors.append(hidden[skip:].mean(0).numpy())
    return np.stack(vectors)


@pytest.fixture(scope="module")
def released(tiny_llama_dir, tmp_path_factory):
    """The three repositories of a released model, its decoder, and the vectors that PEFT and transformers give."""
    root = tmp_path_factory.mktemp("released")
    base = root / "base"
    shutil.copytree(tiny_llama_dir, base)
    tokenizer = Encoder.from_pretrained(base).tokenizer
    model, vectors = bidirectional(base), {}
    vectors["base"] = mean(model, tokenizer, TEXTS)
    for seed, name in enumerate(("mntp", "mntp-unsup-simcse")):
        model = add_with_peft(model, root / name, seed, base=base, kind="mntp")
        vectors[name] = mean(model, tokenizer, TEXTS)
    mntp = root / "mntp"
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / file, mntp / file)
    auto_map = {"AutoModel": f"{MODULE}.LlamaEncoderModel"}
    edit(mntp / "config.json", auto_map=auto_map, _name_or_path=str(base), architectures=["LlamaEncoderModel"])
    # code of a repository is never run: this would end the process
    (mntp / f"{MODULE}.py").write_text("raise SystemExit('ran code of a checkpoint')")
    return root, vectors


def test_the_released_layout(released, tmp_path):
    """`-mntp` is a config.json with an adapter, which goes into the decoder first; the second adapter is given."""
    root, vectors = released
    mntp = Encoder.from_pretrained(root / "mntp")
    assert mntp.config == EncoderConfig()
    close(mntp.encode(TEXTS), vectors["mntp"])
    assert np.abs(vectors["mntp"] - vectors["base"]).max() > 1e-2
    whole = Encoder.from_pretrained(root / "mntp", adapters=[root / "mntp-unsup-simcse"])
    close(whole.encode(TEXTS), vectors["mntp-unsup-simcse"])
    assert np.abs(vectors["mntp-unsup-simcse"] - vectors["mntp"]).max() > 1e-2
    # from the decoder itself, and with the adapter left unmerged
    close(Encoder.from_pretrained(root / "base", adapters=[root / "mntp"]).encode(TEXTS), vectors["mntp"])
    live = Encoder.from_pretrained(root / "mntp", adapters=[root / "mntp-unsup-simcse"], merge=False)
    close(live.encode(TEXTS), vectors["mntp-unsup-simcse"])
    with pytest.raises(CheckpointError, match="merge the adapter first"):
        live.save_pretrained(tmp_path / "live")
    live.adapter.remove()
    close(live.encode(TEXTS), vectors["mntp"])
    assert whole.adapter is None
    # the sum of both is the same in any order, which is why the record is looked at
    assert [one.name for one in whole.origin.adapters] == ["mntp", "mntp-unsup-simcse"]


def test_what_is_saved_of_it_opens_everywhere(released, tmp_path):
    from sentence_transformers import SentenceTransformer

    root, vectors = released
    encoder = Encoder.from_pretrained(root / "mntp", adapters=[root / "mntp-unsup-simcse"])
    encoder.save_pretrained(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py")) and not list((tmp_path / "out").glob("adapter*"))
    close(SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS), vectors["mntp-unsup-simcse"])
    again = Encoder.from_pretrained(tmp_path / "out")
    assert again.origin == encoder.origin and len(again.origin.adapters) == 2


def test_local_folders_without_a_config(released, tmp_path):
    """What LLM2Vec's training leaves is an adapter alone, which it could not open itself (its issue #173)."""
    root, vectors = released
    mntp = tmp_path / "mntp"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        mntp.mkdir(exist_ok=True)
        shutil.copy(root / "mntp" / name, mntp / name)
    edit(mntp / "adapter_config.json", auto_mapping=AUTO_MAPPING["local"])
    close(Encoder.from_pretrained(mntp).encode(TEXTS), vectors["mntp"])
    simcse = tmp_path / "simcse"  # its base is the folder of the first stage, as the original's configs have it
    shutil.copytree(root / "mntp-unsup-simcse", simcse)
    edit(simcse / "adapter_config.json", base_model_name_or_path=str(mntp), auto_mapping=AUTO_MAPPING["local"])
    (simcse / "llm2vec_config.json").write_text(json.dumps(LLM2VEC))
    expected = EncoderConfig(pool_bos=False, max_length=128)
    for encoder in (Encoder.from_pretrained(simcse), Encoder.from_pretrained(mntp, adapters=[simcse])):
        assert encoder.config == expected
        assert [one.name for one in encoder.origin.adapters] == ["mntp", "simcse"]
        assert encoder.origin.base_model == "base"
        whole = bidirectional(root / "base")
        for name in (mntp, simcse):
            import peft

            whole = peft.PeftModel.from_pretrained(whole, name).merge_and_unload()
        close(encoder.encode(TEXTS), mean(whole, encoder.tokenizer, TEXTS, skip=1))
    # what is asked for counts first
    assert Encoder.from_pretrained(simcse, max_length=64, pool_bos=True).config == EncoderConfig(max_length=64)


def test_a_base_that_is_not_here(released, tmp_path):
    root, _ = released
    shutil.copytree(root / "mntp-unsup-simcse", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    for base, message in (
        ("/not/here", "an adapter on /not/here, which cannot be opened"),
        (None, "names no base_model_name_or_path; give the model"),
        (str(tmp_path / "adapter"), "names itself as the base model"),
    ):
        edit(config, base_model_name_or_path=base)
        with pytest.raises(CheckpointError, match=message) as error:
            Encoder.from_pretrained(tmp_path / "adapter")
        assert str(tmp_path / "adapter") in str(error.value)
    edit(config, base_model_name_or_path="/not/here")
    Encoder.from_pretrained(root / "mntp", adapters=[tmp_path / "adapter"])  # a base that is given is not asked for


def test_an_adapter_that_is_in_the_weights(released, tmp_path):
    root, _ = released
    message = "this adapter is in the weights already: mntp was merged"
    with pytest.raises(CheckpointError, match=message):
        Encoder.from_pretrained(root / "mntp", adapters=[root / "mntp"])
    with pytest.raises(CheckpointError, match=message):
        Encoder.from_pretrained(root / "base", adapters=[root / "mntp", root / "mntp"])
    Encoder.from_pretrained(root / "mntp").save_pretrained(tmp_path / "merged")
    # known by its matrices, whatever it is called and however it was stored
    shutil.copytree(root / "mntp", tmp_path / "copy")
    tensors = load_file(root / "mntp" / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.model.layers"): tensor for name, tensor in tensors.items()}
    save_file(dict(reversed(renamed.items())), tmp_path / "copy" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Encoder.from_pretrained(tmp_path / "merged", adapters=[tmp_path / "copy"])
    Encoder.from_pretrained(tmp_path / "merged", adapters=[root / "mntp-unsup-simcse"])


def test_an_adapter_of_another_base(released, tiny_dir, tmp_path):
    root, _ = released
    adapter = tmp_path / "adapter"
    shutil.copytree(root / "mntp-unsup-simcse", adapter)
    other = "mistralai/Mistral-7B-v0.1"
    edit(adapter / "adapter_config.json", base_model_name_or_path=other)
    # by shape: the tensor, both shapes and the base that it names
    message = r"q_proj\.lora_B\.weight has shape \[64, 4\], expected \[128, 4\]; .* names mistralai/Mistral"
    with pytest.raises(CheckpointError, match=message):
        Encoder.from_pretrained(tiny_dir("qwen3"), adapters=[adapter])
    # by name: Mistral-7B and Llama-3-8B have the same shapes
    named = tmp_path / "named"
    shutil.copytree(root / "base", named)
    edit(named / "config.json", _name_or_path=BASE)
    with pytest.raises(CheckpointError, match=f"trained on {other}, the model is {BASE}") as error:
        Encoder.from_pretrained(named, adapters=[adapter])
    assert f"write {BASE!r} as base_model_name_or_path into {adapter / 'adapter_config.json'}" in str(error.value)
    edit(adapter / "adapter_config.json", base_model_name_or_path=BASE)
    Encoder.from_pretrained(named, adapters=[adapter])
    edit(adapter / "adapter_config.json", base_model_name_or_path="/a/folder/of/any/name")
    Encoder.from_pretrained(named, adapters=[adapter])
    # what may be a folder in a folder is no name of the hub, whatever lies in the working directory
    edit(named / "config.json", _name_or_path="checkpoints/llama")
    edit(adapter / "adapter_config.json", base_model_name_or_path=BASE)
    Encoder.from_pretrained(named, adapters=[adapter])


def test_folders_of_no_known_layout(released, tiny_llama_dir, tmp_path):
    root, _ = released

    def told(folder):
        with pytest.raises(BivecError) as error:
            Encoder.from_pretrained(folder)
        assert str(folder) in str(error.value)
        return str(error.value)

    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "weights.h5").write_text("")
    message = told(tmp_path / "odd")
    for wanted in ("config.json with model.safetensors", "adapter_config.json", "modules.json", "merged/", "*.gguf"):
        assert wanted in message
    assert message.endswith("there is weights.h5")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "m.gguf").write_text("")
    assert f"give the file itself: {tmp_path / 'gguf' / 'm.gguf'}" in told(tmp_path / "gguf")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "no merged/ yet" in told(tmp_path / "run")
    shutil.copytree(tiny_llama_dir, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(root / "mntp" / name, tmp_path / "both" / name)
    assert "holds whole weights and an adapter" in told(tmp_path / "both")
    (tmp_path / "bin").mkdir()
    shutil.copy(tiny_llama_dir / "config.json", tmp_path / "bin" / "config.json")
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickles, which can run code" in told(tmp_path / "bin")
    (tmp_path / "binary").mkdir()
    shutil.copy(root / "mntp" / "adapter_config.json", tmp_path / "binary" / "adapter_config.json")
    (tmp_path / "binary" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    assert "adapters stored as .bin are pickles" in told(tmp_path / "binary")


@pytest.fixture
def stages(tiny_llama_dir, tmp_path):
    """A run of two stages, whose adapters name the decoder both and say what they were trained on."""
    model, origin = load_pretrained(tiny_llama_dir).model, Origin("llama")
    for seed, name in enumerate(("mntp", "simcse")):
        adapter = add_lora(model, LoraConfig(rank=2), seed)
        for parameter in adapter.named_parameters().values():
            parameter.data.normal_(std=0.05)
        write = partial(write_settings, config=EncoderConfig(pool_bos=False), bos_token="<s>", trained_on=origin)
        adapter.save(tmp_path / name, str(tiny_llama_dir), write_more=write)
        origin = origin.with_adapter(tmp_path / name, loaded_fingerprint(adapter))
        adapter.merge()
    return tmp_path


def test_an_adapter_is_put_on_what_it_was_trained_on(stages, tiny_llama_dir, tmp_path, monkeypatch):
    """A later stage's needs the earlier ones in the weights, all of them, in their order, and nothing else."""
    mntp, simcse = stages / "mntp", stages / "simcse"
    assert Encoder.from_pretrained(mntp).config.pool_bos is False
    shutil.copytree(simcse, tmp_path / "elsewhere" / "copy")
    for path, adapters in (
        (simcse, []),
        (tiny_llama_dir, [simcse]),
        (tiny_llama_dir, [simcse, mntp]),
        (tmp_path / "elsewhere" / "copy", []),
        (tiny_llama_dir, [tmp_path / "elsewhere" / "copy"]),
    ):
        with pytest.raises(CheckpointError, match=r"was trained on weights that hold mntp .*, these hold nothing"):
            Encoder.from_pretrained(path, adapters=adapters)
    monkeypatch.chdir(simcse)
    with pytest.raises(CheckpointError, match="was trained on weights that hold mntp"):
        Encoder.from_pretrained(".")
    with pytest.raises(CheckpointError) as error:
        Encoder.from_pretrained(simcse)
    assert f"Encoder.from_pretrained('llama', adapters=['{mntp}', '{simcse}'])" in str(error.value)
    both = Encoder.from_pretrained(tiny_llama_dir, adapters=[mntp, simcse])
    assert [one.name for one in both.origin.adapters] == ["mntp", "simcse"] and both.config.pool_bos is False
    Encoder.from_pretrained(mntp).save_pretrained(stages / "half")
    close(Encoder.from_pretrained(stages / "half", adapters=[simcse]).encode(TEXTS), both.encode(TEXTS))
    # one that stands for a stage and those before it, as a supervised stage that went on with SimCSE's
    edit(simcse / "bivec_config.json", trained_on=Origin("llama").to_dict())
    with pytest.raises(CheckpointError, match=r"was trained on weights that hold nothing .*, these hold mntp"):
        Encoder.from_pretrained(tiny_llama_dir, adapters=[mntp, simcse])
    Encoder.from_pretrained(tiny_llama_dir, adapters=[simcse])


def test_adapters_of_the_hub_are_named_by_their_repository(tmp_path):
    place = tmp_path / "models--McGill-NLP--LLM2Vec-mntp" / "snapshots" / "0123abcd"
    assert Origin().with_adapter(place, "x").adapters[0].name == "LLM2Vec-mntp"


def test_a_live_adapter(stages, tiny_llama_dir, tmp_path):
    """It is on record when it is in the weights, and only then."""
    mntp, simcse = stages / "mntp", stages / "simcse"
    live = Encoder.from_pretrained(tiny_llama_dir, adapters=[mntp, simcse], merge=False)
    assert [one.name for one in live.origin.adapters] == ["mntp"]
    live.adapter.remove()
    live.save_pretrained(tmp_path / "without")
    assert "In the weights, in this order: mntp." in (tmp_path / "without" / "README.md").read_text(encoding="utf-8")
    whole = Encoder.from_pretrained(tmp_path / "without", adapters=[simcse])
    other = Encoder.from_pretrained(tiny_llama_dir, adapters=[mntp, simcse], merge=False)
    vectors = other.encode(TEXTS)
    other.adapter.merge()
    assert other.origin.adapters == whole.origin.adapters
    for again in (other.adapter.merge, other.adapter.remove):
        with pytest.raises(ConfigError, match="simcse: the adapter is in the weights already"):
            again()
    with pytest.raises(ConfigError, match="simcse: the adapter was taken off already"):
        live.adapter.merge()
    close(other.encode(TEXTS), vectors)
    close(whole.encode(TEXTS), vectors)
    with pytest.raises(CheckpointError, match="is in the weights already: mntp was merged"):
        Encoder.from_pretrained(tiny_llama_dir, adapters=[mntp, mntp], merge=False)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_changed_the_base_are_refused(start, tiny_llama_dir, tmp_path):
    """PEFT takes from the base's weights what such an adapter begins with, and again when it loads it."""
    import peft
    from transformers import AutoModel

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(AutoModel.from_pretrained(tiny_llama_dir), config).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"adapter_config\.json: init_lora_weights='{start}' changes the base"):
        Encoder.from_pretrained(tiny_llama_dir, adapters=[tmp_path / "a"])


def test_a_base_beside_the_adapter(released, tmp_path):
    """A relative path may be meant from where the adapter lies."""
    root, vectors = released
    shutil.copytree(root / "base", tmp_path / "base")
    shutil.copytree(
        root / "mntp", tmp_path / "mntp", ignore=shutil.ignore_patterns("*.py", "config.json", "tokenizer*")
    )
    for base in ("base", "../base"):
        edit(tmp_path / "mntp" / "adapter_config.json", base_model_name_or_path=base)
        close(Encoder.from_pretrained(tmp_path / "mntp").encode(TEXTS), vectors["mntp"])


@pytest.mark.parametrize("causal", [False, None])
@pytest.mark.parametrize("mode", ["mean", "weightedmean", "lasttoken", "cls"])
def test_folders_that_sentence_transformers_writes(mode, causal, tiny_llama_dir, tmp_path):
    """Its own save, with a default prompt and unit vectors; without ``is_causal`` in config.json it runs causal."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer

    shutil.copytree(tiny_llama_dir, tmp_path / "base")
    if causal is not None:
        edit(tmp_path / "base" / "config.json", is_causal=causal)
    transformer = Transformer(str(tmp_path / "base"), max_seq_length=40)
    modules = [transformer, Pooling(64, pooling_mode=mode), Normalize()]
    model = SentenceTransformer(modules=modules, prompts={"p": "query: "}, default_prompt_name="p", device="cpu")
    model.save(str(tmp_path / "st"))
    encoder = Encoder.from_pretrained(tmp_path / "st")
    assert (encoder.config.causal, encoder.config.max_length) == (causal is None, 40)
    assert encoder.prompts == model.prompts and encoder.prompts["p"] == "query: "
    texts = [*TEXTS, " ".join(TEXTS * 3)]
    close(encoder.encode(texts), model.encode(texts))


def test_the_decoder_in_a_folder_of_its_own(tiny_llama_dir, tmp_path):
    """As early versions of sentence-transformers wrote it."""
    shutil.copytree(tiny_llama_dir, tmp_path / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "0_Transformer" / "sentence_bert_config.json").write_text('{"max_seq_length": 33}')
    encoder = Encoder.from_pretrained(tmp_path)
    assert encoder.config == EncoderConfig(causal=True, max_length=33)
    (tmp_path / "modules.json").write_text(json.dumps([{**modules[0], "path": "elsewhere"}]))
    with pytest.raises(CheckpointError, match=r"elsewhere: no such directory, though modules\.json names it"):
        Encoder.from_pretrained(tmp_path)


def test_an_origin_that_is_not_ours(tiny_llama_dir, tmp_path):
    shutil.copytree(tiny_llama_dir, tmp_path / "m")
    for origin in ([], {"base_model": "x"}, {"base_model": "x", "adapters": [1]}):
        (tmp_path / "m" / "bivec_config.json").write_text(json.dumps({"origin": origin}))
        with pytest.raises(ConfigError, match=r"bivec_config\.json: origin is"):
            Encoder.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "bivec_config.json").write_text(json.dumps({"origin": Origin("x").to_dict()}))
    assert Encoder.from_pretrained(tmp_path / "m").origin == Origin("x")


def test_the_settings_are_the_adapters_taken_off_or_not(stages, tiny_llama_dir):
    """The decoder's own come with a decoder that is opened without it."""
    edit(stages / "mntp" / "bivec_config.json", pooling="last_token")
    live = Encoder.from_pretrained(tiny_llama_dir, adapters=[stages / "mntp"], merge=False)
    assert live.config.pooling == "last_token"
    live.adapter.remove()
    assert live.config.pooling == "last_token"
    alike = Encoder.from_pretrained(tiny_llama_dir, pooling="last_token", pool_bos=False)
    close(live.encode(TEXTS), alike.encode(TEXTS), tolerance=1e-6)
    assert Encoder.from_pretrained(tiny_llama_dir).config.pooling == "mean"
