"""The frozen decoder's own files, read tensor by tensor: a decoder of any size needs little memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dehvf_ds.model import ModelError
from dehvf_ds.model.sketch import bare_name
from dehvf_ds.model.stored import StoredFile, StoredTensor, stored_tensors


@dataclass
class DecoderFiles:
    """The files of the frozen decoder; one of them is open at a time.

    Attributes:
        source: directory or hub id, for messages.
        places: file and entry of each tensor, by the name that the files give it.
    """

    source: str
    places: dict[str, tuple[Path, StoredTensor]]
    _open: StoredFile | None = field(default=None, repr=False)

    @classmethod
    def find(cls, source: str) -> DecoderFiles:
        """Lists what a decoder's files hold.

        Raises:
            ModelError: there are none, or one is damaged.
        """
        return cls(source, stored_tensors(source))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most values are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for _, stored in self.places.values():
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.num_elements
        return max(sizes, key=lambda dtype: sizes[dtype])

    def match(
        self,
        wanted: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = str,
        twins: Mapping[str, Sequence[str]] | None = None,
    ) -> dict[str, str]:
        """Finds the file's name of every weight: the same, or the same without wrapping words (``model.``).

        Args:
            wanted: shapes by the decoder's own names.
            renamed: what transformers makes of a file's name, see ``loaded_name``.
            twins: all names of a weight: files may hold a tied one under any of them.

        Raises:
            ModelError: a weight is missing, has another shape or no values, or is quantised.
        """
        by_bare_name: dict[str, list[str]] = {}
        for name in self.places:
            for bare in {bare_name(name), bare_name(renamed(name))}:
                by_bare_name.setdefault(bare, []).append(name)
        matched, missing = {}, []
        for name, shape in wanted.items():
            candidates: list[str] = []
            for own in [name, *(twins or {}).get(name, ())]:
                candidates = candidates or (
                    [own] if own in self.places else by_bare_name.get(bare_name(own), [])
                )
            if len(candidates) != 1:
                missing.append(name)
                continue
            _, stored = self.places[candidates[0]]
            if stored.num_elements == 0:
                raise ModelError(f"{self.source}: {candidates[0]} holds no values")
            if stored.shape != shape:
                raise ModelError(
                    f"{self.source}: {candidates[0]} has shape {list(stored.shape)}, not {list(shape)}"
                )
            if not stored.dtype.is_floating_point or stored.dtype.itemsize < 2:
                kind = str(stored.dtype).removeprefix("torch.")
                raise ModelError(
                    f"{self.source}: {candidates[0]} is quantised ({kind}); merge into the unquantised model"
                )
            matched[name] = candidates[0]
        if missing:
            raise ModelError(
                f"{self.source}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them"
            )
        return matched

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, by the file's name of it.

        Raises:
            ModelError: the file is damaged.
        """
        path, _ = self.places[name]
        if self._open is None or self._open.path != path:
            self.close()
            self._open = StoredFile(path)
        return self._open.read(name)

    def close(self) -> None:
        """Closes the file that is open."""
        if self._open is not None:
            self._open.close()
            self._open = None
