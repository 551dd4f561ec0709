"""How long does one image take? `fastcm bench latency`: from a seed on the host to bytes on the host, beside what users would take instead;
also what an export, a first image, a long job and a busy server take.
"""
