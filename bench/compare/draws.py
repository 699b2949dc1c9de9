"""What --random draws, by the seed alone: dims and lengths that every peer takes. Pure functions (tests/programs/compare_draws.py)."""

import math
import random

PROMPTS = (77, 333, 1500)
BLOCK = 32  # columns of every matrix come in whole blocks of llama.cpp's formats
LAYERS_PARAMETERS = 400e6  # of all layers together: a prompt of 333 takes a third of a second at a teraflop per second


def side(draw):
    """512 … 5120, a multiple of 32."""
    return BLOCK * draw.randrange(16, 161)


def products(seed):
    """Three of (m, k, n)."""
    draw = random.Random(seed)
    return [(draw.choice(PROMPTS), side(draw), side(draw)) for _ in range(3)]


def encoders(seed):
    """Three attentions: (tokens, heads, head_dim, causal)."""
    draw = random.Random(f"encoders {seed}")
    return [(draw.randrange(100, 3001), draw.randrange(1, 33), draw.choice((32, 64, 80, 96, 128)), draw.randrange(2)) for _ in range(3)]


def decoder(seed):
    """Dims of a LLaMA as make_models.py takes them, "prompt" and "depth" (the context that tokens are decoded behind). The fewer parameters a
    layer has, the more layers."""
    draw = random.Random(f"decoder {seed}")
    hidden = side(draw)
    head_dim = draw.choice([d for d in (64, 80, 96, 128) if hidden % d == 0] or [32])
    heads = hidden // head_dim
    kv_heads = draw.choice([h for h in range(1, heads + 1) if heads % h == 0])
    intermediate = BLOCK * round(hidden * draw.uniform(2, 3) / BLOCK)
    layer = hidden * (2 * hidden + 2 * kv_heads * head_dim + 3 * intermediate)
    return {"hidden": hidden, "layers": min(max(2, round(LAYERS_PARAMETERS / layer)), 16), "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
            "intermediate": intermediate, "prompt": draw.choice(PROMPTS), "depth": draw.randrange(100, 3001)}


def repeats(fastest, least):
    """How often a round repeats what takes the fastest program `fastest` seconds, so that it lasts `least`."""
    return max(1, math.ceil(least / fastest))
