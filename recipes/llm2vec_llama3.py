"""LLM2Vec on Meta-Llama-3-8B-Instruct: bidirectional attention, MNTP, SimCSE, with the paper's hyper-parameters.

    python recipes/llm2vec_llama3.py   # model and data from the hub
    python recipes/llm2vec_llama3.py --dry-run   # parameters, FLOPs and memory; loads nothing
    python recipes/llm2vec_llama3.py --model DIR --mntp-data wiki.txt --simcse-data sentences.txt

The model is gated on the hub: log in, or give --model a local directory.

The settings are in engine/presets.py. Sources: METHOD 3.6 and 4.5 (train_configs/mntp and simcse of the LLM2Vec
repository; paper, appendix D.1).
"""

from bivec.engine.presets import LLAMA_3_8B as RECIPE
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
