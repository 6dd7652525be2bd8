"""torch.ops.pycodesign: weights are packed once for all threads, anew after a write, and as long as they live."""

import gc
import json
import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch_operators import GEOMETRY, OPTIONS, chain, conv2d, make_chain, make_conv, random, to_tensors

from pycodesign import ops, quantize
from pycodesign.nn import ops as torch_ops
from pycodesign.nn.program import build_chain, chains
from pycodesign.quantize import QuantizedTensor


@pytest.fixture
def conv():
    return make_conv()


def test_weights_that_are_written_to_are_packed_anew(conv):
    x = random(2, 4, 9, 8)
    conv2d(x, *conv, None, OPTIONS)
    entries = len(torch_ops.prepared)
    for tensor in (conv[2], conv[3]):
        tensor.mul_(-3)
    wanted = ops.conv2d(x, ops.prepack_conv2d(QuantizedTensor(*conv[:3]), conv[3], **GEOMETRY))
    assert torch.equal(conv2d(x, *conv, None, OPTIONS), wanted)
    conv[0].zero_()
    wanted = ops.conv2d(x, ops.prepack_conv2d(QuantizedTensor(*conv[:3]), conv[3], **GEOMETRY))
    assert torch.equal(conv2d(x, *conv, None, OPTIONS), wanted)
    assert len(torch_ops.prepared) == entries


def test_what_is_packed_dies_with_its_weights():
    gc.collect()  # of other tests
    before = len(torch_ops.prepared), len(chains)
    weights = [*to_tensors(quantize.ternary(random(6, 2, 3, 3))), random(6)]
    flat, program, _ = make_chain()
    conv2d(random(2, 4, 9, 8), *weights, None, OPTIONS)
    conv2d(random(2, 4, 9, 8), *weights[:3], None, None, OPTIONS)
    chain([random(2, 3, 8, 8), random(2, 4, 4, 4)], *flat, program.to_json())
    assert (len(torch_ops.prepared), len(chains)) == (before[0] + 2, before[1] + 1)
    del weights[3]
    gc.collect()
    assert len(torch_ops.prepared) == before[0] + 1
    del weights, flat
    gc.collect()
    assert (len(torch_ops.prepared), len(chains)) == before


def test_programs_of_one_length_share_weights():
    weights, program, _ = make_chain()
    x, residual = random(2, 3, 8, 8), random(2, 4, 4, 4)
    texts = [program.to_json(), program.to_json().replace('"clamp": [0, 6]', '"clamp": [0, 3]')]
    assert len(texts[0]) == len(texts[1]) and texts[0] != texts[1]
    wanted = [build_chain(weights, text)(x.numpy(), residual.numpy()) for text in texts]
    assert not np.array_equal(wanted[0][0], wanted[1][0])
    for i in (0, 1, 0, 1, 1):
        for y, expected in zip(chain([x, residual], *weights, texts[i]), wanted[i], strict=True):
            np.testing.assert_array_equal(y.numpy(), expected)


def test_threads_share_what_is_packed(conv, monkeypatch):
    x, options = random(2, 4, 9, 8), json.dumps({**GEOMETRY, "algorithm": "dense"})
    packed, start = [], threading.Barrier(8)
    prepack = torch_ops.prepack_conv2d

    def prepack_slowly(*args, **options):
        packed.append(1)
        time.sleep(0.05)
        return prepack(*args, **options)

    monkeypatch.setattr(torch_ops, "prepack_conv2d", prepack_slowly)

    def run(_):
        start.wait()
        return [conv2d(x, *conv, None, options) for _ in range(20)]

    with ThreadPoolExecutor(8) as threads:
        results = [y for ys in threads.map(run, range(8)) for y in ys]
    assert packed == [1]
    assert all(torch.equal(y, results[0]) for y in results)


class Layers(torch.utils.data.Dataset):
    """Runs layers where it is asked for an item: in a worker. One of them is new there."""

    def __init__(self, weights):
        self.weights, self.flat = weights, make_chain()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        y = conv2d(random(1, 4, 33, 32, seed=index), *self.weights, None, OPTIONS)
        new = conv2d(random(1, 4, 9, 9, seed=index), *[tensor.clone() for tensor in self.weights], None, OPTIONS)
        z, _ = chain([random(1, 3, 8, 8, seed=index), random(1, 4, 4, 4)], *self.flat[0], self.flat[1].to_json())
        return y[0], new[0], z[0]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_workers(conv):
    dataset = Layers(conv)
    wanted = [dataset[i] for i in range(4)]  # its team of threads runs before the fork
    held, done = threading.Event(), threading.Event()

    def hold_lock():  # as if it were packing
        with torch_ops.prepared._lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold_lock)
    thread.start()
    held.wait()
    try:
        loader = torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context="fork", timeout=20)
        for ours, theirs in zip(loader, wanted, strict=True):
            assert all(torch.equal(a[0], b) for a, b in zip(ours, theirs, strict=True))
    finally:
        done.set()
        thread.join()
