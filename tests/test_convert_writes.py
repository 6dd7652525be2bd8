"""`nn.convert`: values written in place, by whatever name, are read as written."""

import pytest
import torch
import torch.nn.functional as F
from networks import function, randomize, same
from torch import nn

from pycodesign.nn import convert, report


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.act, self.leaky = nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True)

    def forward(self, x):
        y = self.first(x)
        before = self.second(y)
        self.act(y)
        z = y.add_(1)
        return before + y * 2 + z


@pytest.mark.parametrize("skip", [(), ("first",), ("second",)])
def test_values_written_in_place_are_read_as_written(skip):
    model, x = randomize(Overwriting()), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(convert(model, skip=skip)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [(), ("first",)])
def test_what_reads_a_value_before_it_is_overwritten_is_not_moved_behind(skip):
    class Network(Overwriting):
        def forward(self, x):
            y = self.first(x)
            before = self.second(y)
            return before + self.leaky(y)

    model, x = randomize(Network()), torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(convert(model, skip=skip)(x), model(x), rtol=1e-5, atol=1e-5)


class Written(nn.Module):
    """Writes into a value that has another name, or is a part of another."""

    def __init__(self, write):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.act, self.write = nn.ReLU(inplace=True), write

    def forward(self, x):
        return self.write(self, self.first(x))


def add_to_itself(model, y):
    skip = y
    y += 1
    return model.second(y) + skip


def multiply_in_a_list(model, y):
    kept = [model.act(y)]
    y *= 2
    return model.second(y) + kept[0]


def halve_a_size(model, y):
    size = height = y.size(2)
    size //= 2
    return model.second(y)[:, :, size:height]


def call_one_activation_twice(model, y):
    z = model.second(model.act(y))
    model.act(z)
    return y - z


def activate_a_chunk(model, y):
    model.act(y.chunk(2, 1)[0])
    return model.second(y)


def activate_a_view(model, y):
    model.act(y.flatten(2))
    return model.second(y)


def activate_what_is_detached(model, y):
    z = y.detach()
    F.relu(y, inplace=True)
    return model.second(z)


def activate_a_part_and_read_another(model, y):
    a = y[:, :2]
    y.relu_()
    return model.second(y)[:, :2] + a


def drop_nothing_in_place(model, y):
    kept = y.flatten(2)
    return model.second(F.dropout(y, training=False, inplace=True)).flatten(2) + kept


@pytest.mark.parametrize(
    "write", [add_to_itself, multiply_in_a_list, halve_a_size, call_one_activation_twice, drop_nothing_in_place]
)
def test_other_names_of_a_value_that_is_written_to(write):
    model, x = randomize(Written(write)), torch.randn(2, 4, 6, 6)
    model.register_buffer("unused", torch.zeros(1))
    for _ in range(300):
        model.unused += 1  # as often as training would; the forward itself does not
    converted = convert(model)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    assert all("not traced" not in row.why for row in report(converted))


@pytest.mark.parametrize(
    "write", [activate_a_chunk, activate_a_view, activate_what_is_detached, activate_a_part_and_read_another]
)
def test_parts_of_a_value_that_is_written_to(write):
    model, x = randomize(Written(write)), torch.randn(2, 4, 6, 6)
    converted = convert(model, strict=True)
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    why = {row.why.partition(", so by itself")[0].partition("writes ")[2] for row in report(converted)}
    assert why == {"into a tensor that is read later under another name)"}


def scale_data(m, x):
    y = m.a(x)
    data = y.data
    data *= 2
    return m.b(y)


def scale_transposed(m, x):
    y = m.a(x)
    transposed = y.mT
    transposed += 1
    return m.b(y)


def widen(m, x):
    y = m.a(x)
    y *= m.window.double()
    return m.b(F.silu(y))


def widen_by_a_method(m, x):
    y = m.a(x)
    y.add_(x.double())
    return m.b(F.silu(y))


def widen_by_an_attribute(m, x):
    y = m.a(x)
    y += m.double_window
    return m.b(F.silu(y))


def widen_by_a_new_value(m, x):
    y = m.a(x)
    y += torch.ones_like(x, dtype=torch.float64)
    return m.b(F.silu(y))


@pytest.mark.parametrize(
    "forward",
    [scale_data, scale_transposed, widen, widen_by_a_method, widen_by_an_attribute, widen_by_a_new_value],
)
def test_writes_that_no_new_value_replaces(forward):
    model = randomize(function(forward, a=same(3, 3), b=same(3, 3)))
    model.register_buffer("window", torch.rand(5))
    model.register_buffer("double_window", torch.rand(5, dtype=torch.float64))
    x = torch.randn(2, 3, 5, 5)
    converted = convert(model)
    assert all(row.converted for row in report(converted))
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
