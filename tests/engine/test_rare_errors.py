"""Errors that no test of their module walks into: what the coverage of a whole run left over."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from bivec.engine.corpus import encode_corpus
from bivec.engine.corpus_files import CorpusFiles
from bivec.engine.data import load_texts, mntp_blocks
from bivec.engine.distributed import STORE_LOST, World, _Pulse, process_group
from bivec.engine.encoder import Encoder
from bivec.engine.encoder_config import EncoderConfig, is_encoder
from bivec.engine.entailment import entailment_triples
from bivec.engine.errors import CheckpointError, ConfigError, DataError, RunError
from bivec.engine.evaluation import study
from bivec.engine.evaluation.auto_encoder import _padded_batches
from bivec.engine.evaluation.word_data import read_conll2003
from bivec.engine.gguf_export import save_gguf
from bivec.engine.lora import LoraConfig, add_lora, load_adapter
from bivec.engine.origin import Origin
from bivec.engine.recipe import SupervisedStage
from bivec.engine.tokenizer import load_tokenizer


@pytest.fixture
def encoder(tiny_llama_dir):
    return Encoder.from_pretrained(tiny_llama_dir)


def test_settings_that_exclude_each_other():
    with pytest.raises(ConfigError, match="similarity 'l3' is unknown; choose one of cosine, dot"):
        EncoderConfig(similarity="l3")
    with pytest.raises(ConfigError, match="init_adapter is 'simcse', but tuning is 'full', which has no adapter"):
        SupervisedStage(tuning="full", init_adapter="simcse")
    with pytest.raises(ConfigError, match="on_bad_line is 'drop', expected one of error, skip"):
        SupervisedStage(on_bad_line="drop")


def test_one_adapter_at_a_time(encoder, tiny_llama_dir):
    add_lora(encoder.model, LoraConfig(rank=2), seed=0)
    with pytest.raises(ConfigError, match="already carries a LoRA adapter; merge or remove it first"):
        load_adapter(encoder.model, tiny_llama_dir)


def test_a_corpus_is_a_file(encoder, tmp_path):
    folder = tmp_path / "a.npy"
    folder.mkdir()
    with pytest.raises(ConfigError, match="is a folder; give the name of a file"):
        encode_corpus(encoder, ["a"], folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"), [('{"a": 1, "a": 2}', "the key 'a' is there twice"), ("9" * 5000, "digits")]
)
def test_json_lines_that_cannot_be_read(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"sent0": "a", "sent1": "b", "hard_neg": "c"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 3: not JSON that can be read.*{message}"):
        entailment_triples([tmp_path / "rows.jsonl"])


def test_a_table_without_a_text(tmp_path):
    (tmp_path / "a.csv").write_text('text,n\n"  ",1\n" ",2\n')
    with pytest.raises(DataError, match=r"a\.csv holds no texts"):
        load_texts(tmp_path / "a.csv", column="text", drop_empty=True)


@pytest.mark.parametrize(("budget", "most"), [(0, None), (8, 0)])
def test_batches_hold_something(budget, most):
    with pytest.raises(ValueError, match=f"must be at least 1, got {budget} and {most}"):
        list(_padded_batches([3, 2], budget, most))


def test_a_length_that_is_no_number(tiny_llama_dir, tmp_path):
    for file in tiny_llama_dir.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": "long"}))
    with pytest.raises(CheckpointError, match="model_max_length is 'long', expected a number of tokens"):
        load_tokenizer(tmp_path)


def test_gguf_knows_bpe_alone(encoder, tmp_path):
    from tokenizers import Tokenizer, models

    words = encoder.tokenizer.get_vocab()
    encoder.tokenizer._tokenizer = Tokenizer(models.WordLevel(words, unk_token=next(iter(words))))
    with pytest.raises(ConfigError, match="a tokenizer of kind 'WordLevel'; GGUF export knows BPE"):
        save_gguf(encoder, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_that_fails_is_named(tmp_path, monkeypatch):
    """Its training is a process of its own."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import sys; sys.exit(3)")
    monkeypatch.setattr(study.Study, "_identity", lambda *_: {"recipe": "x"})
    monkeypatch.setattr(study.Study, "_flags", lambda *_: [])
    monkeypatch.setattr(study.Study, "__post_init__", lambda _: None, raising=False)
    subject = study.Study(tmp_path / "run", recipe, tmp_path, tmp_path / "out")
    with pytest.raises(
        RunError, match=r"training the baseline uni\+simcse failed \(its error is above\): .*recipe\.py"
    ):
        subject._train("uni+simcse")


def test_blocks_with_a_bos_of_a_tokenizer_that_has_none(tiny_llama_dir):
    tokenizer = load_tokenizer(tiny_llama_dir)
    assert mntp_blocks(["a b c d"], tokenizer, 3, per_block_bos=True).special_mask[:, 0].all()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(DataError, match="puts no BOS in front of a text; give one, --set bos_token="):
        mntp_blocks(["a b c d"], tokenizer, 3, per_block_bos=True)


def test_an_origin_whose_flag_is_a_number():
    stored = {"base_model": None, "adapters": [{"name": "a", "sha256": "b", "whole": True}]}
    assert Origin.from_dict(stored, Path("config")).adapters[0].whole
    stored["adapters"][0]["whole"] = 1
    with pytest.raises(ConfigError, match=r"config: origin is .*whole that is neither true nor false"):
        Origin.from_dict(stored, Path("config"))


def test_a_tokenizer_with_more_entries_than_the_model_has_embeddings(tiny_llama_dir, tmp_path):
    folder = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    rules = json.loads((folder / "tokenizer.json").read_text())
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    rules["model"]["vocab"]["one more"] = size
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    with pytest.raises(CheckpointError, match=f"its vocabulary has the token id {size}, the model {size} embeddings"):
        Encoder.from_pretrained(folder)


def test_a_document_mark_ends_a_sentence(tmp_path):
    """Without a blank line in front of it, too."""
    (tmp_path / "a.txt").write_text("EU NNP I-NP I-ORG\n-DOCSTART- -X- O O\nItaly NNP I-NP I-LOC\n")
    assert read_conll2003(tmp_path / "a.txt").sentences == (("EU",), ("Italy",))


def test_a_corpus_with_a_slice_that_nobody_wrote(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(CorpusFiles, "write", lambda *_: None)
    with pytest.raises(RunError, match=r"a\.npy: 1 slices are missing; repeat the command"):
        encode_corpus(encoder, ["a"], tmp_path / "a.npy")
    assert not (tmp_path / "a.npy").exists()


def test_a_table_of_pairs_with_blank_lines(tmp_path):
    header, rows = "sentence1,sentence2,gold_label", ("a,b,entailment", "a,c,contradiction")
    (tmp_path / "a.csv").write_text("\n".join([header, "", rows[0], "", "", rows[1], ""]))
    (tmp_path / "b.csv").write_text("\n".join([header, *rows]))
    assert entailment_triples([tmp_path / "a.csv"]) == entailment_triples([tmp_path / "b.csv"])
    (tmp_path / "a.csv").write_text(f"{header}\n\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv, line 3: 2 columns instead of 3"):
        entailment_triples([tmp_path / "a.csv"])


@pytest.mark.parametrize(("before", "after"), [(b'{"', b'["'), (b'"pooling"', b'"poolinh"')], ids=["JSON", "field"])
def test_a_gguf_file_whose_settings_are_damaged(encoder, tmp_path, before, after):
    file = tmp_path / "m.gguf"
    encoder.save_gguf(file, dtype="f32")
    content = file.read_bytes()
    at = content.index(before, content.index(b"bivec.encoder"))
    file.write_bytes(content[:at] + after + content[at + len(before) :])
    with pytest.raises(ConfigError, match=r"m\.gguf: bivec\.encoder is not what bivec writes \("):
        Encoder.from_pretrained(file)


def test_a_gguf_file_of_a_decoder(encoder, tmp_path):
    """It says nothing of pooling: it is no encoder, and gets what any decoder gets."""
    file = tmp_path / "m.gguf"
    encoder.save_gguf(file, dtype="f32")
    assert is_encoder(file)
    file.write_bytes(file.read_bytes().replace(b"bivec.", b"other.").replace(b".pooling_type", b".pooling_kind"))
    assert not is_encoder(file)
    assert Encoder.from_pretrained(file).config == encoder.config


def test_machines_without_an_address(monkeypatch):
    """``srun`` does not set it."""
    for name in ("MASTER_ADDR", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ConfigError, match=r"MASTER_ADDR is not set: .*export MASTER_ADDR=\$\(scontrol"),
        process_group(World(2, 4, 0, 2), "cpu"),
    ):
        pass
    assert not torch.distributed.is_initialized()


def test_processes_that_do_not_meet(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # nobody listens there
        port = probe.getsockname()[1]
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    with (
        pytest.raises(RunError, match=f"rank 1 of 2 did not meet the others at 127.0.0.1:{port}: "),
        process_group(World(1, 2, 1, 2), "cpu", timeout_seconds=1.0),
    ):
        pass


def test_a_store_that_is_gone():
    """With rank 0, whose process held it."""
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pulse = _Pulse(TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False), World(1, 2, 1, 2))
    server.add("alive/0", 1)
    del server
    assert pulse._silent() == pulse.lost() == STORE_LOST
    pulse.stop()
