"""A whole run on decoders that are no LLaMA: its merged model is the same in transformers and here."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers

from bivec import Encoder

TEXTS = ["The capital of Japan is Tokyo.", "Encoders read the whole sentence at once, " * 4, "Short."]
FULL = ("--set", "mntp.tuning=full", "--set", "simcse.tuning=full")


@pytest.mark.parametrize(
    ("family", "flags"), [("qwen2", ()), ("qwen3", ()), ("smollm3", ()), ("gemma2", ()), ("gemma3_text", FULL)]
)
def test_a_run(family, flags, recipe, execute, tiny_dir, tmp_path):
    model, run = tiny_dir(family), tmp_path / "run"
    execute(replace(recipe, model=str(model), supervised_data=None), run, "--stages", "bi,mntp,simcse", *flags)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for stage in ("mntp", "simcse"):
        losses = [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        assert len(losses) == 4 and all(map(math.isfinite, losses))

    encoder = Encoder.from_pretrained(run)
    # before transformers 5.21 "sdpa" leaves out the cap on Gemma 2's attention scores
    attention = {"attn_implementation": "eager"} if family == "gemma2" else {}
    theirs = transformers.AutoModel.from_pretrained(run / "merged", **attention).eval()
    assert type(theirs).__name__ == encoder.model.config.family.trunk and theirs.config.is_causal is False
    encoded = transformers.AutoTokenizer.from_pretrained(run / "merged")(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        hidden = theirs(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).last_hidden_state
    untrained = Encoder.from_pretrained(model, causal=False).encode_tokens(TEXTS)
    for ours, padded, mask, before in zip(
        encoder.encode_tokens(TEXTS), hidden, encoded["attention_mask"].bool(), untrained, strict=True
    ):
        assert (ours - padded[mask]).abs().max() <= 1e-4
        assert (ours - before).abs().max() > 1e-2  # it has learnt something
