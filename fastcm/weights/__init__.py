"""Models at rest: fastcm's own folders, other people's files, the hub.

Owns every format that weights are read from or written to, and the names of classes.
In: a path or a name on the hub. Out: a configuration checked field by field and fp32 tensors by name, or the same on disk: complete, or not
there. Nothing that a file holds is executed; what a file lacks is said in one line. Draws nothing and trains nothing.
"""
