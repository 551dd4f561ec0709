"""What fastcm costs and how good it is, measured: a room for each question, results/ for the answers.

In: the package as users call it, and options. Out: a JSON file of rows with the machine that gave them (results_file), from which pages/
writes the tables of the docs. At this level stands what several rooms share: the models measured, timing in turns, plain PyTorch to
compare with. Nothing in the package imports from here but `fastcm bench`, by name.
"""
