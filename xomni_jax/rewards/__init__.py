"""Remote rewards: protocol, client and combination."""
