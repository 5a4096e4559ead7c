"""Weight arithmetic: finished weights adapt by adding, averaging and patching.

Every public name of the modules inside can be imported from here; its module is loaded when the name is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
