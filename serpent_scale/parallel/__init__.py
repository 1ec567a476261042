"""Many processes: who this rank is and the few collectives the rest needs (`processes.py`), sequences that ranks share
(`sequence.py`, `exchange.py`), and finding ranks that hang or die (`watchdog.py`)."""
