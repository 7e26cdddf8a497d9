"""DeepSpeed's own settings: read, and checked before DeepSpeed sees them.

Light to import: DeepSpeed is loaded where it is asked.
"""

from ds_decoupled.settings.kinds import check_choice
from ds_decoupled.settings.reading import read_json

__all__ = ["check_choice", "read_json"]
