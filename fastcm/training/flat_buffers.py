"""One contiguous buffer per role (weights, gradient, averages), of which a module's parameters are views."""

import torch
from torch import Tensor, nn

# Each parameter starts at a multiple of 16 elements, so that 128-bit accesses and Triton's divisibility hold in every dtype.
ALIGNMENT = 16


class FlatLayout:
    """Where each of a module's parameters lies in a flat buffer. Convolution weights are channels-last where asked."""

    def __init__(self, module: nn.Module, *, channels_last: bool):
        self.names = [name for name, _ in module.named_parameters()]
        if not self.names:
            raise ValueError("module without parameters: there is nothing to train.")
        self.shapes = [parameter.shape for parameter in module.parameters()]
        self.channels_last = channels_last
        self.offsets, end = [], 0
        for shape in self.shapes:
            self.offsets.append(end)
            end += -(-shape.numel() // ALIGNMENT) * ALIGNMENT
        self.size = end

    def views(self, buffer: Tensor) -> list[Tensor]:
        """The parameters' views of `buffer` [size], in the module's order."""
        return [self._view(buffer, offset, shape) for offset, shape in zip(self.offsets, self.shapes, strict=True)]

    def rows_of(self, names: list[str]) -> list[tuple[int, int, int]]:
        """(start, rows, length) of the named weights, a row for each output: in either order of a weight they lie together."""
        places = {name: (offset, shape) for name, offset, shape in zip(self.names, self.offsets, self.shapes, strict=True)}
        return [(offset, shape[0], shape[1:].numel()) for offset, shape in map(places.__getitem__, names)]

    def _view(self, buffer: Tensor, offset: int, shape: torch.Size) -> Tensor:
        flat = buffer[offset : offset + shape.numel()]
        if self.channels_last and len(shape) == 4:
            out_channels, in_channels, height, width = shape
            return flat.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
        return flat.view(shape)

    @torch.no_grad()
    def gather(self, tensors: list[Tensor], *, like: Tensor) -> Tensor:
        """A new buffer [size], on the device and in the dtype of `like`, that holds the tensors; padding is zero."""
        buffer = torch.zeros(self.size, dtype=like.dtype, device=like.device)
        for view, tensor in zip(self.views(buffer), tensors, strict=True):
            view.copy_(tensor)
        return buffer

    def state_dict(self, buffer: Tensor) -> dict[str, Tensor]:
        """Named fp32 clones, contiguous and on the CPU (the device has no room for a second copy), of the parameters in `buffer`."""
        return {
            name: view.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
            for name, view in zip(self.names, self.views(buffer), strict=True)
        }

    def load_state_dict(self, buffer: Tensor, state: dict[str, Tensor]) -> None:
        """Fills `buffer` from named tensors; a name that is missing or has another shape is an error that names it."""
        for name, view in zip(self.names, self.views(buffer), strict=True):
            if name not in state or state[name].shape != view.shape:
                found = "missing" if name not in state else f"shape {list(state[name].shape)} for {list(view.shape)}"
                raise ValueError(f"state does not fit the parameters: {name} ({found}).")
            view.copy_(state[name])


def attach(module: nn.Module, views: list[Tensor], gradients: list[Tensor] | None = None) -> None:
    """Makes the module's parameters views of a buffer; with `gradients`, their .grad too."""
    for index, parameter in enumerate(module.parameters()):
        parameter.data = views[index]
        parameter.grad = None if gradients is None else gradients[index]


def is_attached(module: nn.Module, views: list[Tensor]) -> bool:
    """Whether the parameters still are these views: .to(), .half() and a new .data take them away."""
    return all(p.data_ptr() == v.data_ptr() and p.dtype == v.dtype for p, v in zip(module.parameters(), views, strict=True))
