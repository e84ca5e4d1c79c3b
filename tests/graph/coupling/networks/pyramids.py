"""Convolutional structures with several paths: pyramids, splits, dilation, sound, video, norms over odd axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.coupling.networks.base import Net, conv, pooled, trick


@trick()
def feature_pyramid() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        a = F.relu(net.a(x))
        b = F.relu(net.b(a))
        c = F.relu(net.c(b))
        top = net.side_c(c)
        middle = net.side_b(b) + F.interpolate(top, size=b.shape[-2:], mode="nearest")
        low = net.side_a(a) + F.interpolate(middle, size=a.shape[-2:], mode="bilinear", align_corners=True)
        return sum(net.head(F.relu(net.smooth(level))).mean((2, 3)) for level in (low, middle, top))

    return Net(
        {
            "a": conv(3, 8),
            "b": conv(8, 12, stride=2),
            "c": conv(12, 16, stride=2),
            **{f"side_{name}": nn.Conv2d(width, 14, 1) for name, width in zip("abc", (8, 12, 16), strict=True)},
            "smooth": conv(14, 14),
            "head": nn.Conv2d(14, 10, 1),
        },
        forward,
    )


@trick()
def split_step_by_step() -> nn.Module:
    """Gao et al. 2019, "Res2Net"."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        parts = list(x.split(4, 1))
        for number in range(1, 4):
            before = parts[number - 1] if number > 1 else 0
            parts[number] = F.relu(getattr(net, f"c{number}")(parts[number] + before))
        return net.fc(pooled(net.b(torch.cat(parts, 1)) + net.short(x)))

    steps = {f"c{number}": conv(4, 4) for number in range(1, 4)}
    return Net({"a": conv(3, 16), **steps, "b": conv(16, 12), "short": conv(16, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def cheap_copies() -> nn.Module:
    """Han et al. 2020, "GhostNet": what is too much is sliced off."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        x = torch.cat([x, F.relu(net.cheap(x))], 1)[:, :13]
        return net.fc(pooled(net.b(x)))

    return Net({"a": conv(3, 7), "cheap": conv(7, 7, groups=7), "b": conv(13, 12), "fc": nn.Linear(12, 10)}, forward)


@trick()
def convolved_in_part() -> nn.Module:
    """Chen et al. 2023, "FasterNet"."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        moved, kept = torch.split(x, [4, 12], 1)
        x = x + net.c(F.relu(net.b(torch.cat((net.part(moved), kept), 1))))
        return net.fc(pooled(x))

    return Net(
        {"a": conv(3, 16), "part": conv(4, 4), "b": conv(16, 24), "c": conv(24, 16), "fc": nn.Linear(16, 10)}, forward
    )


@trick()
def densely_connected() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        features = [net.a(x)]
        for number in range(3):
            joined = torch.cat(features, 1)
            features.append(getattr(net, f"c{number}")(F.relu(getattr(net, f"n{number}")(joined))))
        return net.fc(pooled(net.last(torch.cat(features, 1))))

    return Net(
        {
            "a": conv(3, 8),
            **{f"c{number}": conv(8 + 4 * number, 4) for number in range(3)},
            **{f"n{number}": nn.BatchNorm2d(8 + 4 * number) for number in range(3)},
            "last": nn.BatchNorm2d(20),
            "fc": nn.Linear(20, 10),
        },
        forward,
    )


@trick()
def upsampled_by_groups() -> nn.Module:
    return nn.Sequential(
        conv(3, 12),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 18, 3, stride=2, groups=3, dilation=2, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(18, 18, 2, groups=18),
        nn.Conv2d(18, 10, 3, groups=2, dilation=3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@trick((4, 20))
def causal_gates_in_time() -> nn.Module:
    """Van den Oord et al. 2016, "WaveNet"."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x, skips = net.a(F.pad(x, (1, 0))), 0
        for number in range(3):
            y = getattr(net, f"c{number}")(F.pad(x, (2**number, 0)))
            signal, gate = y.chunk(2, 1)
            y = torch.tanh(signal) * torch.sigmoid(gate)
            skips = skips + getattr(net, f"s{number}")(y)
            x = x + getattr(net, f"r{number}")(y) if number < 2 else x
        return net.fc(F.relu(skips)[..., -1])

    return Net(
        {
            "a": nn.Conv1d(4, 12, 2),
            **{f"c{number}": nn.Conv1d(12, 20, 2, dilation=2**number) for number in range(3)},
            **{f"r{number}": nn.Conv1d(10, 12, 1) for number in range(2)},
            **{f"s{number}": nn.Conv1d(10, 14, 1) for number in range(3)},
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick((3, 4, 8, 8))
def video_by_groups() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.n(net.a(x)))
        x = F.max_pool3d(F.relu(net.b(x)), (1, 2, 2))
        x = net.up(net.time(x))
        return net.fc(F.adaptive_avg_pool3d(x, 1).flatten(1))

    return Net(
        {
            "a": nn.Conv3d(3, 12, 3, padding=1),
            "n": nn.BatchNorm3d(12),
            "b": nn.Conv3d(12, 18, (1, 3, 3), groups=3),
            "time": nn.Conv3d(18, 18, (3, 1, 1), groups=18),
            "up": nn.ConvTranspose3d(18, 12, 2, groups=2),
            "fc": nn.Linear(12, 10),
        },
        forward,
    )


@trick()
def groups_of_norm_across_a_concatenation() -> nn.Module:
    """Three groups of norm over two parts of eight and four channels, then two groups of convolution."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.norm(torch.cat([net.a(x), net.b(x)], 1)))
        return net.fc(pooled(net.c(y)))

    return Net(
        {
            "a": conv(3, 8),
            "b": conv(3, 4),
            "norm": nn.GroupNorm(3, 12),
            "c": conv(12, 12, groups=2),
            "fc": nn.Linear(12, 10),
        },
        forward,
    )


@trick()
def one_group_of_norm() -> nn.Module:
    return nn.Sequential(
        conv(3, 16), nn.GroupNorm(1, 16), nn.GELU(), conv(16, 12), nn.Flatten(), nn.Linear(12 * 64, 10)
    )


@trick()
def norm_over_all_axes() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.whole(net.a(x))).permute(0, 2, 3, 1)
        return net.fc(net.b(net.last(y)).mean((1, 2)))

    return Net(
        {
            "a": conv(3, 12),
            "whole": nn.LayerNorm([12, 8, 8]),
            "last": nn.LayerNorm(12),
            "b": nn.Linear(12, 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick()
def filtered_in_frequency() -> nn.Module:
    """Rao et al. 2021, "Global Filter Networks": a weight for each frequency of each channel."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(net.filter)
        x = torch.fft.irfft2(spectrum, s=(8, 8), norm="ortho")
        return net.fc(pooled(net.b(x)))

    return Net(
        {
            "a": conv(3, 12),
            "filter": nn.Parameter(torch.randn(12, 8, 5, 2)),
            "b": conv(12, 14),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick((4, 20))
def mixed_in_frequency() -> nn.Module:
    """Li et al. 2021, "Fourier Neural Operator": channels are mixed for each low frequency."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.gelu(net.a(x))
        spectrum = torch.fft.rfft(x)[..., :6]
        low = torch.einsum("bix,iox->box", spectrum, torch.complex(net.real, net.imaginary))
        x = torch.fft.irfft(F.pad(low, (0, 5)), n=20) + net.b(x)
        return net.fc(F.gelu(x).mean(2))

    return Net(
        {
            "a": nn.Conv1d(4, 12, 1),
            "real": nn.Parameter(torch.randn(12, 14, 6)),
            "imaginary": nn.Parameter(torch.randn(12, 14, 6)),
            "b": nn.Conv1d(12, 14, 1),
            "fc": nn.Linear(14, 10),
        },
        forward,
    )


@trick(share=0.4, frozen="fft_fft")
def features_as_a_signal() -> nn.Module:
    """Lee-Thorp et al. 2021, "FNet", over channels."""

    def forward(net: Net, x: Tensor) -> Tensor:
        x = torch.fft.fft(net.a(x), dim=1).real  # frozen
        return net.fc(pooled(net.b(x)))

    return Net({"a": conv(3, 8), "b": conv(8, 16), "fc": nn.Linear(16, 10)}, forward)


@trick()
def pooled_at_several_scales() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        x = F.relu(net.a(x))
        levels = [F.adaptive_max_pool2d(x, size).flatten(1) for size in (1, 2, 4)]
        return net.fc(F.relu(net.b(torch.cat(levels, 1))))

    return Net({"a": conv(3, 6), "b": nn.Linear(6 * 21, 14), "fc": nn.Linear(14, 10)}, forward)


@trick()
def sampled_on_a_grid() -> nn.Module:
    """Jaderberg et al. 2015, "Spatial Transformer Networks"."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.a(x))
        theta = net.where(pooled(y)).view(-1, 2, 3)
        grid = F.affine_grid(theta, [x.shape[0], 3, 8, 8], align_corners=False)
        return net.fc(pooled(net.b(F.grid_sample(y, grid, align_corners=False))))

    return Net({"a": conv(3, 12), "where": nn.Linear(12, 6), "b": conv(12, 14), "fc": nn.Linear(14, 10)}, forward)
