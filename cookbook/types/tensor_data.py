"""Arrays of numbers that are sent with a request, dense or sparse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from cookbook.errors import RequestError
from cookbook.types.values import Value

if TYPE_CHECKING:
    import torch

TensorDtype: TypeAlias = Literal["int64", "float32"]


class TensorData(Value):
    """An int64 or float32 array that is sent with a request, copied from the given data.

    `data` is a list, a numpy array, a torch tensor, a `ModelInput` or another `TensorData`. Without `dtype`
    whole numbers become int64 and others float32. With `sparse_crow_indices` and `sparse_col_indices` it is
    the matrix of `shape` in CSR form, of which `data` are the listed entries and all others are 0, or the
    `pad_value` that a conversion is given. Raises RequestError for anything but numbers, for fractions if
    int64 is requested, and for indices that are not those of a CSR matrix.
    """

    __slots__ = ("_array", "_dense_shape", "sparse_col_indices", "sparse_crow_indices")

    def __init__(
        self,
        data: Any,
        dtype: TensorDtype | None = None,
        shape: Sequence[int] | None = None,
        sparse_crow_indices: Sequence[int] | None = None,
        sparse_col_indices: Sequence[int] | None = None,
    ) -> None:
        if dtype not in (None, "int64", "float32"):
            raise RequestError(f"TensorData of dtype {dtype!r} is not supported. Use 'int64' or 'float32'.")
        values: Any = data
        if hasattr(values, "to_numpy"):  # another TensorData, or a ModelInput
            values = values.to_numpy()
        elif hasattr(values, "detach"):  # a torch tensor: numpy has no bfloat16
            values = values.detach().cpu()
            values = (values.float() if values.is_floating_point() else values).numpy()
        is_sparse = sparse_crow_indices is not None or sparse_col_indices is not None
        try:
            # Copied, because the caller may refill its buffer while the request is queued.
            array = np.array(values)
            if array.dtype.kind not in "iubf":
                raise ValueError("it is not an array of numbers")
            if dtype is None:
                dtype = "float32" if array.dtype.kind == "f" else "int64"
            if dtype == "int64" and array.dtype.kind == "f" and not (np.trunc(array) == array).all():
                raise ValueError("not all of them are whole numbers")
            array = array.astype(dtype, copy=False)
            self._array = array if shape is None or is_sparse else array.reshape(tuple(shape))
            self._dense_shape = None if shape is None else [int(size) for size in shape]
            self.sparse_crow_indices = _indices(sparse_crow_indices)
            self.sparse_col_indices = _indices(sparse_col_indices)
            if is_sparse:
                self._check_csr()
        except (TypeError, ValueError) as error:
            as_shape = "" if shape is None else f" of shape {list(shape)}"
            raise RequestError(
                f"TensorData cannot hold this data as {dtype or 'numbers'}{as_shape}: {error}."
            ) from error

    def _check_csr(self) -> None:
        """Raises ValueError unless the listed entries are those of a CSR matrix."""
        rows, columns, shape = self.sparse_crow_indices, self.sparse_col_indices, self._dense_shape
        if rows is None or columns is None or shape is None or len(shape) != 2:
            raise ValueError("a sparse matrix needs row pointers, column indices and a shape of two")
        if len(rows) != shape[0] + 1 or rows[0] != 0 or rows[-1] != len(columns) or rows != sorted(rows):
            raise ValueError("the row pointers are not those of its rows")
        if len(columns) != self._array.size or not all(0 <= column < shape[1] for column in columns):
            raise ValueError("the column indices are not those of its entries")

    @classmethod
    def _fields(cls) -> tuple[str, ...]:
        return ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices")

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        return cls(tensor)

    @classmethod
    def from_torch_sparse(cls, tensor: torch.Tensor, pad_value: int = 0) -> TensorData:
        """Returns a matrix in CSR form without its entries of `pad_value`, or dense where that is smaller."""
        array = cls(tensor)._array
        is_listed = array != pad_value
        if array.ndim != 2 or len(array) + 1 + 2 * int(is_listed.sum()) >= array.size:
            return cls(array)
        return cls(
            array[is_listed],
            "int64" if array.dtype == np.int64 else "float32",
            array.shape,
            [0, *np.cumsum(is_listed.sum(axis=1)).tolist()],
            np.nonzero(is_listed)[1].tolist(),
        )

    @property
    def dtype(self) -> TensorDtype:
        return "int64" if self._array.dtype == np.int64 else "float32"

    @property
    def shape(self) -> list[int]:
        return list(self._array.shape) if self.sparse_crow_indices is None else [*self._dense_shape_of()]

    def _dense_shape_of(self) -> list[int]:
        assert self._dense_shape is not None
        return self._dense_shape

    @property
    def data(self) -> list[int] | list[float]:
        """The values as one flat list; of a sparse matrix those of the listed entries."""
        return self._array.ravel().tolist()

    def tolist(self, pad_value: int = 0) -> list[Any]:
        return self.to_numpy(pad_value).tolist()

    def to_numpy(self, pad_value: int = 0) -> np.ndarray:
        """Returns the array. Entries that a sparse matrix does not list have `pad_value`."""
        if self.sparse_crow_indices is None:
            return self._array
        dense = np.full(self.shape, pad_value, self._array.dtype)
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.sparse_crow_indices))
        dense[rows, self.sparse_col_indices] = self._array
        return dense

    def to_torch(self, pad_value: int = 0) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(self.to_numpy(pad_value)))

    def __len__(self) -> int:
        return len(self.to_numpy())

    def __iter__(self) -> Iterator[Any]:
        return iter(self.tolist())

    def __getitem__(self, index: int | slice) -> Any:
        return self.to_numpy()[index].tolist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TensorData) and np.array_equal(self.to_numpy(), other.to_numpy())

    def __repr__(self) -> str:
        return f"TensorData(dtype={self.dtype!r}, shape={self.shape}, data={self.tolist()})"


def _indices(indices: Sequence[int] | None) -> list[int] | None:
    return None if indices is None else [int(index) for index in indices]
