"""Second-order training of deep networks on supercomputers: Kronecker-factored curvature spread over MPI ranks.

What is public stands in `__init__.pyi` and is loaded when it is first asked for, so that the command's help needs no
torch.
"""

import lazy_loader

from hpc_kfac.notices import moved

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

moved.install()
