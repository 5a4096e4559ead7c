# ruff: noqa: I001
# Written by `python -m tools.stubs` from the `__all__` of the modules.
from . import corruptions as corruptions
from . import orders as orders
from . import streams as streams
from .corruptions import CORRUPTIONS as CORRUPTIONS
from .corruptions import EXTRA as EXTRA
from .corruptions import TABLES as TABLES
from .corruptions import corrupt as corrupt
from .domains import Domain as Domain
from .domains import domain_name as domain_name
from .domains import domain_names as domain_names
from .domains import generator_for as generator_for
from .domains import shift as shift
from .fetch import DEFAULT_ROOT as DEFAULT_ROOT
from .fetch import download as download
from .fetch import fetch_cifar10 as fetch_cifar10
from .fetch import fetch_cifar100 as fetch_cifar100
from .fetch import fetch_fashion_mnist as fetch_fashion_mnist
from .fetch import fetch_tiny_imagenet as fetch_tiny_imagenet
from .orders import Order as Order
from .orders import as_stored as as_stored
from .orders import dirichlet as dirichlet
from .orders import grouped as grouped
from .orders import label_shift as label_shift
from .orders import long_tail_prior as long_tail_prior
from .orders import power_prior as power_prior
from .orders import shuffled as shuffled
from .orders import sorted_by_class as sorted_by_class
from .orders import zipf as zipf
from .read import read_cifar_binary as read_cifar_binary
from .read import read_cifar_c as read_cifar_c
from .read import read_cifar_names as read_cifar_names
from .read import read_cifar_python as read_cifar_python
from .read import read_idx as read_idx
from .sets import Dataset as Dataset
from .sets import NAMES as NAMES
from .sets import Split as Split
from .sets import load as load
from .streams import Batch as Batch
from .streams import ORDERS as ORDERS
from .streams import Stream as Stream
from .streams import continual as continual
from .streams import gradual as gradual
from .streams import mixed as mixed
from .text import movie_reviews as movie_reviews
from .text import token_blocks as token_blocks
from .tiny_imagenet import TinyImageNet as TinyImageNet
from .tiny_imagenet import read_tiny_imagenet as read_tiny_imagenet

__all__ = [
    "Batch",
    "CORRUPTIONS",
    "DEFAULT_ROOT",
    "Dataset",
    "Domain",
    "EXTRA",
    "NAMES",
    "ORDERS",
    "Order",
    "Split",
    "Stream",
    "TABLES",
    "TinyImageNet",
    "as_stored",
    "continual",
    "corrupt",
    "corruptions",
    "dirichlet",
    "domain_name",
    "domain_names",
    "download",
    "fetch_cifar10",
    "fetch_cifar100",
    "fetch_fashion_mnist",
    "fetch_tiny_imagenet",
    "generator_for",
    "gradual",
    "grouped",
    "label_shift",
    "load",
    "long_tail_prior",
    "mixed",
    "movie_reviews",
    "orders",
    "power_prior",
    "read_cifar_binary",
    "read_cifar_c",
    "read_cifar_names",
    "read_cifar_python",
    "read_idx",
    "read_tiny_imagenet",
    "shift",
    "shuffled",
    "sorted_by_class",
    "streams",
    "token_blocks",
    "zipf",
]
