"""bivec export: what other libraries open gives our vectors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bivec.engine.encoder import Encoder
from bivec.engine.lora import LoraConfig, add_lora

TEXTS = ["a choir sang", "the river runs north", "old kings"]


def test_sentence_transformers_gives_the_same_vectors(bivec_json, tiny_llama_dir, tmp_path):
    from sentence_transformers import SentenceTransformer

    out = tmp_path / "out"
    document = bivec_json("export", tiny_llama_dir, out, "--normalize", "--pooling", "weighted_mean")
    assert (document["output"], document["format"]) == (str(out), "sentence-transformers")
    assert sorted(document["files"]) == sorted(str(file) for file in out.rglob("*") if file.is_file())
    assert document["bytes"] == sum(Path(file).stat().st_size for file in document["files"])
    ours = Encoder.from_pretrained(tiny_llama_dir, pooling="weighted_mean").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode(TEXTS), ours, rtol=0, atol=1e-4)


def test_dtype_of_the_weights(bivec, tiny_llama_dir, tmp_path):
    printed, _ = bivec("export", tiny_llama_dir, tmp_path / "half", "--dtype", "bf16")
    assert printed.startswith(f"{tmp_path / 'half'}: sentence-transformers, ")
    assert {x.dtype for x in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    bivec("export", tiny_llama_dir, tmp_path / "whole")
    assert {x.dtype for x in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-5), ("float16", 1e-2)])
def test_gguf_by_the_name_of_the_file(bivec_json, tiny_llama_dir, tmp_path, dtype, tolerance):
    out = tmp_path / "e.gguf"
    document = bivec_json("export", tiny_llama_dir, out, "--dtype", dtype)
    assert document["format"] == "gguf" and document["files"] == [str(out)]
    ours = Encoder.from_pretrained(tiny_llama_dir).encode(TEXTS)
    found = Encoder.from_pretrained(out).encode(TEXTS)
    assert 0 < np.abs(found - ours).max() < tolerance or dtype == "f32"
    np.testing.assert_allclose(found, ours, rtol=0, atol=tolerance)


def test_adapters_are_merged_in_their_order(bivec, tiny_llama_dir, tmp_path):
    adapters = []
    for seed in (1, 2):
        encoder = Encoder.from_pretrained(tiny_llama_dir)
        adapter = add_lora(encoder.model, LoraConfig(rank=4, alpha=8, dropout=0.0), seed=seed)
        with torch.no_grad():
            for parameter in adapter.named_parameters().values():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
        adapters.append(tmp_path / f"adapter{seed}")
        adapter.save(adapters[-1], str(tiny_llama_dir))
    flags = [word for adapter in adapters for word in ("--adapter", adapter)]
    bivec("export", tiny_llama_dir, tmp_path / "out", *flags)
    expected = Encoder.from_pretrained(tiny_llama_dir, adapters=adapters).encode(TEXTS)
    np.testing.assert_allclose(Encoder.from_pretrained(tmp_path / "out").encode(TEXTS), expected, rtol=0, atol=1e-5)
    assert np.abs(expected - Encoder.from_pretrained(tiny_llama_dir).encode(TEXTS)).max() > 1e-2


def test_what_others_cannot_say_is_a_warning(bivec_json, bivec, tiny_llama_dir, tmp_path):
    flags = ["--template", "mistral"]
    document = bivec_json("export", tiny_llama_dir, tmp_path / "out", *flags)
    (note,) = document["warnings"]
    assert "other libraries do not give this encoder's vectors" in note
    printed, said = bivec("export", tiny_llama_dir, tmp_path / "again", *flags)
    assert "bivec: warning: " in said and "warning" not in printed


def test_what_is_refused(bivec, tiny_dir, tiny_llama_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps({}))
    for words, code, message in (
        ((tiny_llama_dir, out), 1, "holds an adapter"),
        ((tiny_llama_dir, tmp_path / "x.bin", "--format", "gguf"), 1, "give a file name that ends in .gguf"),
        ((tiny_dir("gemma"), tmp_path / "x.gguf"), 1, "no GGUF of model type 'gemma'"),
        ((tiny_llama_dir, tmp_path / "x.gguf", "--normalize"), 2, "are of a folder; llama.cpp has --embd-normalize"),
        ((tiny_llama_dir, tmp_path / "x.gguf", "--no-normalize"), 2, "are of a folder; llama.cpp has --embd-normalize"),
        ((tmp_path / "nowhere", tmp_path / "x.gguf"), 1, "nowhere"),
    ):
        printed, said = bivec("export", *words, code=code)
        assert printed == "" and message in said
    assert not (tmp_path / "x.gguf").exists()
