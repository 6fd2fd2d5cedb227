"""``python -m cki_rec`` is ``cki-rec``; torchrun starts this module."""

from cki_rec.cli import main
from cki_rec.processes import leave

leave(main())
