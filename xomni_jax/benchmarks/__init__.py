"""Speed against other implementations of the same work, as ratios from interleaved runs; `xomni bench` prints them."""
