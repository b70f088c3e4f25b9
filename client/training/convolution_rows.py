"""Per-row weight gradients of convolutions: several ways to one result, and which is taken for a shape.

A convolution's weight gradient for one row is a matrix product over its output positions: the gradient of the
output, (positions, out channels), with the patches of the input under the kernel, (positions, kernel taps *
in channels). The ways differ in how patches are laid out, and in whether the product is formed at all:

positions   patches in rows, for many channels: channels stay next to each other in memory
bands       as positions, but patches of one row of the kernel, which serve all of its rows
taps        patches in columns, for few channels: positions stay next to each other
single      no patches: the library's own weight gradient, row by row, for large maps
product     not formed: norm and sum follow from the factors, for few positions and many weights

Patches of as many rows are formed at a time as stay in a core's cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from client.training.row_gradients import DenseRows, ProductRows, RowGradients, cut, worth_products

Way = Literal["positions", "bands", "taps", "single", "product"]
WAYS: tuple[Way, ...] = ("positions", "bands", "taps", "single", "product")
_CACHE_BYTES = 2**21
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What a convolution does, in numbers: all that its kernels depend on."""

    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    """Zeros in front of each dimension."""
    after: tuple[int, ...]
    """Zeros behind each dimension."""
    steps: int = 1
    """Consecutive rows that are one record's; their gradients are added up."""
    formed: bool = False
    """Whether gradients must be formed, because more is done to them."""

    @classmethod
    def of(cls, layer: Convolution, *, steps: int = 1, formed: bool = False) -> "Geometry":
        """Geometry of a layer that pads with zeros."""
        taps = range(len(layer.kernel_size))
        if layer.padding == "same":
            total = [layer.dilation[i] * (layer.kernel_size[i] - 1) for i in taps]
            before = tuple(zeros // 2 for zeros in total)
            after = tuple(zeros - zeros // 2 for zeros in total)
        elif isinstance(layer.padding, str):
            before = after = tuple(0 for _ in taps)
        else:
            before = after = tuple(layer.padding)
        return cls(
            in_channels=layer.in_channels,
            out_channels=layer.out_channels,
            groups=layer.groups,
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            before=before,
            after=after,
            steps=steps,
            formed=formed,
        )

    @property
    def taps(self) -> int:
        """Kernel size times input channels of a group."""
        size = self.in_channels // self.groups
        for length in self.kernel:
            size *= length
        return size


def weight_rows(way: Way, inputs: Tensor, gradient: Tensor, geometry: Geometry) -> RowGradients:
    """Weight gradients of all records: inputs (rows, in channels, ...), gradient (rows, out channels, ...).

    There are rows / geometry.steps records.
    """
    return _WAYS[way](inputs, gradient, geometry).merged(geometry.steps)


def possible_ways(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> tuple[Way, ...]:
    """The ways worth trying for these shapes, by a rough count of work; the first is the usual one."""
    positions = gradient[0, 0].numel()
    records, of_record = len(gradient) // geometry.steps, geometry.steps * positions
    weights = geometry.out_channels * geometry.taps
    few_channels = geometry.in_channels // geometry.groups <= 4
    by_positions: Way = "bands" if has_bands(geometry) else "positions"
    usual: Way = "taps" if few_channels else by_positions
    left_unformed = geometry.groups == 1 and not geometry.formed
    if left_unformed and worth_products(records=records, positions=of_record, weights=weights):
        return ("product", by_positions)
    if positions >= 1024 and not few_channels:
        return (usual, "single")
    return (usual,)


def has_bands(geometry: Geometry) -> bool:
    """Whether the rows of the kernel see the same patches, one further down each time."""
    return geometry.groups == 1 and len(geometry.kernel) > 1 and geometry.kernel[0] > 1 == geometry.stride[0]


def pad(inputs: Tensor, geometry: Geometry) -> Tensor:
    """The zeros around (rows, channels, ...) inputs; channels stay last in memory where they are."""
    widths = [
        width
        for before, after in zip(reversed(geometry.before), reversed(geometry.after), strict=True)
        for width in (before, after)
    ]
    if not any(widths):
        return inputs
    return torch.movedim(nn.functional.pad(torch.movedim(inputs, 1, -1), [0, 0, *widths]), -1, 1)


def _windows(padded: Tensor, gradient: Tensor, geometry: Geometry) -> Tensor:
    """View of (rows, groups, channels of a group, *kernel, *output) on padded (rows, channels, ...)."""
    rows, channels = padded.stride()[:2]
    space = padded.stride()[2:]
    of_group = geometry.in_channels // geometry.groups
    return padded.as_strided(
        (len(padded), geometry.groups, of_group, *geometry.kernel, *gradient.shape[2:]),
        (
            rows,
            channels * of_group,
            channels,
            *(step * dilation for step, dilation in zip(space, geometry.dilation, strict=True)),
            *(step * stride for step, stride in zip(space, geometry.stride, strict=True)),
        ),
    )


def _outputs_by_group(gradient: Tensor, geometry: Geometry) -> Tensor:
    """View of (rows, out channels, ...) as (rows, groups, positions, out channels of a group)."""
    by_position = torch.movedim(gradient, 1, -1).flatten(1, -2)
    by_group = by_position.reshape(*by_position.shape[:2], geometry.groups, -1)
    return by_group.transpose(1, 2)


def rows_at_a_time(rows: int, bytes_per_row: int) -> int:
    """A power of two that divides `rows` where that is one; depends on shapes alone."""
    fitting = max(1, _CACHE_BYTES // max(bytes_per_row, 1))
    return min(rows, 1 << (int(fitting).bit_length() - 1))


def _multiplied(
    inputs: Tensor,
    gradient: Tensor,
    geometry: Geometry,
    multiply: Callable[[Tensor, Tensor, Tensor], None],
) -> Tensor:
    """Let `multiply` write products of windows and output gradients, (rows, ...), few rows at a time."""
    padded, outputs = pad(inputs, geometry), _outputs_by_group(gradient, geometry)
    products = gradient.new_empty(len(gradient), geometry.out_channels * geometry.taps)
    step = rows_at_a_time(len(gradient), 4 * outputs.shape[2] * geometry.groups * geometry.taps)
    for start in range(0, len(gradient), step):
        rows = slice(start, start + step)
        multiply(_windows(padded[rows], gradient[rows], geometry), outputs[rows], products[rows])
    return products


def _by_positions(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> RowGradients:
    dims, of_group = len(geometry.kernel), geometry.out_channels // geometry.groups
    # rows, groups, output..., kernel..., channels
    order = (0, 1, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims), 2)

    def multiply(windows: Tensor, outputs: Tensor, into: Tensor) -> None:
        patches = windows.permute(order).reshape(-1, outputs.shape[2], geometry.taps)
        left = outputs.flatten(0, 1).mT
        torch.bmm(left, patches, out=into.view(-1, of_group, geometry.taps))

    shape = (geometry.out_channels, *geometry.kernel, geometry.in_channels // geometry.groups)
    return DenseRows(
        _multiplied(inputs, gradient, geometry, multiply),
        arrange=lambda flat: torch.movedim(flat.view(shape), -1, 1),
    )


def _by_bands(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> RowGradients:
    padded, dims = pad(inputs, geometry), len(geometry.kernel)
    outputs = _outputs_by_group(gradient, geometry).squeeze(1)
    rows, high, wide = len(inputs), gradient.shape[2], gradient[0, 0, 0].numel()
    taps, kernel_rows = geometry.taps // geometry.kernel[0], geometry.kernel[0]
    products = gradient.new_empty(rows, kernel_rows, geometry.out_channels, taps)
    # rows, height, rest of the output, rest of the kernel, channels
    of_row, of_channel, of_height, *of_rest = padded.stride()
    shape = (padded.shape[2], *gradient.shape[3:], *geometry.kernel[1:], geometry.in_channels)
    strides = (
        of_height,
        *(step * stride for step, stride in zip(of_rest, geometry.stride[1:], strict=True)),
        *(step * dilation for step, dilation in zip(of_rest, geometry.dilation[1:], strict=True)),
        of_channel,
    )
    step = rows_at_a_time(rows, 4 * padded.shape[2] * wide * taps)
    patches = inputs.new_empty(step, *shape)
    starts = [row * geometry.dilation[0] * wide for row in range(kernel_rows)]
    for some, output, into in zip(cut(padded, step), cut(outputs.mT, step), cut(products, step), strict=True):
        here = patches[: len(some)]
        here.copy_(some.as_strided(here.shape, (of_row, *strides)))
        right = here.view(len(here), -1, taps)
        for start, product in zip(starts, into.unbind(1), strict=True):
            torch.bmm(output, right[:, start : start + high * wide], out=product)
    arranged = (kernel_rows, geometry.out_channels, *geometry.kernel[1:], geometry.in_channels)
    order = (1, 1 + dims, 0, *range(2, 1 + dims))
    return DenseRows(products.flatten(1), arrange=lambda flat: flat.view(arranged).permute(order))


def _by_taps(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> RowGradients:
    of_group = geometry.out_channels // geometry.groups

    def multiply(windows: Tensor, outputs: Tensor, into: Tensor) -> None:
        patches = windows.reshape(-1, geometry.taps, outputs.shape[2])
        torch.bmm(patches, outputs.flatten(0, 1), out=into.view(-1, geometry.taps, of_group))

    shape = (geometry.groups, geometry.in_channels // geometry.groups, *geometry.kernel, of_group)

    def arrange(flat: Tensor) -> Tensor:
        return torch.movedim(flat.view(shape), -1, 1).flatten(0, 1)

    return DenseRows(_multiplied(inputs, gradient, geometry, multiply), arrange=arrange)


def _by_single(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> RowGradients:
    padded, dims = pad(inputs, geometry), len(geometry.kernel)
    shape = (geometry.out_channels, geometry.in_channels // geometry.groups, *geometry.kernel)
    weight = inputs.new_empty(shape)
    rows = []
    for row in range(len(gradient)):
        found = torch.ops.aten.convolution_backward(
            gradient[row : row + 1],
            padded[row : row + 1],
            weight,
            None,
            geometry.stride,
            [0] * dims,
            geometry.dilation,
            False,
            [0] * dims,
            geometry.groups,
            [False, True, False],
        )[1]
        rows.append(found.reshape(-1))
    return DenseRows(torch.stack(rows))


def _as_product(inputs: Tensor, gradient: Tensor, geometry: Geometry) -> RowGradients:
    dims = len(geometry.kernel)
    windows = _windows(pad(inputs, geometry), gradient, geometry)
    # rows, output..., channels, kernel...: the order of the weights
    order = (0, *range(3 + dims, 3 + 2 * dims), 2, *range(3, 3 + dims))
    patches = windows.squeeze(1).permute([axis - (axis > 1) for axis in order])
    outputs = _outputs_by_group(gradient, geometry).squeeze(1)
    return ProductRows(outputs, patches.reshape(len(inputs), outputs.shape[1], geometry.taps))


_WAYS: dict[Way, Callable[[Tensor, Tensor, Geometry], RowGradients]] = {
    "positions": _by_positions,
    "bands": _by_bands,
    "taps": _by_taps,
    "single": _by_single,
    "product": _as_product,
}
