"""Batch generators of tests: their prompts, and what is got from them."""

import mlx.core as mx
from mlx_lm.generate import generate_step

PROMPTS = [[5, 9, 2, 7, 7, 1], [3], list(range(40, 75)), [5, 9, 2, 7, 7, 1, 4, 4]]


def alone(model, prompt, count, **options):
    """mlx_lm's tokens for one prompt."""
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=count, **options)]


def drain(generator):
    """All responses by request, in order."""
    found = {}
    while responses := generator.next_generated():
        for response in responses:
            found.setdefault(response.uid, []).append(response)
    return found
