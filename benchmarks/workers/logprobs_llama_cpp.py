"""llama.cpp's logits for benchmarks/quality.py. Usage: logprobs_llama_cpp.py MODEL.gguf WINDOW OUT.npy

Reads a JSON list of at most WINDOW token ids a line, evaluates it from an empty context, saves the logits (ids, vocab)
and prints "done". Runs in the peer's own environment.
"""

import json
import sys

import llama_cpp
import numpy as np


def without_repacking() -> llama_cpp.llama_model_params:
    """Weights as they lie in the file: version 0.3.36 crashes on gemma3 with those it repacks for AMX."""
    params = defaults()
    params.use_extra_bufts = False
    return params


defaults = llama_cpp.llama_cpp.llama_model_default_params
llama_cpp.llama_cpp.llama_model_default_params = without_repacking


def main(path: str, window: int, out: str) -> None:
    model = llama_cpp.Llama(path, n_ctx=window, n_batch=window, n_ubatch=window, logits_all=True, verbose=False)
    for line in sys.stdin:
        ids = json.loads(line)
        model.reset()
        model.eval(ids)
        np.save(out, np.array(model.scores[: len(ids)], np.float32))
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
