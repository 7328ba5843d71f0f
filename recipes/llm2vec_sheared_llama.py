"""LLM2Vec on Sheared-LLaMA-1.3B: bidirectional attention, MNTP, SimCSE, with the paper's hyper-parameters.

    python recipes/llm2vec_sheared_llama.py   # model and data from the hub
    python recipes/llm2vec_sheared_llama.py --dry-run   # parameters, FLOPs and memory; loads nothing
    python recipes/llm2vec_sheared_llama.py --model DIR --mntp-data wiki.txt --simcse-data sentences.txt

SimCSE runs with batch 32 as the paper has it; the repository's configuration says 128 (METHOD 13), which is
--set simcse.batch_size=128. If the hub holds the weights as pytorch_model.bin only, convert them once to safetensors.

The settings are in engine/presets.py. Sources: METHOD 3.6 and 4.5 (train_configs/mntp and simcse of the LLM2Vec
repository; paper, appendix D.1).
"""

from bivec.engine.presets import SHEARED_LLAMA_1B as RECIPE
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
