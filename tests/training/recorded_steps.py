"""What stands in for CUDA graphs on the CPU: the operations of a step with their arguments frozen, done again on the same tensors."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class FrozenOperations:
    """Like a CUDA graph a recording repeats operations, not Python: numbers are as they were, results go to where they lay.

    `lasting()`: the tensors that recorded work may change; recording leaves them as they were. events: what was done, in order.
    """

    def __init__(self, lasting):
        self.lasting, self.events = lasting, []

    def run(self, work):
        self.events.append("run")
        work()

    def record(self, work):
        self.events.append("record")
        before = [(tensor, tensor.clone()) for tensor in self.lasting()]
        with _Recorder() as recorder:
            work()
        for tensor, values in before:
            tensor.copy_(values)

        @torch.no_grad()
        def replay():
            self.events.append("replay")
            for func, args, kwargs, result in recorder.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        return replay


def record_steps(trainer):
    """Makes the trainer's steps recorded ones, and returns what stands in for the device."""

    def lasting():
        flat = [optimizer.gradient for optimizer in trainer.optimizers.values()]
        return [*trainer.tensors(), *flat, trainer.loss, trainer.grad_norm]

    trainer.work.graphs = FrozenOperations(lasting)
    return trainer.work.graphs
