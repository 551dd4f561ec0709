"""Generators as files that run without fastcm: ONNX, TensorRT engines, a web page, a C++ package, a server's model repository.

Owns the whole generator as one graph, the forms that its operators take for each target, and the checks before a file gets its name.
In: a denoiser with its levels, a target, a path. Out: files with their manifest, compared with torch's images, or an error and no file.
Knows nothing of training and of data.
"""
