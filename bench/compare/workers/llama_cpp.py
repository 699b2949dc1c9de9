#!/usr/bin/env python3
"""llama.cpp through the low-level bindings of llama-cpp-python: MODEL.gguf [--flash auto|on|off] [--context N] [--mmproj FILE].

With --mmproj the job "picture" takes what llama-mtmd-cli does through the same library (libmtmd): the picture is prepared and encoded, and the
decoder takes its positions between the first token and the others.
"""

import argparse
import ctypes
import sys
import time

# This file has the name of the package's module.
sys.path.pop(0)
import llama_cpp as l  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, __file__.rsplit("/", 1)[0])
from protocol import serve  # noqa: E402


FLASH = {"auto": -1, "off": 0, "on": 1}


class State:
    def __init__(self, args):
        l.llama_backend_init()
        l.llama_log_set(QUIET, None)
        p = l.llama_model_default_params()
        p.n_gpu_layers = 0
        self.model = l.llama_model_load_from_file(args.model.encode(), p)
        c = l.llama_context_default_params()
        c.n_ctx, c.n_batch, c.n_ubatch, c.n_seq_max = args.context, args.batch, args.batch, args.sequences
        c.n_threads = c.n_threads_batch = args.threads
        c.flash_attn_type = FLASH[args.flash]
        c.kv_unified = args.unified
        c.no_perf = True
        self.context = l.llama_init_from_model(self.model, c)
        self.memory = l.llama_get_memory(self.context)
        self.vocabulary = l.llama_vocab_n_tokens(l.llama_model_get_vocab(self.model))
        self.most = args.batch
        self.room = l.llama_batch_init(args.batch, 0, 1)
        self.stands = None  # what the cache holds
        if args.mmproj:
            self.mtmd = Pictures(args, self.model)

    def run(self, tokens):
        """tokens: (id, position, sequence, wanted)"""
        b = self.room
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, position, 1, sequence, wanted
        b.n_tokens = len(tokens)
        if l.llama_decode(self.context, b) != 0:
            raise SystemExit("llama_decode failed")

    def prompt(self, ids, sequence=0):
        for i in range(0, len(ids), self.most):
            part = ids[i:i + self.most]
            self.run([(t, i + j, sequence, i + j + 1 == len(ids)) for j, t in enumerate(part)])

    def logits(self, row=-1):
        return np.ctypeslib.as_array(l.llama_get_logits_ith(self.context, row), shape=(self.vocabulary,))

    def stand(self, prompts):
        """Puts prompts into the cache, unless they are there; drops what was behind them."""
        if self.stands == prompts:
            for s, ids in enumerate(prompts):
                l.llama_memory_seq_rm(self.memory, s, len(ids), -1)
            return
        l.llama_memory_clear(self.memory, True)
        for s, ids in enumerate(prompts):
            self.prompt(ids, s)
        self.stands = prompts


class Pictures:
    def __init__(self, args, model):
        import llama_cpp.mtmd_cpp as m
        m.mtmd_log_set(QUIET, None)
        p = m.mtmd_context_params_default()
        p.use_gpu, p.print_timings, p.n_threads, p.warmup = False, False, args.threads, True
        p.flash_attn_type = FLASH[args.flash]
        self.m, self.context = m, m.mtmd_init_from_file(args.mmproj.encode(), model, p)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot take {args.mmproj}")

    def chunk(self, picture):
        """picture [height, width, 3] of bytes, prepared for the encoder."""
        height, width, _ = picture.shape
        bitmap = self.m.mtmd_bitmap_init(width, height, picture.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)))
        part, chunks = self.m.mtmd_input_part(None, bitmap), self.m.mtmd_input_chunks_init()
        if self.m.mtmd_tokenize_from_parts(self.context, chunks, (ctypes.POINTER(self.m.mtmd_input_part) * 1)(ctypes.pointer(part)), 1, False) != 0:
            raise SystemExit("mtmd_tokenize_from_parts failed")
        return bitmap, chunks

    def run(self, state, picture):
        """Encodes the picture and lets the decoder take it behind one token."""
        bitmap, chunks = self.chunk(picture)
        after = l.llama_pos(1)
        for i in range(self.m.mtmd_input_chunks_size(chunks)):
            chunk = self.m.mtmd_input_chunks_get(chunks, i)
            failed = self.m.mtmd_encode_chunk(self.context, chunk)
            failed = failed or self.m.mtmd_helper_decode_image_chunk(self.context, state.context, chunk, self.m.mtmd_get_output_embd(self.context), after, 0,
                                                                     state.most, ctypes.byref(after), self.m.mtmd_helper_post_decode_callback(), None)
            if failed:
                raise SystemExit("the picture could not be encoded")
        self.m.mtmd_input_chunks_free(chunks)
        self.m.mtmd_bitmap_free(bitmap)
        return after.value


def picture(s, request):
    ids, pixels = request["ids"], np.load(request["picture"])
    s.stands = None
    l.llama_memory_clear(s.memory, True)
    start = time.perf_counter()
    s.run([(ids[0], 0, 0, False)])
    after = s.mtmd.run(s, pixels)
    s.run([(t, after + i, 0, i + 2 == len(ids)) for i, t in enumerate(ids[1:])])
    l.llama_synchronize(s.context)
    logits = s.logits()
    seconds = time.perf_counter() - start
    if "logits" in request:
        np.save(request["logits"], logits)
    return {"seconds": seconds, "positions": after}


def prefill(s, request):
    s.stands = None
    l.llama_memory_clear(s.memory, True)
    start = time.perf_counter()
    s.prompt(request["ids"])
    l.llama_synchronize(s.context)
    logits = s.logits()
    seconds = time.perf_counter() - start
    if "logits" in request:
        np.save(request["logits"], logits)
    return seconds


def all_logits(s, request):
    """Of every position, in one batch."""
    s.stands = None
    l.llama_memory_clear(s.memory, True)
    s.run([(t, i, 0, True) for i, t in enumerate(request["ids"])])
    np.save(request["logits"], np.stack([s.logits(i) for i in range(len(request["ids"]))]))
    return 0.0


def batch(s, request):
    prompts, n = request["prompts"], request["n"]
    s.stand(prompts)
    start = time.perf_counter()
    for step in range(n):
        s.run([(1 + step, len(ids) + step, q, True) for q, ids in enumerate(prompts)])
        l.llama_synchronize(s.context)
        for q in range(len(prompts)):
            s.logits(q).argmax()
    return time.perf_counter() - start


def decode(s, request):
    return batch(s, {"prompts": [request["ids"]], "n": request["n"]})


@l.llama_log_callback
def QUIET(level, text, data):
    pass


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flash", choices=FLASH, default="auto")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--mmproj", help="the encoder and projector of pictures")
    parser.add_argument("--unified", action="store_true", help="one key-value buffer for all sequences")
    parser.add_argument("--system-info", action="store_true")
    args = parser.parse_args()
    if args.system_info:
        print(l.llama_print_system_info().decode())
        return
    serve(lambda: State(args), {"prefill": prefill, "decode": decode, "batch": batch, "all_logits": all_logits, "picture": picture})


if __name__ == "__main__":
    main()
