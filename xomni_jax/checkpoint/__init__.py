"""The Orbax store, and conversion from and to the released PyTorch layout."""
