"""``python -m train`` is ``sparse-lm``."""

import sys

from train.cli import main

sys.exit(main())
