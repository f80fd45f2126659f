"""Compiles the programs of a run for a TPU slice without having it: memory, operations, bytes and collectives before a chip is rented."""
