"""Networks to convert, with random weights of few values, and what tests ask of them."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from pycodesign import quantize
from pycodesign.nn import report


class Block(nn.Module):
    """Residual, with a shortcut of its own where the size changes; in place where that is usual."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16, 2), Block(16, 16))
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, 1)
        x = torch.flatten(F.adaptive_avg_pool2d(self.blocks(x), 1), 1)
        return self.fc(self.dropout(x))


class PreActivation(nn.Module):
    """Batch normalization before convolutions, where none can take it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.stem(x)
        for bn, conv in zip(self.bns, self.convs, strict=True):
            x = x + conv(bn(x).relu())
        return x.mean([-2, -1])


class Inception(nn.Module):
    """Branches that meet in a concatenation, and one convolution called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Sequential(OrderedDict(a=nn.Conv2d(8, 4, 1), act=nn.ReLU6(), b=nn.Conv2d(4, 8, 3, padding=1)))
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.last = nn.Conv2d(24, 6, 1)

    def forward(self, x):
        x = F.hardtanh(self.stem(x), -0.5, 2)
        y = torch.cat([self.left(x), self.right(x), self.pool(x)], 1)
        y = self.last(y)
        z = self.shared(self.shared(x).clamp(min=0))
        return y.reshape(y.shape[0], -1), F.leaky_relu(z)


class Crossing(nn.Module):
    """A value leaves the packed layers and comes back: these cannot all run in one call."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        a = self.a(x).relu()
        b = self.b(a)
        back = F.leaky_relu(b)
        c = self.c(back) + a
        return self.d(c) + b


def make_vgg():
    conv = [nn.Conv2d(4, 16, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.Hardtanh()]
    return nn.Sequential(*conv, nn.Conv2d(16, 8, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(32, 12), nn.BatchNorm1d(12))


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4 dimensions, got {x.ndim}")
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps)
        return self.act(y)


class Normalized(nn.Module):
    """Batch normalization of the second of three dimensions, which is as large as the third."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn = nn.Linear(12, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(self.fc(x))


class Mlp(nn.Module):
    """Linear layers over (batch, tokens, features)."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 7)

    def forward(self, x):
        return self.head(x + self.down(input=F.relu(self.up(x))))


class Untraceable(nn.Module):
    """A branch on values, which tracing cannot follow."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 5)
        self.plain = nn.Linear(5, 300)

    def forward(self, x):
        y = self.conv(x)
        if y.sum() > 0:
            y = y + 1
        return self.plain(self.fc(input=y.movedim(1, -1)))


NETWORKS = {
    "resnet": (ResNet, (2, 3, 20, 18)),
    "preactivation": (PreActivation, (2, 4, 9, 9)),
    "inception": (Inception, (2, 4, 10, 11)),
    "crossing": (Crossing, (1, 8, 7, 7)),
    "vgg": (make_vgg, (3, 4, 8, 8)),
    "mlp": (Mlp, (2, 5, 24)),
}


def randomize(model, quantizer=quantize.ternary, skip=()):
    """Give layers fake-quantized weights, and batch normalization statistics; some of its scales are negative."""
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight)
            if name not in skip:
                module.weight.data = torch.from_numpy(quantizer(module.weight).dequantize())
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(1, 30)
            if module.affine:
                module.weight.data.uniform_(-1, 2)
                module.bias.data.normal_()
    return model.eval().requires_grad_(False)


def make_resnet():
    """First and last layer are float."""
    return randomize(ResNet(), skip=("conv1", "fc"))


def same(inputs, outputs, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def function(forward, **modules):
    """Return a network that computes a function of itself and its input."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            for name, module in modules.items():
                setattr(self, name, module)

        def forward(self, x):
            return forward(self, x)

    return Network()


def images(n=2, seed=1):
    return torch.randn(n, 3, 20, 18, generator=torch.Generator().manual_seed(seed))


def as_list(values):
    return list(values) if isinstance(values, (tuple, list)) else [values]


def find_rows(model):
    return {row.layer: row for row in report(model)}


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
