"""llama.cpp under test, through llama-cpp-python's low-level calls. Usage: run_llama_cpp.py MODEL.gguf"""

import sys
import time

import llama_cpp as lc

from protocol import DECODE_STEPS, prompt, serve

THREADS = 2


def main(path: str) -> None:
    lc.llama_backend_init()
    silence = lc.llama_log_callback(lambda level, text, data: None)
    lc.llama_log_set(silence, None)
    model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
    params = lc.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 16 * 2304, 2048, 512, 16
    params.n_threads = params.n_threads_batch = THREADS
    context = lc.llama_init_from_model(model, params)
    memory = lc.llama_get_memory(context)
    vocab_size = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))

    def decode(rows: list[tuple[int, int, int, bool]]) -> None:
        batch = lc.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants_logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants_logits
        if lc.llama_decode(context, batch) != 0:
            raise RuntimeError(f"llama_decode failed on {len(rows)} rows")
        lc.llama_synchronize(context)
        lc.llama_batch_free(batch)

    def prefill(tokens: list[int], sequence: int) -> None:
        decode([(token, i, sequence, i == len(tokens) - 1) for i, token in enumerate(tokens)])

    def measure(figure: str, n: int, context_length: int, seed: int) -> float:
        lc.llama_memory_clear(memory, True)
        if figure == "prefill":
            tokens = prompt(n, vocab_size, seed)
            start = time.perf_counter()
            prefill(tokens, 0)
            return n / (time.perf_counter() - start)
        length = context_length - DECODE_STEPS // 2
        for sequence in range(n):
            prefill(prompt(length, vocab_size, seed + sequence), sequence)
        tokens = prompt(n * DECODE_STEPS, vocab_size)
        start = time.perf_counter()
        for i in range(DECODE_STEPS):
            decode([(tokens[i * n + s], length + i, s, True) for s in range(n)])
        return n * DECODE_STEPS / (time.perf_counter() - start)

    serve(measure)


main(sys.argv[1])
