"""Measurements of `xomni bench` and their tests: part of the repository, not of the installed package."""
