"""LLM2Vec on Mistral-7B-Instruct-v0.2: bidirectional attention, MNTP, SimCSE, with the paper's hyper-parameters.

    python recipes/llm2vec_mistral.py   # model and data from the hub
    python recipes/llm2vec_mistral.py --dry-run   # parameters, FLOPs and memory; loads nothing
    python recipes/llm2vec_mistral.py --model DIR --mntp-data wiki.txt --simcse-data sentences.txt

Mistral is the exception in MNTP: 80 % of the tokens are masked, all by the mask token. For word-level tasks the paper
used another run, BERT-style 20 % (METHOD 3.6): --set mntp.mask_probability=0.2 --set mntp.mask_style=bert.

The settings are in engine/presets.py. Sources: METHOD 3.6 and 4.5 (train_configs/mntp and simcse of the LLM2Vec
repository; paper, appendix D.1).
"""

from bivec.engine.presets import MISTRAL_7B as RECIPE
from bivec.engine.run_start import start


def main() -> None:
    """The paper's three steps, STS-B beside each."""
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
