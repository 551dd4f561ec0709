"""Tensors in, tensors out: the fused operations of fastcm, each a torch reference with a Triton kernel where one pays.

Owns the noise stream and every operation that CUDA does in one pass; one file an operation, with its reference, kernel, launch and
registration, and files beside it where one would be too long.
In: tensors and numbers, coefficients as [B] tensors. Out: tensors, the same images on every device. `use` chooses kernel or reference for
all of them, `report` says which one runs. Knows torch and Triton: no module, no setting, no formula of a paper.
"""

from fastcm.kernels.distance import distance as distance
from fastcm.kernels.ema_update import ema_update as ema_update
from fastcm.kernels.group_norm import group_norm as group_norm
from fastcm.kernels.launch import chosen as chosen
from fastcm.kernels.launch import report as report
from fastcm.kernels.launch import use as use
from fastcm.kernels.optimizer_step import optimizer_step as optimizer_step
from fastcm.kernels.permute import permute as permute
from fastcm.kernels.perturb import Perturbed as Perturbed
from fastcm.kernels.perturb import perturb as perturb
from fastcm.kernels.philox import normal as normal
from fastcm.kernels.philox import philox_words as philox_words
from fastcm.kernels.philox import uniform as uniform
from fastcm.kernels.philox import uniform_field as uniform_field
from fastcm.kernels.precondition import precondition as precondition
from fastcm.kernels.renoise import renoise as renoise
from fastcm.kernels.renoise import to_uint8 as to_uint8
