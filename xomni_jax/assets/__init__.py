"""What ships with the package: the tiny tokenizer, the word list, and the tiny SFT model."""

from importlib import resources

TINY_SFT = str(resources.files("xomni_jax") / "assets" / "tiny_sft")
