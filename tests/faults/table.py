"""The thirty faults in order: what must hold, the named tests, and the defences that the tests stand for."""

from __future__ import annotations

from tests.faults.of_checkpoints import CHECKPOINT_FAULTS
from tests.faults.of_data import DATA_FAULTS
from tests.faults.of_processes import PROCESS_FAULTS

FAULTS = (*CHECKPOINT_FAULTS, *PROCESS_FAULTS, *DATA_FAULTS)
