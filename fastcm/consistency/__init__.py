"""The papers, on tensors: noise levels, denoisers, ODE steps and losses.

Owns which levels are drawn and how many (noise_schedule, curriculum), the scalings (denoiser), one step of the ODE (solver, tangent), and
the losses with their distances and weights (objective, lpips, log_weight).
In: networks, batches of images with their place in the noise stream, noise levels [B]. Out: denoised images fp32 [B, C, H, W], losses [B].
Reads no file, keeps no state of a run and draws no randomness that it was not handed.
"""
