"""The readers under test: their valid files, how these are mutated and read, and what a value must agree with.

The oracle of each is said at its ``check``; none may take a value for right only because nothing was raised.
"""

from __future__ import annotations

import warnings

import data_readers as data
import encoder_readers as encoders
import model_readers as models
import mutants
import oracles
import run_readers as runs
import samples
import structured_mutants as structured
from harness import Reader, by_second_reading, each

warnings.simplefilter("ignore")

SAFETENSORS, JSON = structured.any_safetensors, structured.any_json

READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "safetensors",
            samples.decoder,
            {"model.safetensors": SAFETENSORS},
            models.read_weights,
            models.check_weights,
        ),
        Reader(
            "sharded",
            samples.sharded,
            {
                "model.safetensors.index.json": JSON,
                "model-00001-of-00003.safetensors": SAFETENSORS,
                "model-00002-of-00003.safetensors": SAFETENSORS,
            },
            models.read_weights,
            models.check_weights,
        ),
        Reader("config", samples.decoder, {"config.json": JSON}, models.read_weights, models.check_weights),
        Reader(
            "families",
            samples.families,
            {
                f"{family}/config.json": JSON
                for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text")
            },
            models.read_families,
            models.check_families,
        ),
        Reader("gguf", samples.gguf, {"model.gguf": structured.any_gguf}, models.read_gguf, models.check_gguf),
        Reader(
            "encoder",
            samples.encoder,
            {"bivec_config.json": JSON, "tokenizer.json": JSON},
            encoders.read_encoder,
            encoders.check_own,
        ),
        Reader(
            "sentence_transformers",
            samples.sentence_transformers,
            {
                "modules.json": JSON,
                "1_Pooling/config.json": JSON,
                "sentence_bert_config.json": JSON,
                "config_sentence_transformers.json": JSON,
                "tokenizer_config.json": JSON,
                "0_WordWeights/model.safetensors": SAFETENSORS,
            },
            encoders.read_encoder,
            encoders.check_foreign,
        ),
        Reader(
            "llm2vec",
            samples.llm2vec,
            {"llm2vec_config.json": JSON, "adapter_config.json": JSON, "adapter_model.safetensors": SAFETENSORS},
            encoders.read_llm2vec,
            encoders.check_foreign,
        ),
        Reader(
            "adapter",
            samples.adapter,
            {"adapter_config.json": JSON, "adapter_model.safetensors": SAFETENSORS},
            encoders.read_adapter,
            encoders.check_adapter,
        ),
        Reader(
            "tokenizer",
            samples.decoder,
            {"tokenizer.json": JSON, "tokenizer_config.json": JSON},
            models.read_tokenizer,
            models.check_tokenizer,
            weights={"tokenizer.json": 2.0},
        ),
        Reader(
            "sentencepiece",
            samples.sentencepiece,
            {"tokenizer.model": mutants.any_protobuf},
            models.read_sentencepiece,
            models.check_sentencepiece,
        ),
        Reader(
            "texts",
            samples.texts,
            {"a.txt": mutants.any_text, "b.txt.gz": mutants.inside_gzip(mutants.any_text)},
            each(data.read_texts, "a.txt", "b.txt.gz"),
            by_second_reading(oracles.lines_of),
        ),
        Reader(
            "csv",
            samples.csv,
            {"a.csv": mutants.any_text, "b.tsv": mutants.any_text},
            each(data.read_texts, "a.csv", "b.tsv"),
            by_second_reading(data.second_csv),
        ),
        Reader(
            "jsonl",
            samples.json_lines,
            {
                "a.jsonl": structured.any_json_lines,
                "b.jsonl.gz": mutants.inside_gzip(structured.any_json_lines),
                "c.json": JSON,
            },
            each(data.read_texts, "a.jsonl", "b.jsonl.gz", "c.json"),
            by_second_reading(lambda file: oracles.json_column(file, "text")),
        ),
        Reader(
            "parquet",
            samples.parquet,
            {"a.parquet": mutants.any_parquet, "b.parquet": mutants.any_parquet},
            each(data.read_texts, "a.parquet", "b.parquet"),
            by_second_reading(data.parquet_column),
        ),
        Reader(
            "sts",
            samples.sts,
            {"a.csv": mutants.any_text, "b.tsv": mutants.any_text, "c.tsv.gz": mutants.inside_gzip(mutants.any_text)},
            each(data.read_sts, "a.csv", "b.tsv", "c.tsv.gz"),
            by_second_reading(data.second_sts),
        ),
        Reader(
            "triples",
            samples.triples,
            {"a.jsonl": structured.any_json_lines},
            each(data.read_triples, "a.jsonl"),
            by_second_reading(data.second_triples),
        ),
        Reader(
            "triples_parquet",
            samples.triples_parquet,
            {"a.parquet": mutants.any_parquet},
            each(data.read_triples, "a.parquet"),
            by_second_reading(data.second_triple_table),
        ),
        Reader(
            "entailment",
            samples.entailment,
            {"sick.txt": mutants.any_text, "snli.jsonl": structured.any_json_lines, "nli.csv": mutants.any_text},
            each(data.read_entailment, "sick.txt", "snli.jsonl", "nli.csv"),
            data.check_entailment,
        ),
        Reader(
            "words",
            samples.conll,
            {
                "conll2003.txt": mutants.any_text,
                "wnut17.conll": mutants.any_text,
                "tree.conllu": mutants.any_text,
                "tree.conllu.gz": mutants.inside_gzip(mutants.any_text),
            },
            each(data.read_words, *data.WORD_FILES),
            data.check_words,
        ),
        Reader(
            "settings",
            samples.settings,
            {"a.yaml": structured.any_yaml, "b.json": JSON},
            each(data.read_settings, "a.yaml", "b.json"),
            data.check_settings,
        ),
        Reader(
            "checkpoint",
            samples.checkpoint,
            {"mntp-000003/state.safetensors": SAFETENSORS, "mntp-000003/state.json": JSON},
            runs.read_checkpoint,
            runs.check_checkpoint,
        ),
        Reader(
            "run",
            samples.run,
            {"run.json": JSON, "results.json": JSON, "metrics.jsonl": structured.any_json_lines},
            runs.read_run,
            runs.check_run,
        ),
        Reader(
            "corpus",
            samples.corpus,
            {"partial/state.json": JSON, "partial/done": mutants.any_bytes, "partial/vectors.npy": mutants.head_or_any},
            runs.read_corpus,
            runs.check_corpus,
        ),
    )
}
