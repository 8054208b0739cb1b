"""The thirty faults that a run must survive: their tests, and the proof that each test can fail (``make faults``)."""
