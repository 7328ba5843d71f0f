"""LLM2Vec on LLaMA-2-7B-chat: bidirectional attention, MNTP, SimCSE, with the paper's hyper-parameters.

    python recipes/llm2vec_llama2.py   # model and data from the hub
    python recipes/llm2vec_llama2.py --dry-run   # parameters, FLOPs and memory; loads nothing
    python recipes/llm2vec_llama2.py --model DIR --mntp-data wiki.txt --simcse-data sentences.txt

The model is gated on the hub: log in, or give --model a local directory.

Sources: METHOD 3.6 and 4.5 (train_configs/mntp and simcse of the LLM2Vec repository; paper, appendix D.1).
"""

from pathlib import Path

from bivec.engine.optim import OptimConfig
from bivec.engine.recipe import MntpStage, Recipe, SimcseStage
from bivec.engine.run import start
from bivec.models import DecoderConfig

DATA = Path(__file__).resolve().parent / "data"

RECIPE = Recipe(
    name="llm2vec-llama-2-7b",
    model="meta-llama/Llama-2-7b-chat-hf",
    mntp_data="Salesforce/wikitext:wikitext-103-raw-v1",
    simcse_data="princeton-nlp/datasets-for-simcse:wiki1m_for_simcse.txt",
    sts_dev=str(DATA / "stsb_dev.csv.gz"),
    sts_test=str(DATA / "stsb_test.csv.gz"),
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
    shape=DecoderConfig(
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
