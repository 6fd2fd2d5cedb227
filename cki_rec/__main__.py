"""``python -m cki_rec`` is ``cki-rec``."""

import sys

from cki_rec.cli import main

sys.exit(main())
