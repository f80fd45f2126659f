"""How models run forward: caches, prefill, decoding, guidance, flow-matching samplers."""
