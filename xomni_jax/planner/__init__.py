"""Compile any step for a slice that is not there: memory, operations, bytes and collectives, read off before a chip is rented."""
