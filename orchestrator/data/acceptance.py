"""Which loaders are accepted, and what is said of those that are not."""

from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, IterDataPipe

from orchestrator.data.errors import DataError
from orchestrator.data.order import index_sampler
from orchestrator.errors import kind_of

__all__ = ["check_loader"]

_ITERATION = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation", "__len__")


def check_loader(loader: Any, role: str) -> None:
    """Raise DataError if the batches of `loader` cannot be addressed."""
    if not isinstance(loader, DataLoader):
        once = hasattr(loader, "__next__")
        found = ", an iterator, which can be gone through but once" if once else ""
        advice = ": DataLoader(dataset, batch_size=32)" if isinstance(loader, Dataset) else ""
        raise DataError(
            f"the {role} data is {kind_of(loader)}{found}; expected a torch DataLoader, or a list or tuple of "
            f"batches{advice}"
        )
    if not getattr(loader, "in_order", True):
        raise DataError(
            f"the {role} loader has in_order=False, so the order of its batches is chance; expected in_order=True"
        )
    overridden = [name for name in _ITERATION if not _is_known(_definer(type(loader), name))]
    if overridden:
        raise DataError(
            f"the {role} loader is {kind_of(loader)}, which overrides {', '.join(overridden)}; expected the "
            "iteration of torch's DataLoader: build a DataLoader, and put the change into its sampler or collate "
            "function"
        )
    if getattr(loader, "next_iter_state", None) is not None:
        raise DataError(
            f"a state was loaded into the {role} loader; expected it as it was built: the position in the data is "
            "part of a checkpoint, and is put back with it"
        )
    if isinstance(loader.dataset, IterableDataset):
        if isinstance(loader.dataset, IterDataPipe):
            raise DataError(
                f"the {role} loader reads {kind_of(loader.dataset)}, a data pipe; expected a data set of "
                "torch.utils.data: make an IterableDataset that gives the pipe's items"
            )
        return
    for sampler in (index_sampler(loader), loader.sampler):
        if hasattr(sampler, "__next__"):
            raise DataError(
                f"the sampler of the {role} loader is {kind_of(sampler)}, an iterator that can be gone "
                "through but once; expected one that starts anew each epoch: a list, or an object with __iter__"
            )


def _definer(kind: type, name: str) -> type | None:
    return next((base for base in kind.__mro__ if name in vars(base)), None)


def _is_known(definer: type | None) -> bool:
    """Whether what `definer` defines of iterating is torch's own, or torchdata's, which gives the same batches."""
    if definer is None or definer is DataLoader:
        return True
    return definer.__name__ == "StatefulDataLoader" and definer.__module__.partition(".")[0] == "torchdata"
