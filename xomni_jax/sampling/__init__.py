"""How models run forward: the batch driver, caches, prefill, decode steps, guidance, flow-matching samplers."""
