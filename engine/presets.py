"""The recipes' settings: the paper's for its four decoders, and ours for the small one that a CPU converts.

``recipes/*.py`` and ``bivec convert`` start from these. What differs between the paper's models is stated at each.

Sources: METHOD 3.6, 4.5 and 5.7 (train_configs of the LLM2Vec repository; paper, appendix D).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bivec.engine.lora import LoraConfig
from bivec.engine.optim import OptimConfig
from bivec.engine.packaged import PACKAGED_MODEL
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage, SupervisedStage
from bivec.models import DecoderConfig

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"  # the samples that ship with bivec
STS_DEV, STS_TEST = str(DATA / "stsb_dev.csv.gz"), str(DATA / "stsb_test.csv.gz")

# The paper's settings with data of the hub; of no decoder in particular: whoever takes it names the model.
PAPER = Recipe(
    name="llm2vec",
    model="",
    mntp_data="Salesforce/wikitext:wikitext-103-raw-v1",
    simcse_data="princeton-nlp/datasets-for-simcse:wiki1m_for_simcse.txt",
    sts_dev=STS_DEV,
    sts_test=STS_TEST,
    pool_bos=False,  # text tokens only; the repository pools every position in SimCSE training (METHOD 4.3)
    mntp=MntpStage(
        optim=OptimConfig(learning_rate=5e-5, steps=1000),
        decay_epochs=3,
        batch_size=32,
        sequence_length=512,
        mask_probability=0.2,
        mask_style="bert",
    ),
    simcse=SimcseStage(
        optim=OptimConfig(learning_rate=3e-5, steps=1000),
        decay_epochs=3,
        batch_size=128,
        max_length=128,
        attention_dropout=0.3,
        scale=20.0,
    ),
)

LLAMA_2_SHAPE = DecoderConfig(
    model_type="llama",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=4096,
    rope_theta=1e4,
    bos_token_id=1,
    eos_token_id=2,
    dtype="bfloat16",
)
LLAMA_2_7B = replace(PAPER, name="llm2vec-llama-2-7b", model="meta-llama/Llama-2-7b-chat-hf", shape=LLAMA_2_SHAPE)

LLAMA_3_8B = replace(
    PAPER,
    name="llm2vec-llama-3-8b",
    model="meta-llama/Meta-Llama-3-8B-Instruct",
    shape=replace(
        LLAMA_2_SHAPE,
        vocab_size=128256,
        intermediate_size=14336,
        num_kv_heads=8,
        max_position_embeddings=8192,
        rope_theta=5e5,
        bos_token_id=128000,
        eos_token_id=128009,
    ),
)

# Mistral is the exception in MNTP: 80 % of the tokens are masked, all by the mask token.
MISTRAL_7B = replace(
    PAPER,
    name="llm2vec-mistral-7b",
    model="mistralai/Mistral-7B-Instruct-v0.2",
    mntp=replace(PAPER.mntp, mask_probability=0.8, mask_style="all_mask"),
    shape=replace(
        LLAMA_2_SHAPE,
        model_type="mistral",
        intermediate_size=14336,
        num_kv_heads=8,
        max_position_embeddings=32768,
        rope_theta=1e6,
    ),
)

SHEARED_LLAMA_1B = replace(
    PAPER,
    name="llm2vec-sheared-llama-1.3b",
    model="princeton-nlp/Sheared-LLaMA-1.3B",
    simcse=replace(PAPER.simcse, batch_size=32),  # the paper's; the repository's configuration says 128 (METHOD 13)
    shape=replace(
        LLAMA_2_SHAPE, hidden_size=2048, intermediate_size=5504, num_layers=24, num_heads=16, num_kv_heads=16
    ),
)

# Tuned for minutes on two CPU cores; what was tried is in benchmarks/results/quick_start_search.md.
SMOLLM2_135M = Recipe(
    name="llm2vec-smollm2-135m",
    model=PACKAGED_MODEL,
    mntp_data=str(DATA / "wikitext2_paragraphs.txt.gz"),
    simcse_data=str(DATA / "wikipedia_sentences.txt.gz"),
    sts_dev=STS_DEV,
    sts_test=STS_TEST,
    bos_token="<|endoftext|>",  # noqa: S106 - the tokenizer adds none; the first token of a sequence becomes the attention sink
    pool_bos=True,  # plain mean pooling, so that every other library gives the same vectors
    mntp=MntpStage(
        optim=OptimConfig(learning_rate=3e-3, steps=40, warmup_steps=4),
        decay_epochs=None,
        batch_size=32,
        # as short as a sentence: with 64, one seed in three made every token of a short text an attention sink
        sequence_length=32,
        bos_in_every_block=True,
        mask_probability=0.35,
        lora=LoraConfig(rank=16, alpha=32, dropout=0.0),
        save_every=25,
    ),
    simcse=SimcseStage(
        optim=OptimConfig(learning_rate=1e-3, steps=45, warmup_steps=4),
        decay_epochs=None,
        batch_size=32,
        max_length=64,
        lora=LoraConfig(rank=16, alpha=32, dropout=0.0),
        save_every=25,
    ),
    supervised=SupervisedStage(
        optim=OptimConfig(learning_rate=1e-3, steps=40, warmup_steps=4),
        decay_epochs=None,
        batch_size=64,
        max_length=64,
        scale=20.0,
        lora=LoraConfig(rank=16, alpha=32, dropout=0.0),
        micro_batch_tokens=4096,
        save_every=25,
    ),
)

# The paper's supervised training, of an encoder that another run, or another project, has made.
SUPERVISED = Recipe(
    name="supervised",
    model="runs/llm2vec-mistral-7b",
    mntp_data="",
    simcse_data="",
    sts_dev=STS_DEV,
    sts_test=STS_TEST,
    stages=("bi", "supervised"),
    pool_bos=None,  # as the model's folder says
)

PRESETS: dict[str, Recipe] = {
    "paper": PAPER,
    **{
        recipe.name.removeprefix("llm2vec-"): recipe
        for recipe in (MISTRAL_7B, LLAMA_2_7B, LLAMA_3_8B, SHEARED_LLAMA_1B, SMOLLM2_135M, SUPERVISED)
    },
}
