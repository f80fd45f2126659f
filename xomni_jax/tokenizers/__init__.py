"""Images (and clips) to codes, behind one protocol."""
