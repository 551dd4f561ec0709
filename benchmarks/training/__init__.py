"""How fast does it train, and where does a step's time and memory go? `fastcm bench train` and `fastcm bench data`."""
