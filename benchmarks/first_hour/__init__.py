"""Does it run on this GPU? The stages of `make gpu STAGE=all`, cheapest truths first, and their rows."""
