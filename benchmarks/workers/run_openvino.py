"""OpenVINO GenAI under test. Usage: run_openvino.py MODEL.gguf [PRECISION]

PRECISION: what it computes in where weights are not, bf16 or f32. Left out, the CPU plugin chooses: bf16 where the CPU
has it, by AMX if it has that. With f32 its matrix products are in 8 bits, by VNNI.
"""

import sys

import numpy as np
import openvino
import openvino_genai

from protocol import DECODE_STEPS, prompt, serve

VOCAB_SIZE = 49152


def main(path: str, *precision: str) -> None:
    hints = {"INFERENCE_PRECISION_HINT": precision[0]} if precision else {}
    pipe = openvino_genai.LLMPipeline(path, "CPU", **hints)

    def generate(prompts: list[list[int]], num_tokens: int) -> "openvino_genai.PerfMetrics":
        ids = openvino.Tensor(np.array(prompts, np.int64))
        mask = openvino.Tensor(np.ones((len(prompts), len(prompts[0])), np.int64))
        inputs = openvino_genai.TokenizedInputs(ids, mask)
        return pipe.generate(inputs, max_new_tokens=num_tokens, ignore_eos=True, do_sample=False).perf_metrics

    generate([prompt(16, VOCAB_SIZE)], 4)

    def measure(figure: str, n: int, context: int, seed: int) -> float:
        if figure == "prefill":
            return n / generate([prompt(n, VOCAB_SIZE, seed)], 1).get_ttft().mean * 1e3
        length = context - DECODE_STEPS // 2
        metrics = generate([prompt(length, VOCAB_SIZE, seed + i) for i in range(n)], DECODE_STEPS + 1)
        # Not its TPOT: for a batch that counts a step's tokens as a sequence's.
        decode_ms = metrics.get_generate_duration().mean - metrics.get_ttft().mean
        return n * DECODE_STEPS / decode_ms * 1e3

    serve(measure)


main(*sys.argv[1:])
