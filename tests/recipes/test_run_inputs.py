"""Bad input is one clear error before any work; and a recipe of some stages only."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from bivec.engine.encoder import Encoder
from bivec.engine.inputs import load_inputs


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ("bi", ["bi"]),
        ("bi,simcse", ["bi", "bi+simcse"]),
        ("bi,mntp", ["bi", "bi+mntp"]),
    ],
)
def test_some_stages_only(execute, stages, names, recipe, tmp_path, capsys):
    """Data of a stage that is not run need not be there."""
    absent = [flag for stage in ("mntp", "simcse") if stage not in stages for flag in (f"--{stage}-data", "none.txt")]
    execute(recipe, tmp_path, "--stages", stages, *absent)
    results = json.loads((tmp_path / "results.json").read_text())["stages"]
    assert [stage["stage"] for stage in results] == ["uni", "uni weighted-mean", *names]
    assert all(stage["sts_test_spearman"] is not None for stage in results)
    logged = {json.loads(line)["stage"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()}
    assert logged == set(stages.split(",")) - {"bi"}
    assert {"mntp", "simcse"} & {path.name for path in tmp_path.iterdir()} == logged
    assert (tmp_path / "results.png").stat().st_size > 5000 and f"| {names[-1]} | mean |" in capsys.readouterr().out
    assert Encoder.from_pretrained(tmp_path).encode("A text.").shape == (64,)


def copy_of(model, folder, change):
    """A checkpoint with its config.json changed."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config.update(change)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_random_replacements_are_tokens_of_the_tokenizer(recipe, tiny_llama_dir, tmp_path):
    """Many checkpoints pad the embedding: the rows beyond the tokenizer's have never been trained."""
    folder = copy_of(tiny_llama_dir, tmp_path / "padded", {"vocab_size": 1024})
    weights = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.zeros(24, 64)])
    save_file(weights, folder / "model.safetensors")
    inputs = load_inputs(replace(recipe, model=str(folder)))
    assert (inputs.config.vocab_size, inputs.masking.vocab_size) == (1024, len(inputs.tokenizer)) == (1024, 1000)


def test_bad_text_is_found_before_any_work(fails, recipe, tmp_path):
    out, bad = tmp_path / "run", tmp_path / "bad.txt"
    bad.write_bytes("Erste Zeile.\nZweite.\nf\xfcnf\n".encode("latin-1"))
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.write_text("\n \n")
    short.write_text("One sentence.\nTwo.\n")
    pair = tmp_path / "pair.csv"
    pair.write_text("a,b,1.0\n")
    for flags, message in (
        (["--mntp-data", bad], f"--mntp-data (running text: paragraphs or articles): {bad}, line 3: not UTF-8"),
        (["--simcse-data", bad], f"{bad}, line 3: not UTF-8"),
        (["--mntp-data", empty], f"{empty} is empty: give --mntp-data"),
        (["--simcse-data", empty], f"{empty} is empty: give --simcse-data"),
        (["--mntp-data", short], "--mntp-data (running text: paragraphs or articles): 2 rows of text with"),
        (["--mntp-data", short, "--set", "mntp.sequence_length=4"], "one step needs 6; give more text or --set mntp."),
        (["--simcse-data", short], "holds 2 sentences, one step needs 8; give more text or --set simcse.batch_size=2"),
        (["--sts-test", pair], f"--sts-test: {pair}: holds 1 pair, a correlation needs two"),
        (["--sts-dev", tmp_path / "no.csv"], "--sts-dev: "),
    ):
        error = fails(recipe, out, *flags)
        assert message in error and error.startswith("error: the recipe cannot start: ") and error.count("\n") == 1
    error = fails(recipe, out, "--mntp-data", bad, "--simcse-data", empty, "--sts-dev", pair)
    assert error.count("\n  --") == 3 and "--mntp-data" in error and "--simcse-data" in error and "--sts-dev" in error
    assert not out.exists()


def test_a_bad_checkpoint_is_found_before_any_work(execute, fails, recipe, tiny_llama_dir, tmp_path):
    out = tmp_path / "run"
    weights = load_file(tiny_llama_dir / "model.safetensors")
    for name, change, message in (
        ("other", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ("rope", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("cut", {}, "not a complete safetensors file"),
        ("gone", {}, "neither model.safetensors nor"),
        ("headless", {}, "has no LM head, which MNTP needs; use the CausalLM checkpoint or --stages bi,simcse"),
        ("small", {"vocab_size": 900}, "the model's vocabulary ends at 899"),
        ("no-tokenizer", {}, "neither tokenizer.json nor tokenizer.model"),
    ):
        folder = copy_of(tiny_llama_dir, tmp_path / name, change)
        file = folder / "model.safetensors"
        if name == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif name == "gone":
            file.unlink()
        elif name == "headless":
            save_file({key: value for key, value in weights.items() if key != "lm_head.weight"}, file)
        elif name == "small":
            wide = ("model.embed_tokens.weight", "lm_head.weight")
            save_file({key: value[:900].clone() if key in wide else value for key, value in weights.items()}, file)
        elif name == "no-tokenizer":
            (folder / "tokenizer.json").unlink()
        error = fails(recipe, out, "--model", folder)
        assert message in error and str(folder) in error + str(folder) * (name == "small"), error
        assert not out.exists(), name
    execute(recipe, out, "--model", tmp_path / "headless", "--stages", "bi,simcse")  # the way out that the error names


def test_a_vocabulary_without_the_mask_token(execute, fails, recipe, tiny_llama_dir, tmp_path):
    folder = copy_of(tiny_llama_dir, tmp_path / "model", {})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["\u4e00"] = vocabulary.pop("_")
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "_" not in pair]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    out = tmp_path / "run"
    error = fails(recipe, out, "--model", folder)
    assert "--set mntp.mask_token: mask token 'blank': '_' is not one token of the vocabulary; use 'eos'" in error
    assert not out.exists()
    execute(recipe, out, "--model", folder, "--stages", "bi,mntp", "--set", "mntp.mask_token=eos")


def test_bad_settings_are_found_before_any_work(fails, recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for flags, message in (
        (["--set", "mntp.sequence_length=2048"], "mntp.sequence_length: 2048 tokens exceed the model's 1024 positions"),
        (["--set", "simcse.max_length=1025"], "simcse.max_length: 1025 tokens exceed the model's 1024 positions"),
        (["--set", "mntp.mask_token=mask"], "the tokenizer has no mask token of its own"),
        (["--set", "mntp.steps=3"], "no such hyper-parameter"),
        (["--stages", "bi,mlm"], "unknown stage mlm"),
        (["--device", "nonsense"], "--device nonsense: not usable here"),
        (["--device", "cpu", "--backend", "triton"], "--backend: flash_attention: backend="),
        (["--dtype", "int8"], "dtype int8: no floating-point dtype of torch"),
        (["--model", tmp_path / "nowhere"], f"{tmp_path / 'nowhere'}: no such directory"),
    ):
        error = fails(recipe, out, *flags)
        assert message in error and error.startswith("error: ") and not out.exists()
    if not torch.cuda.is_available():
        assert "--device cuda: not usable here" in fails(recipe, out, "--device", "cuda")
    monkeypatch.setenv("BIVEC_BACKEND", "nonsense")
    assert "BIVEC_BACKEND" in fails(recipe, out)
    assert not out.exists()
