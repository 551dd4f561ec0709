"""A generator behind HTTP: requests checked, batched, counted and answered.

Owns endpoints and their limits, the joining of requests of one moment, metrics, and the server's orderly end.
In: a generator, and requests as JSON or a query. Out: JSON or PNG, errors as one line of JSON. Knows of a generator no more than its call.
"""
