"""What is made from tensors, kept for as long as they live and nobody writes into them."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeAlias, TypeVar

from torch import Tensor

T = TypeVar("T")
Weights: TypeAlias = tuple[Tensor | None, ...]


class TensorCache(Generic[T]):
    """Values by the tensors that they are made from, and by options.

    A key begins with the tensors' `id`, which no other tensor has before their death is reported and the value is gone.
    Writing into a tensor raises its version, and the value is made anew; not so writing into its ``data``, or into an
    array that shares its memory.
    """

    def __init__(self) -> None:
        self._entries: dict[Hashable, tuple[Any, T, list[weakref.ref[Tensor]]]] = {}
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)  # whoever held it does not exist there

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()

    def get(self, key: Hashable, tensors: Weights, make: Callable[..., T], *arguments: Any) -> T:
        """Return the value for `key`; where it is missing or outdated, ``make(tensors, *arguments)``."""
        version: Any = 0
        try:
            for tensor in tensors:  # none ever falls, so neither does their sum
                if tensor is not None:
                    version += tensor._version
        except RuntimeError:  # tensors made in inference mode count no versions; their bytes stand for them
            version = [tensor.cpu().numpy().tobytes() for tensor in tensors if tensor is not None]
        entry = self._entries.get(key)
        if entry is not None and entry[0] == version:
            return entry[1]
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] != version:
                deaths = [weakref.ref(tensor, self._forget(key)) for tensor in tensors if tensor is not None]
                entry = self._entries[key] = version, make(tensors, *arguments), deaths
            return entry[1]

    def _forget(self, key: Hashable) -> Callable[[Any], object]:
        return lambda _: self._entries.pop(key, None)

    def __len__(self) -> int:
        return len(self._entries)
