#!/usr/bin/env python3
"""Throughput of llama.cpp (package llama-cpp-python) with many sequences at a time, one JSON object for each number of
them: waves of prompts are read together and then written on in step, greedily, a token of each sequence a pass.

    parallel_llama_cpp.py MODEL.gguf TOKENIZER.json PROMPTS.jsonl --parallel 1,4,16,64 --gen 128 --prompts 128

Only the time in llama.cpp counts. The same with Latente, which fills a place as soon as a sequence is done:

    latente batch MODEL -i PROMPTS.jsonl -o OUT --parallel N -n 128 -t 0 --logit-bias 0=-100 [--plain]

Needs the packages numpy, tokenizers and llama-cpp-python (built natively)."""

import argparse
import json
import time

import llama_cpp as ll
import numpy as np
import tokenizers


class Runner:
    def __init__(self, path, sequences, context, threads):
        mp = ll.llama_model_default_params()
        self.model = ll.llama_model_load_from_file(path.encode(), mp)
        cp = ll.llama_context_default_params()
        cp.n_ctx, cp.n_seq_max, cp.kv_unified = sequences * context, sequences, False
        cp.n_batch = cp.n_ubatch = 512
        cp.n_threads = cp.n_threads_batch = threads
        cp.flash_attn_type = 1
        self.context = ll.llama_init_from_model(self.model, cp)
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.batch = ll.llama_batch_init(512, 0, 1)
        self.seconds = 0.0

    def forget(self):
        ll.llama_memory_clear(ll.llama_get_memory(self.context), True)

    def run(self, rows):
        """rows: (token, position, sequence, wanted). Most likely next tokens of the wanted ones."""
        likely = []
        for begin in range(0, len(rows), 512):
            piece = rows[begin:begin + 512]
            b = self.batch
            b.n_tokens = len(piece)
            for i, (token, position, sequence, wanted) in enumerate(piece):
                b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, position, 1, wanted
                b.seq_id[i][0] = sequence
            wanted = sum(row[3] for row in piece)
            start = time.perf_counter()
            if ll.llama_decode(self.context, b) != 0:
                raise SystemExit("llama_decode failed")
            ll.llama_synchronize(self.context)
            self.seconds += time.perf_counter() - start
            if wanted:
                logits = np.ctypeslib.as_array(ll.llama_get_logits(self.context), (wanted, self.vocabulary))
                likely += [int(token) for token in logits.argmax(1)]
        return likely

    def close(self):
        ll.llama_batch_free(self.batch)
        ll.llama_free(self.context)
        ll.llama_model_free(self.model)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model")
    p.add_argument("tokenizer")
    p.add_argument("file")
    p.add_argument("--parallel", default="1,4,16,64")
    p.add_argument("--prompts", type=int, default=128)
    p.add_argument("--gen", type=int, default=128)
    p.add_argument("--context", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    ll.llama_backend_init()
    log = ll.llama_log_callback(lambda *a: None)
    ll.llama_log_set(log, None)
    tokenizer = tokenizers.Tokenizer.from_file(args.tokenizer)
    lines = [json.loads(line)["prompt"] for line in open(args.file)][:args.prompts]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids[:args.context - args.gen] for text in lines]
    for count in map(int, args.parallel.split(",")):
        runner = Runner(args.model, count, args.context, args.threads)
        written = 0
        for begin in range(0, len(prompts), count):
            wave = prompts[begin:begin + count]
            runner.forget()
            next_tokens = runner.run([(token, i, s, i + 1 == len(ids)) for s, ids in enumerate(wave)
                                      for i, token in enumerate(ids)])
            for i in range(args.gen - 1):
                next_tokens = runner.run([(token, len(wave[s]) + i, s, True) for s, token in enumerate(next_tokens)])
            written += args.gen * len(wave)
        print(json.dumps({"parallel": count, "tokens": written, "read": sum(map(len, prompts)),
                          "tok_s": written / runner.seconds}), flush=True)
        runner.close()


main()
