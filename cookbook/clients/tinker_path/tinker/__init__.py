"""What `import tinker` finds in the processes that a program under `recipes.tinker` starts: this package.

`recipes.tinker` puts the folder above this one in their PYTHONPATH.
"""

import sys

from cookbook.clients.as_tinker import install_as_tinker

del sys.modules[__name__]
install_as_tinker()
