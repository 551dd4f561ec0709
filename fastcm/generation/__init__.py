"""Images from models: what applications embed.

Owns samplers, edits, frozen noise levels and the generators that share one call: torch's, compiled code, ONNX files, AOT packages, engines.
In: a denoiser or an exported file, a device; then seeds, labels, noise levels, known pictures. Out: images, uint8 [N, H, W, C] or fp32
[N, C, H, W], and pictures on disk. A seed is one image, alone or in any batch. Knows nothing of training.
"""
