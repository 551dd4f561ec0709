"""How good are the images? Training by the public commands, evaluation of each result, and the pictures of the docs."""
