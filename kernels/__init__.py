from fastcm.kernels.distance import distance as distance
from fastcm.kernels.ema_update import ema_update as ema_update
from fastcm.kernels.group_norm import group_norm as group_norm
from fastcm.kernels.optimizer_step import optimizer_step as optimizer_step
from fastcm.kernels.precondition import precondition as precondition
